"""The training benchmark runs, and its file says what was measured, on what and how."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_times_every_job_and_writes_its_command(
    tmp_path: Path, repo_root: Path
) -> None:
    sizes = ["--batch", "1", "--steps", "1", "--rounds", "2", "--device", "cpu", "--eager"]
    command = [sys.executable, "-W", "ignore", "scripts/benchmark_training.py", *sizes]
    ran = subprocess.run(
        [*command, "--distill", "--features", "1", "--json", str(tmp_path)],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert results["command"].startswith("python scripts/benchmark_training.py")
    assert list(results["jobs"]) == ["float", "QAT", "QAT distilled"]
    for job in results["jobs"].values():
        assert len(job["ms_per_step_all"]) == 2 and job["images_per_second"] > 0
    kept = {name: job["kept_bytes"] for name, job in results["jobs"].items()}
    assert kept["float"] < kept["QAT"] < 1.1 * kept["float"] < kept["QAT distilled"]
