"""The drawings of the passes over F-sized memory, as SVG that takes the page's colours.

A row is a kernel or operator: its name, and what of F's size it reads and writes.
`tests/test_docs.py` holds the rows beside what the traffic meter counts.
"""

from __future__ import annotations

from html import escape

Row = tuple[str, tuple[str, ...], tuple[str, ...]]

EAGER_FORWARD: list[Row] = [
    ("mean", ("F",), ()),
    ("convolution, 1x1", ("F",), ()),
    ("Mc + Ms", (), ("c+s",)),
    ("sigmoid", ("c+s",), ("M",)),
    ("F * M", ("F", "M"), ("F*M",)),
    ("F + F * M", ("F", "F*M"), ("F'",)),
]
FUSED_FORWARD: list[Row] = [
    ("pool_reduce", ("F",), ()),
    ("gate", ("F",), ("F'",)),
]
EAGER_BACKWARD: list[Row] = [
    ("dF' * F", ("dF'", "F"), ("dM",)),
    ("dF' * M", ("dF'", "M"), ("dF",)),
    ("dF' + ...", ("dF'", "dF"), ("dF",)),
    ("sigmoid backward", ("dM", "M"), ("d(c+s)",)),
    ("sum over C", ("d(c+s)",), ()),
    ("sum over H, W", ("d(c+s)",), ()),
    ("convolution backward, 1x1", ("F",), ("dF",)),
    ("dF + ...", ("dF", "dF"), ("dF",)),
    ("mean backward", (), ("dF",)),
    ("dF + ...", ("dF", "dF"), ("dF",)),
]
FUSED_BACKWARD: list[Row] = [
    ("gate_backward_reduce", ("dF'", "F"), ()),
    ("input_gradient", ("dF'", "F"), ("dF",)),
]
DRAWINGS = {
    "forward": (EAGER_FORWARD, FUSED_FORWARD),
    "backward": (EAGER_BACKWARD, FUSED_BACKWARD),
}

_ROW, _CELL, _NAME = 26, 62, 190


def passes(rows: list[Row]) -> int:
    """Reads and writes of F-sized tensors."""
    return sum(len(reads) + len(writes) for _, reads, writes in rows)


def svg(name: str) -> str:
    """A drawing on one line of HTML: eager on the left, fused on the right."""
    sides = DRAWINGS[name]
    height = 44 + _ROW * max(map(len, sides)) + 30
    width = 2 * (_NAME + 3 * _CELL) + 40
    parts = [_side("plain PyTorch", sides[0], 0), _side("fused", sides[1], width // 2 + 10)]
    legend = (
        f'<rect class="read" x="0" y="{height - 16}" width="12" height="12" rx="2"/>'
        f'<text x="18" y="{height - 6}" font-size="12">a read of F\'s size</text>'
        f'<rect class="write" x="150" y="{height - 16}" width="12" height="12" rx="2"/>'
        f'<text x="168" y="{height - 6}" font-size="12">a write of F\'s size</text>'
    )
    return (
        f'<div class="drawing"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Passes over memory of the size of F, {name}">'
        f"{''.join(parts)}{legend}</svg></div>"
    )


def _side(title: str, rows: list[Row], x: int) -> str:
    text = [
        f'<text x="{x}" y="18" font-size="15" font-weight="bold">{title}: '
        f"{passes(rows)} passes</text>"
    ]
    for i, (name, reads, writes) in enumerate(rows):
        y = 36 + i * _ROW
        text.append(f'<text x="{x}" y="{y + 14}" font-size="12">{escape(name)}</text>')
        cells = [("read", t) for t in reads] + [("write", t) for t in writes]
        for j, (kind, tensor) in enumerate(cells):
            at = x + _NAME + j * _CELL
            text.append(
                f'<rect class="{kind}" x="{at}" y="{y}" width="{_CELL - 6}" height="{_ROW - 6}" '
                f'rx="3"/><text x="{at + (_CELL - 6) / 2}" y="{y + 14}" font-size="11" '
                f'text-anchor="middle" style="fill:#fff">{escape(tensor)}</text>'
            )
    return "".join(text)
