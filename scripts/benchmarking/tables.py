"""Markdown tables of a record, and the marked places in pages where they stand.

A place is `<!-- table: NAME ARGUMENTS -->` and `<!-- end of table -->`, each on a line of its own;
what stands between them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarking.cases import BATCHES, FORMS, MODELS
from benchmarking.records import Record
from swinq import console
from swinq.errors import ConfigError

_PLACE = re.compile(r"<!-- table: ([^>]*?) -->\n.*?<!-- end of table -->", re.DOTALL)
COMPILED = ("compile", "compile-sdpa")
INT8 = ("swinq-int8-1", "swinq-int8-2")

Renderer = Callable[..., list[str]]


def rewrite_all(
    pages: Iterable[Path],
    renderers: Mapping[str, Renderer],
    path: Path | None,
    results: Collection[Any],
) -> None:
    """Replace the tables of several pages by those of the results that a file holds.

    Raises:
        ConfigError: there are no results, or see `rewrite`.
    """
    if not results:
        raise ConfigError(
            f"{path} holds no results" if path else "no file of results is named",
            "tables would be left empty: name the file that holds the results, --json FILE",
        )
    for page in pages:
        console.say(f"{page}: {rewrite(page, renderers)} tables")


def rewrite(path: Path, renderers: Mapping[str, Renderer]) -> int:
    """Replace the tables of a page that have a renderer; the number of them.

    Raises:
        ConfigError: the page cannot be read, or arguments that the renderer does not take.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", "name a page") from error
    count = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal count
        name, *arguments = match[1].split()
        if name not in renderers:
            return match[0]
        try:
            lines = renderers[name](*arguments)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: '{match[1]}' is no table ({error})", f"known: {', '.join(renderers)}"
            ) from error
        count += 1
        return "\n".join([f"<!-- table: {match[1]} -->", *lines, "<!-- end of table -->"])

    changed = _PLACE.sub(replaced, text)
    if changed != text:
        path.write_text(changed, encoding="utf-8")
    return count


def renderers(record: Record) -> dict[str, Renderer]:
    """Tables by name."""
    return {
        "headline": lambda batch: headline(record, int(batch)),
        "latency": lambda batch, state="warm": latency(record, int(batch), state),
        "batches": lambda model: by_batch(record, model),
        "device": lambda: device(record),
        "failures": lambda: failures(record),
        "file": lambda name: beside(record, name),
    }


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table; numbers stand right."""
    return [
        f"| {' | '.join(header)} |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def headline(record: Record, batch: int) -> list[str]:
    """Our three forms and how many times faster than torch.compile they are."""
    rows = []
    for name, model in MODELS.items():
        peer = fastest(record, name, batch, COMPILED)
        cells = [_ms(peer)]
        for form in ("swinq-fp16", *INT8):
            mine = fastest(record, name, batch, (form,))
            cells.append(f"{_ms(mine)}{_times(peer, mine)}")
        if any(cells):
            rows.append([model.title, *cells])
    header = [f"ms, batch {batch}", "torch.compile FP16"]
    header += [FORMS[form].title for form in ("swinq-fp16", *INT8)]
    return grid(header, rows)


def latency(record: Record, batch: int, state: str) -> list[str]:
    """Every form of every model at one batch size; `state` is warm or cold."""
    forms = _used(record, lambda row: row["batch"] == batch)
    rows = []
    for name, model in MODELS.items():
        cells = [_ms(fastest(record, name, batch, (form,), state)) for form in forms]
        if any(cells):
            rows.append([model.title, *cells])
    return grid([f"ms, batch {batch}", *(FORMS[form].title for form in forms)], rows)


def by_batch(record: Record, name: str) -> list[str]:
    """Every form of one model at every batch size."""
    forms = _used(record, lambda row: row["model"] == name)
    rows = [
        [FORMS[form].title, *(_ms(fastest(record, name, batch, (form,))) for batch in BATCHES)]
        for form in forms
    ]
    return grid([f"{MODELS[name].title}, ms at batch", *map(str, BATCHES)], rows)


def device(record: Record) -> list[str]:
    """What was measured where and with what."""
    seen: dict[str, None] = {}
    for call in record.calls:
        versions = ", ".join(f"{k} {v}" for k, v in call.get("versions", {}).items())
        seen[versions] = None
    return [f"Measured on one {record.device}; {' / '.join(seen)}."]


def failures(record: Record) -> list[str]:
    """What could not be measured, and why."""
    rows = [
        [MODELS[row["model"]].title, str(row["batch"]), FORMS[row["form"]].title, _line(row)]
        for row in record.rows()
        if "error" in row
    ]
    return grid(["model", "batch", "form", "error"], rows) if rows else ["Nothing failed."]


def beside(record: Record, name: str) -> list[str]:
    """A file of the record's folder that is markdown already."""
    path = record.path.parent / name if record.path else Path(name)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else ["Not measured."]


def fastest(
    record: Record, model: str, batch: int, forms: tuple[str, ...], state: str = "warm"
) -> float | None:
    """Milliseconds of the fastest of some forms; None where none was measured."""
    found = (record.find(model, batch, form) for form in forms)
    times = [row[f"{state}_ms"] for row in found if row is not None]
    return min(times, default=None)


def _used(record: Record, chosen: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Forms that have a measured row among the chosen ones, in their usual order."""
    used = {row["form"] for row in record.rows() if chosen(row) and "error" not in row}
    return [form for form in FORMS if form in used]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _times(peer: float | None, mine: float | None) -> str:
    return f" ({peer / mine:.2f}x)" if peer and mine else ""


def _line(row: dict[str, Any]) -> str:
    return " ".join(str(row["error"]).split()).replace("|", "\\|")[:160]
