"""What the user sees: rank 0 speaks; colour and bars on a terminal only, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Generic, TextIO, TypeVar

from swinq import distributed
from swinq.errors import SwinqError

Item = TypeVar("Item")

# style -> (colour, bold); the words say what a line means, the colours are chosen here only
STYLES: dict[str, tuple[str | None, bool]] = {
    "title": ("cyan", True),
    "good": ("green", False),
    "warning": ("yellow", False),
    "error": ("red", True),
    "quiet": ("dark_grey", False),
    "bold": (None, True),
}
PLAIN_STEPS = 10  # lines of progress where there is no terminal


def say(text: str, style: str | None = None, *, file: TextIO | None = None) -> None:
    """Prints a line on rank 0.

    Args:
        text: the line, or lines.
        style: a key of STYLES, or None.
        file: where to; standard output if None.
    """
    if distributed.is_main():
        out = file or sys.stdout
        print(painted(text, style, out), file=out, flush=True)


def complain(text: str, *, label: str = "error: ") -> None:
    """Prints an error on standard error from any rank: the first to fail must be heard."""
    try:
        who = f"[rank {distributed.rank()}] " if distributed.world_size() > 1 else ""
    except SwinqError:  # RANK or WORLD_SIZE is no number, and that is what is being said
        who = ""
    print(who + painted(label, "error", sys.stderr) + text, file=sys.stderr, flush=True)


def painted(text: str, style: str | None, file: TextIO) -> str:
    """The text with the style's colour codes, if the file is a terminal and NO_COLOR is not set."""
    if style is None or not _colourful(file):
        return text
    from termcolor import colored

    colour, bold = STYLES[style]
    return str(colored(text, colour, attrs=["bold"] if bold else None, force_color=True))


def table(
    rows: Iterable[Sequence[object]], header: Sequence[str], *, file: TextIO | None = None
) -> None:
    """Prints aligned columns on rank 0; columns of numbers are set flush right.

    Args:
        rows: cells are shown with str(); None is an empty cell.
        header: the columns' names; every row has as many cells.
        file: where to; standard output if None.
    """
    if not distributed.is_main():
        return
    out = file or sys.stdout
    body = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in body:
        if len(row) != len(header):
            raise ValueError(
                f"a row of {len(row)} cells in a table of {len(header)} columns: {row}"
            )
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    numeric = [bool(body) and all(map(_numeric, column)) for column in zip(*body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(
                cells, widths, numeric or [False] * len(widths), strict=True
            )
        )
        return "  ".join(aligned).rstrip()

    print(painted(line(header), "bold", out), file=out)
    print("  ".join("-" * width for width in widths), file=out)
    for row in body:
        print(line(row), file=out)
    out.flush()


class progress(Generic[Item]):  # noqa: N801  (used like a function)
    """Progress with the time left, on rank 0: a tqdm bar on a terminal, plain lines elsewhere.

    `for item in progress(items, "label")`, or `with progress(100, "label") as p: p.update(1)`.

    Args:
        source: what to iterate over, or the number of steps.
        label: what is being done, in a word or two.
        total: the number of steps, where `source` has no length.
        unit: what a step is, for the rate on a terminal.
    """

    def __init__(
        self,
        source: Iterable[Item] | int,
        label: str,
        *,
        total: int | None = None,
        unit: str = "it",
        file: TextIO | None = None,
    ) -> None:
        self._items: Iterable[Item] = () if isinstance(source, int) else source
        if isinstance(source, int):
            total = source
        elif total is None and isinstance(source, Sized):
            total = len(source)
        self._label, self._total, self._file = label, total, file or sys.stderr
        self._done, self._next_line = 0, 1
        self._start = time.monotonic()
        self._bar = None
        self._speaks = distributed.is_main() and os.environ.get("TQDM_DISABLE", "") in ("", "0")
        if self._speaks and self._file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit=unit, file=self._file, dynamic_ncols=True
            )

    def update(self, steps: int = 1) -> None:
        """Counts `steps` more steps as done."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif self._speaks:
            self._print_line()

    def close(self) -> None:
        """Ends the bar; a plain log needs no end."""
        if self._bar is not None:
            self._bar.close()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> progress[Item]:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _print_line(self) -> None:
        """A line whenever another tenth is done, or at powers of two where the end is unknown."""
        elapsed = time.monotonic() - self._start
        if self._total is None:
            if self._done < self._next_line:
                return
            while self._next_line <= self._done:
                self._next_line *= 2
            text = f"{self._done}  ({duration(elapsed)} so far)"
        else:
            tenth = self._done * PLAIN_STEPS // max(self._total, 1)
            if tenth < self._next_line:
                return
            self._next_line = tenth + 1
            left = elapsed / self._done * (self._total - self._done)
            time_text = (
                f"{duration(left)} left" if self._done < self._total else f"in {duration(elapsed)}"
            )
            text = f"{self._done}/{self._total}  ({time_text})"
        print(f"{self._label}: {text}", file=self._file, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "0.4 s", "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _colourful(file: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return file.isatty() and os.environ.get("TERM") != "dumb"


def _numeric(cell: str) -> bool:
    """Whether a cell reads as a number, perhaps with a sign before and a unit after it."""
    first = cell.split(" ", 1)[0].rstrip("%x").lstrip("+-")
    return cell in ("", "-") or first.replace(".", "", 1).replace(",", "").isdecimal()
