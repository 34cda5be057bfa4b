"""What is written: whole files, harmless text, parseable tables, a page that needs nothing else."""

import base64
import csv
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from swinq.errors import DataError
from swinq.report.csv import HEADER, to_csv
from swinq.report.html import to_html
from swinq.report.markdown import to_markdown
from swinq.report.schema import Report, from_json
from swinq.report.verdict import judge
from swinq.report.write import write_report
from tests.report.sample import made_up_report, trained_report

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac{$ | `x` \n{{ 7*7 }} &amp;"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(page: Page) -> list[str]:
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    prefix = "data:image/svg+xml;base64,"
    assert all(source.startswith(prefix) for source in sources)
    return [base64.b64decode(source.removeprefix(prefix)).decode() for source in sources]


@pytest.fixture(scope="module")
def whole_page() -> str:
    """The page of a report with every section, judged."""
    report = made_up_report()
    report.verdicts = judge(report)
    return to_html(report)


def evil_report() -> Report:
    report = made_up_report((1, 1))
    report.model = report.run.command = EVIL
    report.run.environment.device = report.configuration.text = EVIL
    report.configuration.origins = {EVIL: EVIL}
    for row in (*report.models, *report.latency, *report.quantizers):
        row.name = EVIL + row.name
    for file in report.files:
        file.role = file.path = EVIL
    for data in report.data:
        data.source = data.transform = data.role = EVIL
        data.class_names = [EVIL] * 3
    for layer in report.layer_errors:
        layer.layer = EVIL
    assert report.sensitivity is not None and report.sensitivity.suggestion is not None
    for sensitivity in report.sensitivity.rows:
        sensitivity.layer = EVIL + sensitivity.layer
    report.sensitivity.suggestion.recipe = report.sensitivity.suggestion.reason = EVIL
    report.warnings, report.notes = [EVIL], [EVIL]
    report.training = trained_report().training
    assert report.training is not None
    report.training.source = report.training.teacher = EVIL
    return report


def test_hostile_names_stay_text_in_html_and_pictures() -> None:
    text = to_html(evil_report())
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count("<script>alert(1)</script>") > 20  # shown as what it is
    assert "{{ 7*7 }}" in page.text  # not a template a second time
    for svg in pictures(page):
        found = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert not found & {"script", "image", "foreignObject", "a"}


def test_the_page_needs_nothing_from_elsewhere(whole_page: str) -> None:
    page = Page(whole_page)
    assert page.open == []
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "data:").startswith(("data:", "#"))
    style = re.search(r"<style>(.*?)</style>", whole_page, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    for svg in pictures(page):
        assert not re.search(r"href=\"[^#]", svg) and "url(http" not in svg
        assert "prefers-color-scheme:dark" in svg


def test_a_swin_large_report_is_small_enough() -> None:
    report = made_up_report((2, 2, 18, 2), 192)
    assert len(report.quantizers) > 175
    text = to_html(report)
    assert len(text.encode()) <= 2_000_000
    assert all(row.name in text for row in report.quantizers)


def test_equal_reports_give_equal_pages() -> None:
    assert to_html(made_up_report((1, 1))) == to_html(made_up_report((1, 1)))


def test_a_report_with_accuracy_alone_is_written(tmp_path: Path) -> None:
    report = made_up_report((1,))
    report.quantizers, report.layer_errors, report.latency = [], [], []
    report.sensitivity, report.models = None, report.models[:1]
    text = write_report(report, tmp_path)["html"].read_text()
    assert "nothing was compared" in text and "<img" not in text


def test_names_without_stages_are_drawn_too() -> None:
    report = made_up_report((1,))
    for i, row in enumerate(report.quantizers):
        row.name = f"encoder{i}"
    for error in report.layer_errors:
        error.layer = "dense"
    assert "Others" in Page(to_html(report)).text


def test_the_page_shows_the_verdicts_and_the_suggested_recipe(whole_page: str) -> None:
    text = Page(whole_page).text
    assert "3,925 images cannot show differences under 0.30 points" in text
    assert "INT8 mode 1 is 2.90 to 3.15 times as fast as float" in text
    assert "- PATTERN: layers.0.blocks.1.attn.proj\n    PRECISION: fp16" in text


def test_training_is_told_in_every_form() -> None:
    report = trained_report()
    report.verdicts = judge(report)
    page = Page(to_html(report))
    markdown = to_markdown(report)
    for text in (page.text, markdown):
        assert "Images" in text and "imagenette160/train" in text
        assert "3 epochs of 9,469 images: 120 steps of 236" in text
        assert "6 min 52 s, 1,480 images/s" in text
        assert "learned for output, weight, at a relative rate of 0.00100" in text
        assert "labels and the float model" in text
        assert "the model after step 120" in text
    drawing = next(svg for svg in pictures(page) if "top-1 of the quantized model" in svg)
    assert "before training" in drawing and "learning rate" in drawing
    assert "| 120 | 83.67 |" in markdown
    figures = {tuple(row[:3]): row[3] for row in csv.reader(io.StringIO(to_csv(report)))}
    assert figures["training", "step 80", "top1"] == "83.5"
    assert figures["training", "step 1", "rate"] == repr(4.6e-6 * (1 - 1 / 125))
    assert figures["training", "weight", "learned"] == "True"


def test_a_report_without_training_does_not_speak_of_it(whole_page: str) -> None:
    assert 'id="training"' not in whole_page
    assert "## Training" not in to_markdown(made_up_report((1,)))
    assert "\ntraining," not in to_csv(made_up_report((1,)))


def test_training_without_validation_is_drawn_too(tmp_path: Path) -> None:
    report = trained_report()
    assert report.training is not None
    report.models, report.training.validations, report.training.best_step = [], [], 0
    report.training.learned_ranges, report.training.teacher = [], ""
    text = Page(write_report(report, tmp_path)["html"].read_text()).text
    assert "stayed as calibrated" in text and "the model after step 120" in text


def test_a_model_that_no_step_improved_is_exported_as_calibrated() -> None:
    report = trained_report()
    assert report.training is not None
    report.training.best_step = 0
    assert "the calibrated model, as it was before training" in to_markdown(report)


def test_slower_int8_is_shown_as_slower(tmp_path: Path) -> None:
    report = made_up_report((1,))
    for row in report.latency:
        if row.kind == "int8":
            row.median_ms *= 10
    text = Page(write_report(report, tmp_path)["html"].read_text()).text
    assert "INT8 mode 1 is slower than float here: 3.45 times the time" in text


def test_all_forms_are_written_and_judged(tmp_path: Path) -> None:
    paths = write_report(made_up_report((1,)), tmp_path / "new" / "folder")
    assert {kind: path.name for kind, path in paths.items()} == {
        "html": "report.html",
        "md": "report.md",
        "json": "report.json",
        "csv": "report.csv",
        "recipe": "suggested_recipe.yaml",
    }
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(p.name for p in paths.values())
    assert from_json(paths["json"].read_text()).verdicts


def test_a_failing_write_leaves_the_old_report_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(made_up_report((1,)), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0

    def full_disk(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match=f"(?s){tmp_path}.*No space left.*fix: "):
        write_report(made_up_report((1, 1)), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_run_left_half_written_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *args, **kwargs: None)
        killed.setattr(os, "replace", lambda *args: None)
        write_report(made_up_report((1,)), tmp_path)  # as far as a kill lets it come
    assert list(tmp_path.glob(".*.partial"))
    monkeypatch.setattr("swinq.files._is_running", lambda pid: False)
    write_report(made_up_report((1,)), tmp_path)
    assert not list(tmp_path.glob(".*.partial"))


def test_advice_of_an_earlier_run_does_not_stay(tmp_path: Path) -> None:
    report = made_up_report((1,))
    assert write_report(report, tmp_path)["recipe"].exists()
    report.sensitivity = None
    assert "recipe" not in write_report(report, tmp_path)
    assert not (tmp_path / "suggested_recipe.yaml").exists()


def test_warnings_come_before_every_figure_and_verdict() -> None:
    report = made_up_report((1,))
    report.verdicts, report.warnings = judge(report), ["The images are made up."]
    html, markdown = Page(to_html(report)).text, to_markdown(report)
    for text in (html, markdown):
        assert text.count("The images are made up.") == 1
        assert text.index("The images are made up.") < text.index(report.verdicts[0].text)
    assert html.index("made up.") < html.index("INT8 file")


def test_int8_file_is_held_against_the_checkpoint(whole_page: str) -> None:
    text = " ".join(Page(whole_page).text.split())
    assert "INT8 file28.5 MBagainst 110 MB of the checkpoint" in text


def test_csv_is_one_tidy_table() -> None:
    report = made_up_report((1, 1))
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert tuple(rows[0]) == HEADER and all(None not in row for row in rows)
    figures = {(row["section"], row["name"], row["metric"]): row["value"] for row in rows}
    assert len(figures) == len(rows)
    comparison = report.models[2].comparison
    assert comparison is not None
    difference = figures["accuracy", "INT8 mode 1", "comparison.difference"]
    assert float(difference) == comparison.difference < 0
    assert float(figures["latency", "Float batch 32", "median_ms"]) == 14.2
    name = report.quantizers[0].name
    assert float(figures["quantizer", name, "amax.maximum"]) == report.quantizers[0].amax.maximum


def test_csv_text_is_no_formula() -> None:
    report = made_up_report((1,))
    report.model, report.files[0].path = "=cmd|' /C calc'!A0", "-2+3"
    rows = list(csv.reader(io.StringIO(to_csv(report))))
    for row in rows[1:]:
        for cell in row:
            assert not cell.startswith(("=", "+", "-", "@")) or float(cell) <= 0


def test_markdown_tables_hold_together_and_hostile_names_stay_text() -> None:
    text = to_markdown(evil_report())
    outside = re.sub(r"(?s)^(`{3,})\w+\n.*?\n\1$", "", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<(script|img)", outside)
    for block in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
