"""Mistakes at the command line: each ends in a short error with the value and the fix."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from swinq import cli, preflight
from swinq.models import containers

TINY = "swin_tiny_patch4_window7_224"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a little data set, a good and a damaged checkpoint."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        (tmp_path / "images" / split / "cat" / "1.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/data/0", b"1234")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-30])
    (tmp_path / "note.txt").write_text("hello")
    return tmp_path


def safetensors(path: Path, metadata: dict[str, str], cut: int = 0) -> str:
    """A safetensors file of one tensor, written by hand."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": metadata, "head.bias": entry}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(8)
    path.write_bytes(whole[: len(whole) - cut])
    return path.name


MODEL = ("--resume", "model.pth")
READY = ("--calib", *MODEL, "--data-path", "images", "--device", "cpu")
TRAIN = ("--train", *READY[1:])

# What a user types -> what the message must hold: the value, and a word of the fix
MISTAKES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no action": ((), "no action", "--calib"),
    "no action but a model": (("--cfg", TINY), "no action", "--calib"),
    "two actions": (("--calib", "--eval"), "--calib and --eval", "--calib first"),
    "training with an action": (("--calib", "--train"), "--calib and --train", "--calib first"),
    "no epochs": ((*TRAIN, "--num-epochs", "0"), "'0'", "--num-epochs 2"),
    "a rate of 0": ((*TRAIN, "--qat-lr", "0"), "'0'", "above 0"),
    "a rate as a word": ((*TRAIN, "--qat-lr", "low"), "'low'", "--qat-lr 1e-05"),
    "half a step": ((*TRAIN, "--accumulation-steps", "0.5"), "'0.5'", "an integer"),
    "another optimizer": ((*TRAIN, "--optim", "sgd"), "'sgd'", "--optim adamw"),
    "another optimizer in a file": (
        (*TRAIN, "--opts", "TRAIN.OPTIMIZER.NAME", "sgd"),
        "sgd (--opts)",
        "--optim adamw",
    ),
    "an unknown AMP type": ((*TRAIN, "--amp-type", "fp8"), "'fp8'", "--amp-type bf16"),
    "a scale without distillation": (
        (*TRAIN, "--distillation-loss-scale", "2"),
        "--distillation-loss-scale",
        "add --distill",
    ),
    "a teacher that is not listened to": (
        (*TRAIN, "--distill", "--distillation-loss-scale", "0"),
        "--distillation-loss-scale 0",
        "--distillation-loss-scale 1",
    ),
    "no loss at all": (
        (*TRAIN, "--distill", "--opts", "QAT.DISTILL.SCALE", "0", "QAT.DISTILL.LABEL_SCALE", "0"),
        "QAT.DISTILL.SCALE 0.0 (--opts)",
        "--distillation-loss-scale 1",
    ),
    "a teacher without distillation": (
        (*TRAIN, "--opts", "QAT.DISTILL.ENABLED", "false", "--teacher", "t.pth"),
        "--teacher t.pth is given, but nothing is distilled: QAT.DISTILL.ENABLED False (--opts)",
        "add --distill, or leave it out",
    ),
    "an AMP type without AMP": (
        (*TRAIN, "--disable-amp", "--amp-type", "fp16"),
        "--amp-type fp16 is given, but --disable-amp",
        "leave one of them out",
    ),
    "graphs of recomputed activations": (
        (*TRAIN, "--use-checkpoint", "--opts", "QAT.CUDA_GRAPHS", "true"),
        "QAT.CUDA_GRAPHS True (--opts) is given, but --use-checkpoint",
        "leave one of them out",
    ),
    "graphs of what is not compiled": (
        (*TRAIN, "--opts", "QAT.CUDA_GRAPHS", "true", "QAT.COMPILE", "no"),
        "but QAT.COMPILE no (--opts)",
        "leave one of them out",
    ),
    "graphs of a sharded model": (
        (*TRAIN, "--opts", "QAT.CUDA_GRAPHS", "true", "QAT.PARALLEL", "fsdp"),
        "but QAT.PARALLEL fsdp (--opts)",
        "leave one of them out",
    ),
    "a schedule from scratch": (
        (*TRAIN, "--opts", "TRAIN.BASE_LR", "1e-5"),
        "TRAIN.BASE_LR belongs to training from scratch",
        "QAT.LR",
    ),
    "an unknown kind of range": (
        (*TRAIN, "--opts", "QAT.LEARN_RANGES", "[outputs]"),
        "outputs",
        "probabilities",
    ),
    "training without images": (("--train", *MODEL), "model.pth", "--data-path"),
    "training without weights": (("--train", "--cfg", TINY), TINY, "--resume"),
    "the ancestor's apex": (("--eval", "--amp-opt-level", "O1"), "Apex", "--amp-type"),
    "the ancestor's kernels": (("--train", "--fused-layernorm"), "--fused-layernorm", "leave it"),
    "the ancestor's quantizer": (("--calib", "--quant-per-tensor"), "recipe", "fastertransformer"),
    "the ancestor's engine": (("--eval", "--th-path", "x.so"), "--th-path", "leave it out"),
    "an engine by its file": (("--eval", "--engine", "x.so"), "'x.so'", "--engine auto"),
    "a typing error": (("--calib", "--percentil", "9"), "--percentil", "mean --percentile?"),
    "an abbreviation": (("--calib", "--num-calib", "9"), "--num-calib", "--num-calib-batch?"),
    "words run together": (("--calib", "--int8mode", "1"), "--int8mode", "mean --int8-mode?"),
    "one hyphen": (("--calib", "-cfg", "x"), "-cfg", "mean --cfg?"),
    "nothing like it": (("--calib", "--xyzzy"), "--xyzzy", "--help"),
    "torchrun's flag": (("--calib", "--nproc_per_node", "2"), "--nproc_per_node", "before the"),
    "a word too many": (("--calib", "--cfg", TINY, "oops"), "'oops'", "--resume"),
    "a switch with a value": (("--calib", "--zip=yes"), "yes", "--help"),
    "a flag without a value": (("--calib", "--cfg"), "--cfg", "--help"),
    "a flag twice": (("--eval", "--int8-mode", "1", "--int8_mode", "2"), "2 times", "one of"),
    "an unset variable": (("--calib", "--data-path", ""), "--data-path is empty", "variable"),
    "the program's version": (("--eval", "--version"), "--version", "--version 1"),
    "mode 3": ((*READY, "--int8-mode", "3"), "'3'", "--int8-mode 1"),
    "mode 0": ((*READY, "--int8-mode", "0"), "'0'", "1 or 2"),
    "version 3": ((*READY, "--version", "3"), "'3'", "--version 1"),
    "percentile 0": ((*READY, "--percentile", "0"), "'0'", "--percentile 99.99"),
    "percentile 101": ((*READY, "--percentile", "101"), "'101'", "--percentile 99.99"),
    "percentile as a word": ((*READY, "--percentile", "most"), "'most'", "a number"),
    "no batches": ((*READY, "--num-calib-batch", "0"), "'0'", "--num-calib-batch 10"),
    "half a batch": ((*READY, "--calib-batchsz", "2.5"), "'2.5'", "--calib-batchsz 8"),
    "an unknown method": ((*READY, "--calibrator", "median"), "'median'", "entropy"),
    "an unknown cache": ((*READY, "--cache-mode", "all"), "'all'", "part"),
    "an unknown transform": ((*READY, "--eval-transform", "crop"), "'crop'", "official"),
    "an unknown device": ((*READY[:-1], "gpu"), "'gpu'", "--device auto"),
    "a negative seed": ((*READY, "--seed", "-1"), "'-1'", "at least 0"),
    "a tag that is a path": ((*READY, "--tag", "a/b"), "'a/b'", "without slashes"),
    "percentile without percentile": (
        (*READY, "--calibrator", "mse", "--percentile", "99.9"),
        "99.9",
        "--calibrator percentile",
    ),
    "an unknown key": ((*READY, "--opts", "CALIB.SEEDS", "1"), "CALIB.SEEDS", "CALIB.SEED?"),
    "a section as a key": ((*READY, "--opts", "CALIB", "1"), "CALIB", "CALIB.NUM_BATCHES"),
    "a key without a value": ((*READY, "--opts", "TAG"), "'TAG'", "pairs"),
    "opts without anything": ((*READY, "--opts"), "--opts", "--help"),
    "a key's type": ((*READY, "--opts", "DATA.IMG_SIZE", "big"), "'big'", "DATA.IMG_SIZE 224"),
    "an unknown model": (("--eval", "--cfg", "swin_tini"), "'swin_tini'", "--cfg takes"),
    "a misspelled model": (("--eval", "--cfg", TINY + "2"), TINY + "2", f"mean {TINY}?"),
    "a folder as a model": (("--eval", "--cfg", "images"), "'images'", "takes a file"),
    "a checkpoint as a model": (("--eval", "--cfg", "model.pth"), "model.pth", "--resume"),
    "an unknown recipe": ((*READY, "--recipe", "xyzzy"), "'xyzzy'", "--recipe takes"),
    "a model without weights": (("--eval", "--cfg", TINY), TINY, "--resume"),
    "weights without images": (("--eval", *MODEL), "model.pth", "--data-path"),
    "images without a model": (("--eval", "--data-path", "images"), "'images'", "--resume"),
    "two checkpoints": ((*READY, "--pretrained", "b.pth"), "b.pth", "keep --resume"),
    "pretrained without a model": (
        ("--eval", "--pretrained", "a.pth", "--data-path", "images"),
        "a.pth",
        "--cfg",
    ),
    "the other version": ((*READY, "--cfg", TINY, "--version", "2"), "swinv2", "leave --version"),
    "a zip of digits": (("--calib", "--zip"), "--zip", "leave it out"),
    "a local rank as a word": ((*READY, "--local-rank", "x"), "'x'", "--local-rank 0"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_a_short_named_error(
    mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, value, fix = MISTAKES[mistake]
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert value in message
    assert fix in message.partition("fix: ")[2] or fix in message
    assert "fix: " in message
    assert len(message.splitlines()) <= 10
    assert "Traceback" not in message


# What is wrong with the machine rather than with the words -> value and fix in the checklist
DRY_MISTAKES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no checkpoint": (("--resume", "absent.pth"), "absent.pth", "check --resume"),
    "a folder as a checkpoint": (("--resume", "images"), "images is a folder", "name the file"),
    "a cut checkpoint": (("--resume", "cut.pth"), "cut.pth", "copy it again"),
    "a text as a checkpoint": (("--resume", "note.txt"), "note.txt (5 bytes)", "copy it again"),
    "a zip as a checkpoint": (("--resume", "other.zip"), "other.zip", "--data-path"),
    "an old checkpoint": (("--resume", "old.pth"), "before 1.6", "torch.save"),
    "a cut safetensors": (("--resume", "cut.safetensors"), "cut.safetensors", "again"),
    "a garbled safetensors": (("--resume", "bad.safetensors"), "bad.safetensors", "again"),
    "evaluating the other int8 mode": (
        ("--resume", "int8.safetensors", "--int8-mode", "2"),
        "int8_mode 1",
        "--int8-mode 1",
    ),
    "an int8 checkpoint": (("--resume", "int8.safetensors"), "is an exported INT8", "made from"),
    "exporting a float checkpoint": (
        ("--resume", "float.safetensors"),
        "float.safetensors is not a calibrated checkpoint",
        "--calib --resume",
    ),
    "training with an int8 teacher": (
        ("--teacher", "int8.safetensors"),
        "is an exported INT8",
        "made from",
    ),
    "an empty split": (("--data-path", "hollow"), "hollow/train has no class", "<class>/<image>"),
    "no data": (("--data-path", "absent"), "absent", "check the path"),
    "an empty folder": (("--data-path", "empty"), "empty has neither", "train/<class>"),
    "a zip beside": (("--data-path", "zips"), "zips has neither", "zips/some.zip"),
    "no mapped zip": (("--zip",), "train.zip", "leave --zip out"),
    "a text as data": (("--data-path", "note.txt"), "note.txt", "a zip of images"),
    "a file in the way of output": (("--output", "note.txt/x"), "note.txt/x", "--output"),
    "an unwritable output": (("--output", "/proc/swinq"), "/proc/swinq", "another folder"),
    "an unwritable checkpoint folder": (
        ("--calib-output-path", "/proc/swinq"),
        "/proc/swinq",
        "--calib-output-path",
    ),
    "a window that does not fit": (
        ("--cfg", TINY, "--opts", "MODEL.SWIN.WINDOW_SIZE", "6"),
        "window_size 6",
        "img_size",
    ),
    "a full disk": ((), "1.0 MB free", "free some space"),
    "training without a teacher": (("--teacher", "absent.pth"), "absent.pth", "check --teacher"),
    "training on loose images": (
        ("--data-path", "images/val/cat"),
        "has neither train/",
        "train/<class>/<image>",
    ),
    "training on a full disk": (("--resume", "large.pth"), "about 270.0 MB", "free some space"),
}


@pytest.mark.parametrize("mistake", DRY_MISTAKES)
def test_a_dry_run_names_what_is_wrong_with_the_machine(
    mistake: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv, value, fix = DRY_MISTAKES[mistake]
    if "/proc/swinq" in argv and sys.platform != "linux":
        pytest.skip("wants a folder that even root cannot write to")
    (folder / "empty").mkdir()
    (folder / "hollow" / "train").mkdir(parents=True)
    (folder / "hollow" / "val").mkdir()
    (folder / "zips").mkdir()
    (folder / "zips" / "some.zip").write_bytes(b"")
    (folder / "old.pth").write_bytes(b"\x80\x02}q\x00.")
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("train/cat/1.png", b"")
    safetensors(folder / "cut.safetensors", {}, cut=3)
    (folder / "bad.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")
    safetensors(folder / "int8.safetensors", {"format": "swinq-int8", "int8_mode": "1"})
    safetensors(folder / "float.safetensors", {})
    with zipfile.ZipFile(folder / "large.pth", "w") as archive:
        archive.writestr("model/data.pkl", bytes(30_000_000))
    free = {"a full disk": 10**6, "training on a full disk": 200 * 10**6}.get(mistake)
    if free:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    actions = {"training": "--train", "exporting": "--export", "evaluating": "--eval"}
    action = actions.get(mistake.partition(" ")[0], "--calib")
    given = dict(zip(READY[1::2], READY[2::2], strict=True))
    rest = [word for flag, text in given.items() if flag not in argv for word in (flag, text)]
    before = sorted(folder.rglob("*"))
    assert cli.main([action, *rest, *argv, "--dry-run"]) == 2
    told = capsys.readouterr().out.partition("  FAIL  ")[2]
    assert value in told and fix in told and "fix: " in told
    assert "checks failed" in told
    assert len(told.splitlines()) <= 10 and "Traceback" not in told
    assert sorted(folder.rglob("*")) == before  # nothing made, nothing left behind


@pytest.mark.parametrize(
    "extra",
    [(), ("--data-path", "images/val/cat"), ("--data-path", "fake:8"), ("--cfg", TINY)],
    ids=["folders", "flat folder", "fake", "named model"],
)
def test_a_dry_run_passes_what_is_right(
    extra: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = READY if "--data-path" not in extra else ("--calib", *MODEL, "--device", "cpu")
    before = sorted(folder.rglob("*"))
    assert cli.main([*given, *extra, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "checks passed; nothing was done" in out and "1 tensors" in out
    assert sorted(folder.rglob("*")) == before


def test_a_dry_run_reads_the_header_of_an_int8_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = safetensors(folder / "int8.safetensors", {"format": "swinq-int8", "int8_mode": "2"})
    argv = ["--eval", "--resume", name, "--data-path", "images", "--device", "cpu", "--dry-run"]
    assert cli.main([*argv, "--int8-mode", "2"]) == 0
    assert "INT8 mode 2, 1 tensors" in capsys.readouterr().out


def test_a_dry_run_finds_the_checkpoint_in_a_hub_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "hub").mkdir()
    argv = ["--calib", "--resume", "hub", "--data-path", "images", "--device", "cpu", "--dry-run"]
    assert cli.main(argv) == 2
    assert "hub is a folder without model.safetensors" in capsys.readouterr().out
    safetensors(folder / "hub" / "model.safetensors", {})
    assert cli.main(argv) == 0
    assert "model.safetensors, safetensors, 1 tensors" in capsys.readouterr().out
    assert preflight.FOLDER_FILES == containers.FOLDER_FILES


def test_a_dry_run_imports_no_torch_for_the_cpu(folder: Path, repo_root: Path) -> None:
    program = (
        "import sys; from swinq.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'timm', 'torchvision'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *READY, "--dry-run"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
