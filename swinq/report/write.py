"""Writes a report's files whole or not at all."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from swinq.errors import DataError, ExportError
from swinq.files import write_together
from swinq.report.csv import to_csv
from swinq.report.html import to_html
from swinq.report.markdown import to_markdown
from swinq.report.schema import Report, to_json
from swinq.report.verdict import judge

RECIPE_FILE = "suggested_recipe.yaml"


def write_report(report: Report, folder: Path | str) -> dict[str, Path]:
    """Judge the figures and write them in every form; for one rank alone.

    Args:
        report: its verdicts are made anew from its figures.
        folder: made if it is not there.

    Returns:
        "html", "md", "json", "csv" -> path; "recipe" too if layers are worth excluding.

    Raises:
        DataError: a file cannot be written; what an earlier run wrote is then left as it was.
    """
    report = dataclasses.replace(report, verdicts=judge(report))
    folder = Path(folder)
    suggestion = report.sensitivity.suggestion if report.sensitivity else None
    recipe = suggestion.recipe if suggestion else ""
    texts = {
        "html": (folder / "report.html", to_html(report)),
        "md": (folder / "report.md", to_markdown(report)),
        "json": (folder / "report.json", to_json(report)),
        "csv": (folder / "report.csv", to_csv(report)),
    }
    if recipe:
        texts["recipe"] = (folder / RECIPE_FILE, recipe)
    try:
        write_together({path: partial(_write, text=text) for path, text in texts.values()})
    except ExportError as error:
        raise DataError(
            f"the report cannot be written to {folder}: {error.problem}",
            "give a folder that is writable and has a few megabytes free with --output",
        ) from error
    if not recipe:
        (folder / RECIPE_FILE).unlink(missing_ok=True)  # an earlier run's, no longer advised
    return {kind: path for kind, (path, _) in texts.items()}


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # no line end is translated
