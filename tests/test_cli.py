"""The command line: flags mean what they say, and every mistake ends in a short, named error."""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from swinq import cli, config_files, flags
from swinq.config import Config
from swinq.errors import SwinqError

TINY = "swin_tiny_patch4_window7_224"


def resolved(*argv: str) -> Config:
    return cli.resolve(flags.parse(argv))[0]


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

# What a user types -> what the message must hold: the value, and a word of the fix
MISTAKES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no action": ((), "no action", "--calib"),
    "no action but a model": (("--cfg", TINY), "no action", "--calib"),
    "two actions": (("--calib", "--eval"), "--calib and --eval", "--calib first"),
    "training": (("--train",), "--train", "--calib"),
    "training with an action": (("--calib", "--train"), "--train", "--calib"),
    "a training flag": (("--calib", "--qat-lr", "1e-5"), "--qat-lr", "leave it out"),
    "a training flag, underscored": (("--calib", "--num_epochs=5"), "--num_epochs", "leave it"),
    "distillation": (("--calib", "--distill", "--teacher", "x.pth"), "--distill", "--train"),
    "the ancestor's apex": (("--eval", "--amp-opt-level", "O1"), "--amp-opt-level", "--train"),
    "the ancestor's quantizer": (("--calib", "--quant-per-tensor"), "recipe", "fastertransformer"),
    "the ancestor's engine": (("--eval", "--engine", "x.so"), "--engine", "leave it out"),
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
    "an unknown recipe": ((*READY, "--recipe", "int9"), "'int9'", "--recipe takes"),
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
    "the other int8 mode": (
        ("--resume", "int8.safetensors", "--int8-mode", "2"),
        "int8_mode 1",
        "--int8-mode 1",
    ),
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
    (folder / "zips").mkdir()
    (folder / "zips" / "some.zip").write_bytes(b"")
    (folder / "old.pth").write_bytes(b"\x80\x02}q\x00.")
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("train/cat/1.png", b"")
    safetensors(folder / "cut.safetensors", {}, cut=3)
    (folder / "bad.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")
    safetensors(folder / "int8.safetensors", {"format": "swinq-int8", "int8_mode": "1"})
    if mistake == "a full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    given = dict(zip(READY[1::2], READY[2::2], strict=True))
    rest = [word for flag, text in given.items() if flag not in argv for word in (flag, text)]
    before = sorted(folder.rglob("*"))
    assert cli.main(["--calib", *rest, *argv, "--dry-run"]) == 2
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


def test_without_arguments_calib_is_the_demo() -> None:
    config = resolved("--calib")
    assert config.DEMO and config.DATA.DATA_PATH == "digits"
    assert config.MODEL.NAME == "micro_swin_digits"
    assert resolved("--calib", "--opts", "CALIB.SEED", "3").DEMO
    assert resolved("--eval", "--cfg", "demo").DEMO


def test_naming_anything_leaves_the_demo() -> None:
    config = resolved("--calib", *MODEL, "--data-path", "digits")
    assert not config.DEMO and "MODEL.TYPE" not in config.origins
    assert not resolved("--eval", "--opts", "MODEL.RESUME", "a", "DATA.DATA_PATH", "fake").DEMO
    assert not resolved("--throughput", "--cfg", TINY).DEMO  # random weights tell the time as well


def test_flags_reach_their_keys_with_their_origin() -> None:
    words = {
        "--batch-size": ("16", "DATA.BATCH_SIZE", 16),
        "--cache-mode": ("no", "DATA.CACHE_MODE", "no"),
        "--calib-batchsz": ("4", "CALIB.BATCH_SIZE", 4),
        "--calib-output-path": ("out", "CALIB.OUTPUT_PATH", "out"),
        "--calibrator": ("percentile", "CALIB.METHOD", "percentile"),
        "--data-path": ("images", "DATA.DATA_PATH", "images"),
        "--device": ("cpu", "DEVICE", "cpu"),
        "--eval-transform": ("timm", "EVAL.TRANSFORM", "timm"),
        "--int8-mode": ("2", "INT8.MODE", 2),
        "--num-calib-batch": ("3", "CALIB.NUM_BATCHES", 3),
        "--output": ("out", "OUTPUT", "out"),
        "--percentile": ("99.5", "CALIB.PERCENTILE", 99.5),
        "--resume": ("model.pth", "MODEL.RESUME", "model.pth"),
        "--seed": ("7", "CALIB.SEED", 7),
        "--sensitivity-images": ("0", "REPORT.SENSITIVITY_IMAGES", 0),
        "--tag": ("224", "TAG", "224"),
        "--version": ("1", "MODEL.VERSION", 1),
        "--workers": ("-1", "DATA.NUM_WORKERS", -1),
    }
    argv = [word for flag, (text, _, _) in words.items() for word in (flag, text)]
    config = resolved("--calib", "--zip", *argv)
    for flag, (_, key, value) in words.items():
        node: object = config
        for part in key.split("."):
            node = getattr(node, part)
        assert node == value, flag
        assert config.origins[key] == flag
    assert config.DATA.ZIP_MODE is True and config.SEED == 7
    keyed = {f"--{flag.name}" for flag in flags.FLAGS.values() if flag.keys}
    assert keyed == {*words, "--zip", "--pretrained"}


def test_underscores_and_equals_signs_mean_the_same() -> None:
    one = resolved("--calib", *MODEL, "--data-path", "images", "--num-calib-batch", "3")
    two = resolved("--calib", "--resume=model.pth", "--data_path=images", "--num_calib_batch=3")
    assert one == two


def test_flags_win_over_opts_over_recipe_over_file(tmp_path: Path) -> None:
    cfg, recipe = tmp_path / "cfg.yaml", tmp_path / "mine.yaml"
    same = "{SEED: 1, NUM_BATCHES: 1, BATCH_SIZE: 1, METHOD: mse}"
    cfg.write_text(f"MODEL: {{RESUME: m.pth}}\nDATA: {{DATA_PATH: fake}}\nCALIB: {same}")
    recipe.write_text("QUANT: {}\nCALIB: {NUM_BATCHES: 2, BATCH_SIZE: 2, METHOD: max}")
    opts = ("--opts", "CALIB.BATCH_SIZE", "3", "CALIB.METHOD", "entropy")
    config = resolved(
        "--calib", "--cfg", str(cfg), "--recipe", str(recipe), *opts, "--calibrator", "mse"
    )
    found = config.CALIB
    assert (found.SEED, found.NUM_BATCHES, found.BATCH_SIZE, found.METHOD) == (1, 2, 3, "mse")
    assert config.MODEL.RESUME == "m.pth"


def test_a_flag_that_changes_nothing_is_said_to(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    args = ["--eval", *MODEL, "--data-path", "images", "--num-calib-batch", "3", "--device", "cpu"]
    assert cli.unused(flags.parse(args)) == ["--num-calib-batch"]
    assert cli.main([*args, "--dry-run"]) == 0
    assert "note: --num-calib-batch changes nothing for --eval" in capsys.readouterr().out
    assert cli.unused(flags.parse(READY)) == []


def test_local_rank_is_used_and_may_not_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    resolved("--calib", "--local_rank", "3")
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SwinqError, match="--local-rank is 3.*LOCAL_RANK=1"):
        resolved("--calib", "--local-rank=3")


def test_print_config_is_yaml_that_gives_the_same_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (*READY, "--percentile", "99.9", "--opts", "MODEL.SWIN.DEPTHS", "[1,1]")
    assert cli.main([*argv, "--print-config"]) == 0
    (folder / "same.yaml").write_text(capsys.readouterr().out)
    assert resolved("--calib", "--cfg", "same.yaml") == resolved(*argv)
    assert cli.main(["--print-config"]) == 0  # the defaults, with no action at all
    assert capsys.readouterr().out.startswith("DATA:")


def test_help_fits_on_a_screen_and_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 100
    for name in (*flags.FLAGS, *flags.ACTIONS):
        assert f"--{name}" in text
    assert text.index("examples:") > text.index("--print-config")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, Config], int]], None]:
    """Puts a function in the place of the actions."""

    def install(run: Callable[[str, Config], int]) -> None:
        import swinq

        module = ModuleType("swinq.commands")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "swinq.commands", module)
        monkeypatch.setattr(swinq, "commands", module, raising=False)

    return install


Install = Callable[[Callable[[str, Config], int]], None]


def test_the_action_gets_the_configuration_and_gives_the_exit_code(
    commands: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, bool]] = []

    def run(action: str, config: Config) -> int:
        seen.append((action, config.DEMO))
        return 0

    commands(run)
    assert cli.main(["--calib", "--device", "cpu"]) == 0
    assert seen == [("calib", True)]
    out = capsys.readouterr().out
    assert out.startswith("swinq 0") and "configs/demo.yaml: " in out
    assert "not ImageNet numbers" in out


@pytest.mark.parametrize(
    ("failure", "code", "wanted"),
    [
        (SwinqError("bad thing", "mend it"), 2, "error: bad thing\n  fix: mend it"),
        (SwinqError("\n".join("line" for _ in range(30))), 2, "error: line"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "out/x"), 2, "out/x: No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "use --batch-size 32"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_action_ends_in_a_short_error(
    commands: Install,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    wanted: str,
) -> None:
    def run(action: str, config: Config) -> int:
        raise failure

    commands(run)
    assert cli.main(["--calib", "--device", "cpu"]) == code
    message = capsys.readouterr().err
    assert wanted in message
    assert len(message.splitlines()) <= 10 and "Traceback" not in message


def test_a_closed_pipe_is_no_drama(commands: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(action: str, config: Config) -> int:
        raise BrokenPipeError

    commands(run)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # given back afterwards
    assert cli.main(["--calib", "--device", "cpu"]) == 2
    sys.stdout.close()


def test_swinq_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWINQ_DEBUG", "1")
    with pytest.raises(SwinqError, match="unknown flag"):
        cli.main(["--nonsense"])


def test_an_odd_environment_is_named_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert cli.main(["--calib"]) == 2
    assert "RANK is 'first'" in capsys.readouterr().err


def script(repo_root: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=repo_root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("entry", [("swinq/main.py",), ("-m", "swinq.main")], ids=" ".join)
def test_both_entries_report_a_mistake_without_importing_torch(
    repo_root: Path, entry: tuple[str, ...]
) -> None:
    ran = script(repo_root, "-X", "importtime", *entry, "--calib", "--cfg", "nowhere")
    assert ran.returncode == 2
    assert ran.stdout.startswith("swinq 0")  # a sign of life before anything heavy
    assert "'nowhere'" in ran.stderr and "Traceback" not in ran.stderr
    assert "| torch\n" not in ran.stderr and "swinq.cli" in ran.stderr


def test_another_rank_says_which_one_it_is_and_leaves(repo_root: Path) -> None:
    since = time.monotonic()
    ran = script(repo_root, "swinq/main.py", "--nonsense", RANK="1", WORLD_SIZE="2")
    assert ran.returncode == 2 and time.monotonic() - since < 20
    assert ran.stderr.startswith("[rank 1] error: unknown flag --nonsense")
    assert ran.stdout == ""


JOB = """
import os, sys, time, types
import swinq
from swinq import distributed
from swinq.cli import main
from swinq.errors import SwinqError

def run(action, config):
    if distributed.rank() == 1:
        raise SwinqError("rank one is ill", "cure it")
    distributed.barrier()

module = types.ModuleType("swinq.commands")
module.run = run
swinq.commands = sys.modules["swinq.commands"] = module
sys.exit(main(["--calib", "--device", "cpu"]))
"""


@pytest.mark.slow
def test_one_failing_rank_ends_the_whole_job(repo_root: Path, tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text(JOB)
    since = time.monotonic()
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    ran = script(repo_root, *torchrun, str(program), PYTHONPATH=str(repo_root), OMP_NUM_THREADS="1")
    assert ran.returncode != 0 and time.monotonic() - since < 60
    assert "[rank 1] error: rank one is ill\n  fix: cure it" in ran.stderr
    summary = ran.stderr.partition("Root Cause")[2]  # torchrun's own: the last thing on the screen
    assert "rank one is ill" in summary and "fix: cure it" in summary


def test_torchrun_finds_the_error_where_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert cli.main(["--calib", "--percentil", "9"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert "unknown flag --percentil" in failure.message["message"]  # type: ignore[index]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder"))
    assert cli.main(["--calib", "--percentil", "9"]) == 2


def test_the_parser_takes_values_as_texts() -> None:
    args = flags.parse(["--calib", "--percentile", "99"])
    assert isinstance(args, argparse.Namespace) and args.percentile == "99"
    assert args.action == "calib"


def test_flags_have_keys_that_exist() -> None:
    known = dict(flags.leaves(flags.DEFAULTS))
    for flag in flags.FLAGS.values():
        assert set(flag.keys) <= set(known), flag.name
        assert set(flag.actions) <= set(flags.ACTIONS), flag.name
    assert not set(flags.ABSENT) & set(flags.FLAGS)
    assert config_files.CONFIGS.is_dir()
