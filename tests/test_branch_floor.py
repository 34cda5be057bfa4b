"""The coverage plugin: too few branches fail the run, enough of them let it pass and are named."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]

CODE = '"""Half."""\n\n\ndef half(x):\n    if x:\n        return 1\n    return 2\n'
TEST = "import half\n\n\ndef test_half():\n    assert half.half(1) == 1\n"


@pytest.mark.parametrize(
    ("floor", "code", "verdict"), [("51", 1, "is NOT reached"), ("50", 0, "is reached")]
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_is_judged_by_its_branches(
    tmp_path: Path, floor: str, code: int, verdict: str, workers: str
) -> None:
    (tmp_path / "half.py").write_text(CODE)
    (tmp_path / "test_half.py").write_text(TEST)
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.coverage.run]\nbranch = true\nsource = ["."]\nomit = ["test_*"]\n'
        f'[tool.pytest.ini_options]\npythonpath = [".", "{REPO_ROOT}"]\n'
    )
    command = [sys.executable, "-m", "pytest", "-n", workers, "-p", "tests.branch_floor"]
    ran = subprocess.run(
        [*command, "--branch-floor", floor, "--cov", "--cov-report", "term"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert f"branches taken: 1 of 2, 50.00 %; the floor of {floor} % {verdict}" in ran.stdout
    assert ran.stdout.splitlines()[-1].strip("= ").startswith("1 passed")
