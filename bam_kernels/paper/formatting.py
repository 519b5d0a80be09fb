"""The comparison as rows of text, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from bam_kernels.paper.comparison import NOT_REPRODUCIBLE, Comparison, Entry, summary
from bam_kernels.paper.printed import Row

PARAMS_HEADER = ("network", "Params, M", "ours", "")
GFLOPS_HEADER = ("GFLOPs", "ours", "")


def by_table(found: Sequence[Comparison]) -> Iterator[tuple[str, list[Comparison]]]:
    """The rows of each table, in their order."""
    for table, rows in groupby(found, key=lambda each: each.row.table):
        yield table, list(rows)


def cells(each: Comparison) -> list[str]:
    """A row: its name, and printed, ours, verdict a column."""
    found = [each.row.name]
    for entry in each.entries:
        found += [entry.printed, entry.ours, str(entry)]
    return found


def header(rows: Sequence[Comparison]) -> list[str]:
    """What stands above `cells`."""
    return [*PARAMS_HEADER, *(() if rows[0].gflops is None else GFLOPS_HEADER)]


def reasons(found: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Why figures cannot be had from the paper, and of which rows that is said."""
    said: dict[str, list[str]] = {}
    for each in found:
        for entry in each.entries:
            if entry.verdict == NOT_REPRODUCIBLE:
                name = _name(each.row)
                rows = said.setdefault(entry.reason, [])
                if name not in rows:
                    rows.append(name)
    return list(said.items())


def _name(row: Row) -> str:
    return f"Table {row.table}, {row.name}"


def summary_lines(found: Sequence[Comparison]) -> list[str]:
    """How many entries are equal, a line a column."""
    counts = summary(found)
    lines = []
    for name, column in (("Params", counts["params"]), ("GFLOPs", counts["gflops"])):
        if column["entries"]:
            line = (
                f"{name}: {column['equal']} of {column['entries']} equal to the printed digit, "
                f"{column['off']} off, {column[NOT_REPRODUCIBLE]} not reproducible"
            )
            near = column.get("within 3 %")
            lines.append(line if near is None else f"{line}; {near} within 3 %")
    return lines


def document(found: Sequence[Comparison]) -> str:
    """Every table, the reasons, and the counts."""
    parts = []
    for table, rows in by_table(found):
        titles = header(rows)
        rule = ["---", *["---:", "---:", "---"] * (len(titles) // 3)]
        lines = [titles, rule, *map(cells, rows)]
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"Table {table}:\n\n{drawn}")
    because = [f"- {', '.join(rows)}: {reason}." for reason, rows in reasons(found)]
    if because:
        parts.append("Not reproducible from the paper:\n\n" + "\n".join(because))
    parts.append("\n".join(f"- {line}." for line in summary_lines(found)))
    return "\n\n".join(parts)


def as_json(found: Sequence[Comparison]) -> dict[str, object]:
    """Every figure, for a file."""

    def entry(one: Entry | None) -> dict[str, object] | None:
        if one is None:
            return None
        return {
            "printed": one.printed,
            "ours": one.exact,
            "verdict": one.verdict,
            "difference": one.difference,
            "reason": one.reason if one.verdict == NOT_REPRODUCIBLE else None,
        }

    rows = [
        {
            "table": each.row.table,
            "row": each.row.name,
            "model": each.row.model,
            "attention": each.row.attention,
            "options": each.row.options,
            "params": entry(each.params),
            "gflops": entry(each.gflops),
        }
        for each in found
    ]
    return {"rows": rows, "summary": summary(found)}
