"""torchrun: ranks share the work, and what they write does not tell how many there were."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinq.demo.checkpoint import CHECKPOINT
from swinq.report.schema import from_json
from tests.commands.command_line import done, tensors_of, write_digits
from tests.commands.conftest import Demo
from tests.threads import threads_of_torch
from tests.train.ranks import free_port

ROOT = Path(__file__).parents[2]
FILES = ("calib", "int8_mode1", "int8_mode2")
CALIB = ("--calib", "--sensitivity-images", "0", "--opts", "REPORT.TENSORBOARD", "false")


MAIN = ROOT / "swinq" / "main.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def torchrun(ranks: int, *argv: object) -> subprocess.CompletedProcess[str]:
    """The command that a user types, from another folder than the checkout."""
    return launched(ranks, MAIN, *argv, cwd=ROOT.parent)


def launched(
    ranks: int, program: Path, *argv: object, cwd: Path
) -> subprocess.CompletedProcess[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks)
    return subprocess.run(
        [str(word) for word in (sys.executable, *launch, program, *argv)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo calibrated by one process on 3 batches of 5 digits; sums of floats in one thread."""
    output = tmp_path_factory.mktemp("alone")
    with threads_of_torch(1):
        done(*CALIB, "--output", output, "--num-calib-batch", "3", "--calib-batchsz", "5")
    yield output / "micro_swin_digits" / "default"


def check_same(first: Path, second: Path) -> None:
    """Two runs left the same tensors and the same scores."""
    for kind in FILES:
        name = f"micro_swin_digits_{kind}.safetensors"
        ours, theirs = tensors_of(first / name), tensors_of(second / name)
        assert ours.keys() == theirs.keys()
        # bytes: the ranges of quantizers that no mode uses are NaN
        different = [n for n in ours if ours[n].numpy().tobytes() != theirs[n].numpy().tobytes()]
        assert different == []
        assert (first / name).read_bytes() == (second / name).read_bytes()  # metadata too
    reports = [from_json((folder / "report.json").read_text()) for folder in (first, second)]
    assert reports[0].models == reports[1].models
    assert reports[0].quantizers == reports[1].quantizers
    assert reports[0].data == reports[1].data


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_calibrate_to_the_bits_of_one_process(
    ranks: int, alone: Path, tmp_path: Path
) -> None:
    ran = torchrun(
        *(ranks, *CALIB, "--output", tmp_path, "--num-calib-batch", "3", "--calib-batchsz", "5"),
    )
    assert ran.returncode == 0, ran.stderr
    assert "15 images of scikit-learn's handwritten digits, train" in ran.stdout
    assert f"{ranks} rank(s)" in ran.stdout
    assert ran.stdout.count("report: ") == 1  # rank 0 speaks, alone
    folder = tmp_path / "micro_swin_digits" / "default"
    check_same(alone, folder)
    report = from_json((folder / "report.json").read_text())
    assert report.run.environment.ranks == ranks
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("batches", [(1, 15), (15, 1)])
def test_how_images_are_put_into_batches_changes_no_bit(
    batches: tuple[int, int], alone: Path, tmp_path: Path, single_thread: None
) -> None:
    count, size = batches
    done(*CALIB, "--output", tmp_path, "--num-calib-batch", count, "--calib-batchsz", size)
    check_same(alone, tmp_path / "micro_swin_digits" / "default")


def test_ranks_that_do_not_divide_the_images_score_like_one_process(
    demo: Demo, tmp_path: Path
) -> None:
    file = demo.checkpoint("int8_mode1")
    argv = ("--eval", "--resume", file, "--data-path", "digits", "--batch-size", "50")
    done(*argv, "--workers", "0", "--output", tmp_path / "1")
    ran = torchrun(3, *argv, "--workers", "0", "--output", tmp_path / "3")
    assert ran.returncode == 0, ran.stderr
    saved = [
        json.loads(
            (tmp_path / ranks / file.stem / "default" / f"eval_{file.stem}.json").read_text()
        )
        for ranks in "13"
    ]
    assert saved[0] == saved[1]
    assert saved[0]["results"][0]["images"] == 355


TRAIN = (
    *("--train", "--cfg", "demo", "--data-path", "fake:32", "--device", "cpu", "--distill"),
    *("--batch-size", "4", "--num-epochs", "2", "--num-calib-batch", "2", "--calib-batchsz", "8"),
    *("--workers", "0", "--sensitivity-images", "0", "--opts", "REPORT.TENSORBOARD", "false"),
)


@pytest.mark.slow
@pytest.mark.parametrize("meeting", ["c10d", "static"])
def test_two_nodes_train_to_the_bits_of_one(meeting: str, tmp_path: Path) -> None:
    """Started by hand: a torchrun on each node, and an output that they share."""
    ran = torchrun(2, *TRAIN, "--output", tmp_path / "one")
    assert ran.returncode == 0, ran.stderr
    port = free_port()
    nodes = []
    for rank in range(2):
        if meeting == "c10d":
            where = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}")
        else:
            where = ("--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
        launch = ("-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, *where)
        command = (sys.executable, *launch, MAIN, *TRAIN, "--output", tmp_path / "two")
        nodes.append(
            subprocess.Popen(
                [str(word) for word in command],
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [node.communicate(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # a torchrun that is killed leaves its ranks
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(out.count("report: ") for out, _ in said) == 1  # rank 0 speaks, alone

    one, two = (tmp_path / name / "micro_swin_digits" / "qat" for name in ("one", "two"))
    files = [{str(p.relative_to(f)) for p in f.rglob("*.safetensors")} for f in (one, two)]
    assert files[0] == files[1] and len(files[0]) > 3
    for name in files[0]:
        ours, theirs = tensors_of(one / name), tensors_of(two / name)
        assert ours.keys() == theirs.keys()
        assert [n for n in ours if ours[n].numpy().tobytes() != theirs[n].numpy().tobytes()] == []
    reports = [from_json((folder / "report.json").read_text()) for folder in (one, two)]
    assert reports[0].models == reports[1].models
    assert "torchrun --nnodes 2 swinq/main.py" in reports[1].run.command


APART = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
os.chdir(os.environ["RANK"])
from swinq.cli import main
sys.exit(main())
"""


def test_ranks_with_other_images_or_outputs_are_refused(tmp_path: Path) -> None:
    """As on two nodes that share no disk: each rank has a folder of its own."""
    for rank in "01":
        write_digits(tmp_path / rank / "images")
    program = tmp_path / "apart.py"
    program.write_text(APART)
    command = (ROOT, "--calib", "--resume", CHECKPOINT, "--data-path", "images", "--workers", "0")
    ran = launched(2, program, *command, "--output", "out", cwd=tmp_path)
    assert ran.returncode != 0
    assert "rank 1 of 2 on " in ran.stderr and "has other bytes at out" in ran.stderr
    assert "disk that all nodes share" in ran.stderr

    next((tmp_path / "1" / "images" / "train" / "7").iterdir()).unlink()
    ran = launched(2, program, *command, "--output", tmp_path / "out", cwd=tmp_path)
    assert ran.returncode != 0
    assert "has other train images at --data-path images (19 here) than rank 0" in ran.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_damaged_image_of_one_rank_ends_all_of_them_with_its_name(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images")
    bad = sorted((images / "train" / "7").iterdir())[0]
    bad.write_bytes(b"no image")
    ran = torchrun(
        *(2, "--calib", "--resume", CHECKPOINT, "--data-path", images, "--workers", "0"),
        *("--num-calib-batch", "4", "--calib-batchsz", "5", "--output", tmp_path / "out"),
    )
    assert ran.returncode != 0
    assert f"train/7/{bad.name}: not an image in a known format" in ran.stderr
    assert "never skipped or replaced silently" in ran.stderr
    assert "swinq/commands" not in ran.stderr  # no traceback through our code
    assert not list((tmp_path / "out").rglob("*.safetensors"))
