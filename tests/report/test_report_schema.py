"""Reports survive JSON whole; anything else is refused by name."""

import json
import math

import pytest

from swinq.errors import DataError
from swinq.report.schema import SCHEMA_VERSION, LayerErrorRow, from_json, to_json
from tests.report.sample import made_up_report, trained_report


def test_a_report_survives_json_whole() -> None:
    report = made_up_report()
    report.layer_errors.append(
        LayerErrorRow("exact", math.inf, -math.inf, math.inf, math.inf, 3, 0)
    )
    assert from_json(to_json(report)) == report
    assert from_json(to_json(trained_report())) == trained_report()


def test_json_is_strict_and_has_a_schema_version() -> None:
    report = made_up_report()
    report.layer_errors[0].total = math.inf

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    plain = json.loads(to_json(report), parse_constant=refuse)
    assert plain["schema_version"] == SCHEMA_VERSION == "3"
    assert plain["layer_errors"][0]["total"] == "inf"


def test_equal_reports_give_equal_json() -> None:
    assert to_json(made_up_report()) == to_json(made_up_report())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": "1"}, "schema version '1'"),
        ({"surprise": 1}, "report: missing or unknown surprise"),
        ({"model": 3}, "report.model is 3"),
        ({"warnings": [None]}, r"report.warnings\[0\] is None"),
        ({"latency": [{}]}, r"report.latency\[0\]: missing or unknown"),
        ({"run": []}, "report.run is \\[\\]"),
        ({"verdicts": [{"subject": "weather", "level": "good", "text": ""}]}, "weather"),
    ],
)
def test_a_wrong_report_is_refused_by_name(change: dict[str, object], named: str) -> None:
    content = json.loads(to_json(made_up_report()))
    with pytest.raises(DataError, match=named):
        from_json(json.dumps({**content, **change}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": 1}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        from_json(text)
