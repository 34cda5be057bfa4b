"""The command line: flags mean what they say, actions are called, failures end shortly."""

import argparse
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from swinq import cli, config_files, flags
from swinq.config import Config
from swinq.errors import SwinqError

TINY = "swin_tiny_patch4_window7_224"
MODEL = ("--resume", "model.pth")
READY = ("--calib", *MODEL, "--data-path", "images", "--device", "cpu")


def resolved(*argv: str) -> Config:
    return cli.resolve(flags.parse(argv))[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with images and something that looks like a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", b"")
    return tmp_path


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
    assert not resolved("--eval", "--cfg", "demo", "--opts", "MODEL.RESUME", "a").DEMO


@pytest.mark.parametrize("data", ["digits", "fake:8"])
def test_the_demo_says_whose_digits_it_sees_only_where_it_sees_them(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--calib", "--cfg", "demo", "--data-path", data, "--device", "cpu", "--dry-run"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "not ImageNet numbers" in out
    assert ("handwritten digits" in out) == (data == "digits")


def test_flags_reach_their_keys_with_their_origin() -> None:
    words = {
        "--batch-size": ("16", "DATA.BATCH_SIZE", 16),
        "--cache-mode": ("no", "DATA.CACHE_MODE", "no"),
        "--calib-batchsz": ("4", "CALIB.BATCH_SIZE", 4),
        "--calib-output-path": ("out", "CALIB.OUTPUT_PATH", "out"),
        "--calibrator": ("percentile", "CALIB.METHOD", "percentile"),
        "--data-path": ("images", "DATA.DATA_PATH", "images"),
        "--device": ("cpu", "DEVICE", "cpu"),
        "--engine": ("reference", "ENGINE", "reference"),
        "--eval-transform": ("timm", "EVAL.TRANSFORM", "timm"),
        "--int8-mode": ("2", "INT8.MODE", 2),
        "--num-calib-batch": ("3", "CALIB.NUM_BATCHES", 3),
        "--output": ("out", "OUTPUT", "out"),
        "--percentile": ("99.5", "CALIB.PERCENTILE", 99.5),
        "--resume": ("model.pth", "MODEL.RESUME", "model.pth"),
        "--seed": ("7", "CALIB.SEED", 7),
        "--eval-images": ("100", "EVAL.IMAGES", 100),
        "--sensitivity-images": ("0", "REPORT.SENSITIVITY_IMAGES", 0),
        "--tag": ("224", "TAG", "224"),
        "--version": ("1", "MODEL.VERSION", 1),
        "--workers": ("-1", "DATA.NUM_WORKERS", -1),
    }
    training = {
        "--accumulation-steps": ("4", "TRAIN.ACCUMULATION_STEPS", 4),
        "--amp-type": ("fp16", "QAT.AMP_TYPE", "fp16"),
        "--distillation-loss-scale": ("2", "QAT.DISTILL.SCALE", 2.0),
        "--num-epochs": ("5", "QAT.EPOCHS", 5),
        "--optim": ("adamw", "TRAIN.OPTIMIZER.NAME", "adamw"),
        "--qat-lr": ("5e-7", "QAT.LR", 5e-7),
        "--teacher": ("large.pth", "QAT.DISTILL.TEACHER", "large.pth"),
    }
    words |= training
    argv = [word for flag, (text, _, _) in words.items() for word in (flag, text)]
    config = resolved("--train", "--zip", "--use-checkpoint", *argv)
    for flag, (_, key, value) in words.items():
        node: object = config
        for part in key.split("."):
            node = getattr(node, part)
        assert node == value, flag
        assert config.origins[key] == flag
    assert config.DATA.ZIP_MODE is True and config.SEED == 7
    assert config.TRAIN.USE_CHECKPOINT is True
    assert resolved("--train", "--disable-amp").AMP_ENABLE is False
    switches = {"--zip", "--use-checkpoint", "--disable-amp", "--distill"}
    keyed = {f"--{flag.name}" for flag in flags.FLAGS.values() if flag.keys}
    assert keyed == {*words, *switches, "--pretrained"}


def test_train_alone_is_the_demo_and_trains_mode_1() -> None:
    config = resolved("--train")
    assert config.DEMO and config.DATA.DATA_PATH == "digits"
    assert (config.INT8.MODE, config.origins["INT8.MODE"]) == (1, "--train")
    assert resolved("--train", "--int8-mode", "2").INT8.MODE == 2
    assert resolved("--calib").INT8.MODE == 0
    assert config.QAT.DISTILL.ENABLED is False and config.AMP_ENABLE is True


def test_a_teacher_means_distillation() -> None:
    images = ("--data-path", "images")
    given = resolved("--train", *MODEL, *images, "--teacher", "large.pth").QAT.DISTILL
    assert (given.ENABLED, given.TEACHER) == (True, "large.pth")
    own = resolved("--train", *MODEL, *images, "--distill").QAT.DISTILL
    assert (own.ENABLED, own.TEACHER) == (True, "")
    assert resolved("--train", "--opts", "QAT.DISTILL.TEACHER", "x").QAT.DISTILL.ENABLED


def test_the_ancestors_distillation_scale_is_translated(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    argv = ["--train", *READY[1:], "--distill", "--dry-run", "--distillation-loss-scale"]
    assert cli.main([*argv, "10000"]) == 0
    assert "a distillation scale of 10000 is the ancestor's" in (said := capsys.readouterr().out)
    assert "is 1.1 here" in said
    assert cli.main([*argv, "1.1"]) == 0
    assert "the ancestor's" not in capsys.readouterr().out


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


def test_training_settings_are_said_to_change_nothing_elsewhere() -> None:
    settings = ("--qat-lr", "1e-5", "--opts", "AUG.MIXUP", "0", "TAG", "x")
    assert cli.unused(flags.parse([*READY, *settings])) == ["--qat-lr", "--opts AUG.MIXUP"]
    assert cli.unused(flags.parse(["--train", *READY[1:], *settings])) == []


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
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "use --batch-size 32\n"),
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


def test_training_out_of_memory_keeps_the_job(
    commands: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(action: str, config: Config) -> int:
        raise torch.OutOfMemoryError

    commands(run)
    assert cli.main(["--train", "--device", "cpu"]) == 2
    smaller = "use --batch-size 32, which is another job: with another --tag"
    assert f"fix: --use-checkpoint; then {smaller}" in capsys.readouterr().err
    assert cli.main(["--train", "--device", "cpu", "--use-checkpoint"]) == 2
    assert f"fix: {smaller}" in capsys.readouterr().err


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
