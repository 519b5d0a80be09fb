"""Progress on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from torch import Tensor

Tell = Callable[[int, Tensor], None]
"""Called after each step with its number, from 1, and its loss."""

_BETWEEN = 20  # steps between readings of the loss for the bar: each waits for the device


@contextlib.contextmanager
def progress(title: str, steps: int, *, every: int = 0, shown: bool = True) -> Iterator[Tell]:
    """What tells the steps of a loop.

    Args:
        title: before the bar or on each line.
        steps: how many there are.
        every: steps between lines where stderr is no terminal; 0: none.
        shown: whether this process tells anything.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    off = not (shown and terminal)
    with tqdm(total=steps, desc=title, leave=False, disable=off, file=sys.stderr) as bar:

        def tell(step: int, loss: Tensor) -> None:
            bar.update()
            if not shown:
                return
            if terminal and step % _BETWEEN == 1:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            elif not terminal and every and step % every == 0:
                say(f"{title} step {step}/{steps}: loss {loss.item():.4f}")

        yield tell


def say(text: str) -> None:
    """A line on stderr, above a bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
