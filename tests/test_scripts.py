"""The shell scripts, run in a bare copy of the checkout with a stand-in for .venv's programs."""

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from swinq import cli
from swinq.config import leaves
from swinq.flags import parse

BATCHES = ("CALIB.NUM_BATCHES", 3)
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

# Prints what it was called as and with: stands for python, pip, torchrun and srun.
ECHO = '#!/bin/sh\necho "$(basename "$0") $*"\n'


def program(path: Path, text: str = ECHO) -> None:
    """Write an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts in which .venv holds stand-ins that say how they were called."""
    root = tmp_path / "a checkout"  # people's paths have spaces
    shutil.copytree(SCRIPTS, root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "setup.py").write_text("")
    (root / "constraints.txt").write_text("torch==1\n")
    for name in ("python", "torchrun"):
        program(root / ".venv" / "bin" / name)
    return root


def run(checkout: Path, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script from another folder than its own."""
    return subprocess.run(
        ["bash", str(checkout / "scripts" / script), *args],
        cwd=checkout.parent,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_install_asks_pip_once_and_again_when_the_requirements_change(checkout: Path) -> None:
    first = run(checkout, "install.sh")
    assert "install --constraint constraints.txt --quiet --editable ." in first.stdout
    assert run(checkout, "install.sh").stdout == ""
    (checkout / "constraints.txt").write_text("torch==2\n")
    assert "--editable ." in run(checkout, "install.sh").stdout


def test_install_for_development_serves_the_plain_one_but_not_the_reverse(checkout: Path) -> None:
    run(checkout, "install.sh")
    assert "--editable .[dev]" in run(checkout, "install.sh", "dev").stdout
    assert run(checkout, "install.sh").stdout == ""


def test_install_takes_torch_from_the_index_that_the_user_names(checkout: Path) -> None:
    ran = run(checkout, "install.sh", SWINQ_TORCH_INDEX="https://example.org/cpu")
    torch_line, rest = [line for line in ran.stdout.splitlines() if " install " in line]
    assert torch_line.endswith("--index-url https://example.org/cpu torch torchvision")
    assert "example.org" not in rest


def test_install_that_failed_is_not_taken_for_done(checkout: Path) -> None:
    program(
        checkout / ".venv" / "bin" / "python",
        '#!/bin/sh\ncase "$*" in *--editable*) exit 1;; esac\n',
    )
    failed = run(checkout, "install.sh")
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr
    assert "fix:" in failed.stderr
    assert run(checkout, "install.sh").returncode == 1


def test_install_without_a_usable_python_says_what_to_install(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    ran = run(checkout, "install.sh", SWINQ_PYTHON="python0.1")
    assert ran.returncode == 1
    assert "no Python >= 3.10 found as python0.1" in ran.stderr


def test_demo_runs_the_command_that_the_readme_shows(checkout: Path) -> None:
    ran = run(checkout, "demo.sh")
    assert ran.stdout.splitlines()[-1] == "torchrun swinq/main.py --calib"
    assert ran.returncode == 0


def test_calib_hands_data_checkpoint_and_further_flags_over(checkout: Path) -> None:
    ran = run(checkout, "calib.sh", "/data set", "swin.pth", "--tag", "first", GPUS="8")
    command = ran.stdout.splitlines()[-1]
    assert "--nproc_per_node 8 swinq/main.py --calib" in command
    assert "--data-path /data set --resume swin.pth" in command
    assert command.endswith("--tag first")


@pytest.mark.parametrize(("gpus", "accumulation"), [("1", 8), ("2", 4), ("4", 2), ("8", 1)])
def test_qat_takes_512_images_a_step_on_any_gpus(
    gpus: str, accumulation: int, checkout: Path
) -> None:
    ran = run(checkout, "qat.sh", "images", "swin.pth", "--num-epochs", "3", GPUS=gpus)
    command = ran.stdout.splitlines()[-1]
    assert f"--nproc_per_node {gpus} swinq/main.py --train" in command
    config, _ = cli.resolve(parse(command.split("main.py ")[1].split()))
    assert config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS * int(gpus) == 512
    assert config.TRAIN.ACCUMULATION_STEPS == accumulation
    assert config.QAT.EPOCHS == 3 and config.QAT.DISTILL.ENABLED


@pytest.mark.parametrize(
    ("script", "words", "flags", "key", "becomes"),
    [
        ("calib.sh", ("images", "a.pth"), ("--batch-size", "64"), "DATA.BATCH_SIZE", 64),
        ("calib.sh", ("images", "a.pth"), ("--opts", "CALIB.NUM_BATCHES", "3"), *BATCHES),
        ("eval.sh", ("images", "a.pth"), ("--batch-size", "64"), "DATA.BATCH_SIZE", 64),
        ("qat.sh", ("images", "a.pth"), ("--batch-size", "32"), "DATA.BATCH_SIZE", 32),
        ("export.sh", ("a.safetensors",), ("--int8-mode", "2"), "INT8.MODE", 2),
    ],
)
def test_further_flags_override_what_a_script_sets(
    script: str,
    words: tuple[str, ...],
    flags: tuple[str, ...],
    key: str,
    becomes: int,
    checkout: Path,
) -> None:
    argv = run(checkout, script, *words, *flags).stdout.splitlines()[-1].split("main.py ")[1]
    config, _ = cli.resolve(parse(argv.split()))
    assert dict(leaves(config))[key] == becomes


@pytest.mark.parametrize("script", ["calib.sh", "eval.sh", "export.sh", "qat.sh"])
def test_script_without_its_arguments_says_which(checkout: Path, script: str) -> None:
    ran = run(checkout, script)
    assert ran.returncode != 0
    assert "see the head of this file" in ran.stderr
    assert ran.stdout == ""


def test_export_is_mode_1_unless_told_otherwise(checkout: Path) -> None:
    assert "INT8.MODE 1" in run(checkout, "export.sh", "calibrated.safetensors").stdout
    assert "INT8.MODE 2" in run(checkout, "export.sh", "calibrated.safetensors", MODE="2").stdout


# Tells the nodes, and says what it is asked beyond that.
SCONTROL = """#!/bin/sh
case "$1" in show) printf 'node7\\nnode8\\n' ;; *) echo "scontrol $*" ;; esac
"""


def slurm(checkout: Path, srun: str) -> dict[str, str]:
    """The environment of a SLURM job, with stand-ins for its programs."""
    programs = checkout.parent / "bin"
    program(programs / "srun", srun)
    program(programs / "scontrol", SCONTROL)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "48",
    }


@pytest.mark.parametrize("action", ["calib", "train"])
def test_slurm_job_gives_every_node_the_same_rendezvous(checkout: Path, action: str) -> None:
    script = f"slurm_{action}.sbatch"
    ran = run(checkout, script, "/data/imagenet", "swin.pth", **slurm(checkout, ECHO))
    assert ran.returncode == 0, ran.stderr
    assert "srun --cpus-per-task 48 --kill-on-bad-exit=1 .venv/bin/torchrun" in ran.stdout
    assert "--nnodes 2 --nproc_per_node 4" in ran.stdout
    assert "--rdzv_endpoint node7:23456" in ran.stdout
    assert f"swinq/main.py --{action} --data-path /data/imagenet --resume swin.pth" in ran.stdout
    assert "requeue" not in ran.stdout


@pytest.mark.parametrize(
    ("number", "status", "ending"),
    [
        (signal.SIGUSR1, 1, "scontrol requeue 123456\n"),  # the time is up
        (signal.SIGUSR1, 0, ""),  # but the last step was done
        (signal.SIGTERM, 1, ""),  # preempted: SLURM queues it again
    ],
)
def test_slurm_training_that_must_leave_saves_first(
    checkout: Path, number: int, status: int, ending: str
) -> None:
    srun = f"""#!/bin/sh
    trap 'echo saving; sleep 0.2; exit {status}' {int(number)}
    echo started
    while :; do sleep 0.05; done
    """
    job = subprocess.Popen(
        ["bash", checkout / "scripts" / "slurm_train.sbatch", "/data/imagenet", "swin.pth"],
        env=slurm(checkout, srun),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    job.send_signal(number)
    said, _ = job.communicate(timeout=20)
    assert said == "saving\n" + ending
    assert job.returncode == (0 if ending else status)


def test_slurm_training_that_fails_is_not_queued_again(checkout: Path) -> None:
    failing = slurm(checkout, "#!/bin/sh\nexit 3\n")
    ran = run(checkout, "slurm_train.sbatch", "/data/imagenet", "swin.pth", **failing)
    assert ran.returncode == 3
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "models", "words"),
    [
        ((), "T", "batch is ''"),
        (("many",), "T", "batch is 'many'"),
        (("1", "32"), "T", "'32' is one argument too many"),
        (("1",), "tiny", "SWINQ_MODELS is 'tiny'"),
    ],
)
def test_a_table_of_times_refuses_what_it_would_ignore(
    checkout: Path, arguments: tuple[str, ...], models: str, words: str
) -> None:
    timed = "#!/bin/sh\necho SWINQ-CPP-time 2 ms\n"
    program(checkout / "build" / "kernels" / "swin_example", timed)
    ran = run(checkout, "run_test_v1.sh", *arguments, SWINQ_MODELS=models)
    assert ran.returncode == 2 and words in ran.stderr and "fix: " in ran.stderr
    right = run(checkout, "run_test_v1.sh", "1", SWINQ_MODELS="T")
    assert right.stdout.count("| 2.000 | 500 |") == 2


def test_tests_are_linted_typed_and_covered(checkout: Path) -> None:
    for name in ("ruff", "mypy"):
        program(checkout / ".venv" / "bin" / name)
    lines = run(checkout, "test.sh").stdout.splitlines()
    commands = [line for line in lines if line.startswith(("ruff", "mypy"))]
    assert [line.strip() for line in commands] == ["ruff check .", "ruff format --check .", "mypy"]
    assert "python setup.py --quiet build_ext --inplace" in lines
    assert "-m pytest" in lines[-1]
    assert "--branch-floor 90 --cov" in lines[-1]


def test_some_tests_alone_run_without_lint_and_coverage(checkout: Path) -> None:
    last = run(checkout, "test.sh", "tests/quant", "-x").stdout.splitlines()[-1]
    assert last.endswith("tests/quant -x")
    assert "--cov" not in last


def test_the_tests_of_the_engine_run_where_it_was_built(checkout: Path) -> None:
    program(checkout / "build" / "kernels" / "engine_test", "#!/bin/sh\nexit 3\n")
    ran = run(checkout, "test.sh")
    assert ran.returncode != 0
    assert "-m pytest" not in ran.stdout


def test_a_failed_lint_fails_the_whole_command(checkout: Path) -> None:
    program(checkout / ".venv" / "bin" / "ruff", "#!/bin/sh\nexit 1\n")
    ran = run(checkout, "test.sh")
    assert ran.returncode == 1
    assert "-m pytest" not in ran.stdout
