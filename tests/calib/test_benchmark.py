"""The benchmark of calibration runs on the shipped micro-Swin and saves what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_measures_and_saves(repo_root: Path, tmp_path: Path) -> None:
    checkpoint = repo_root / "swinq" / "demo" / "micro_swin_digits.safetensors"
    sizes = ("--images", "9", "--batch", "2", "--repeats", "1", "--modelopt-quantizers", "1")
    command = [sys.executable, "-W", "ignore", "scripts/benchmark_calibration.py", *sizes]
    command += ["--checkpoint", str(checkpoint), "--json", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "collecting histograms" in ran.stdout and "entropy search" in ran.stdout
    (saved,) = tmp_path.glob("calibration-*.json")
    results = json.loads(saved.read_text())
    assert results["command"].startswith("python scripts/benchmark_calibration.py")
    assert results["collecting"]["images"] == 9 and results["collecting"]["ratio_to_plain"] > 0
    assert results["searching"]["quantizers"] > 0
    assert set(results["searching"]["seconds"]) == {"percentile", "mse", "entropy"}
    assert results["machine"]["cpu"] and results["versions"]["torch"]
