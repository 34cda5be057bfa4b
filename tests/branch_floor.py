"""A pytest plugin: reports the share of branches that the tests take, and fails below a floor.

pytest-cov's own floor mixes lines and branches; lines alone would carry it.

    pytest -p tests.branch_floor --branch-floor 90 --cov
"""

import json
import tempfile
from collections.abc import Generator
from pathlib import Path

import coverage
import pytest

_LINE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--branch-floor PERCENT`."""
    parser.addoption("--branch-floor", type=float, default=0.0, metavar="PERCENT")


def branches(totals: dict[str, int]) -> float:
    """Percentage of branches taken, 100 where there are none."""
    return 100.0 * totals["covered_branches"] / max(totals["num_branches"], 1)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: pytest-cov has written its data inside
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """After the last test, hold the branches that were taken against the floor."""
    result = yield
    config = session.config
    floor = config.getoption("--branch-floor")
    if floor <= 0 or hasattr(config, "workerinput"):  # xdist's workers see a part only
        return result
    data = coverage.Coverage()
    data.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "coverage.json")
        data.json_report(outfile=str(report))
        totals = json.loads(report.read_text())["totals"]
    share = branches(totals)
    verdict = "reached" if share >= floor else "NOT reached"
    config.stash[_LINE] = (
        f"branches taken: {totals['covered_branches']:,} of {totals['num_branches']:,}, "
        f"{share:.2f} %; the floor of {floor:g} % is {verdict}"
    )
    if share < floor:
        session.testsfailed += 1
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the share below the coverage table."""
    line = terminalreporter.config.stash.get(_LINE, "")
    if line:
        terminalreporter.write_line(line)
