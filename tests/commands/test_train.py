"""--train as it is typed: what it writes, what it refuses before it calibrates, what it resumes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import swinq
from swinq.commands import train
from swinq.commands.best import load_best
from swinq.commands.session import Session
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import ExportError
from swinq.export.calibrated import write_calibrated
from swinq.quant.insert import quantize_model
from swinq.train.qat import Progress
from tests.commands.command_line import done, metadata_of, refused, tensors_of, write_digits
from tests.quant.recipes import recipe

JOB = (
    *("--train", "--cfg", "demo", "--num-epochs", "1", "--num-calib-batch", "1"),
    *("--calib-batchsz", "8", "--sensitivity-images", "0"),
)
BATCHES = ("--batch-size", "8", "--opts", "REPORT.TENSORBOARD", "false")
TINY = (*JOB, "--data-path", "fake:16")
FINETUNE = (*TINY, *BATCHES)
TRAINED = "micro_swin_digits_qat.safetensors"
EXPORTED = "micro_swin_digits_qat_int8_mode{}.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job's results."""
    output = tmp_path_factory.mktemp("trained")
    done(*FINETUNE, "--output", output)
    return output / "micro_swin_digits" / "qat"


@pytest.mark.parametrize("mode", [1, 2])
def test_trains_exports_and_judges_one_mode(tmp_path: Path, mode: int) -> None:
    ran = done(*FINETUNE, "--output", tmp_path, "--int8-mode", mode)
    for row in ("float", f"fake-quant mode {mode}", f"QAT fake-quant mode {mode}"):
        assert ran.row(row)
    assert ran.row(f"INT8 mode {mode}")
    folder = tmp_path / "micro_swin_digits" / "qat"
    assert metadata_of(folder / EXPORTED.format(mode))["int8_mode"] == str(mode)
    assert not (folder / EXPORTED.format(3 - mode)).exists()


def test_the_same_command_again_trains_nothing_and_writes_the_same(trained: Path) -> None:
    files = [trained / TRAINED, trained / EXPORTED.format(1)]
    before = [file.read_bytes() for file in files]
    ran = done(*FINETUNE, "--output", trained.parents[1])
    assert "resumed: step 2 of 2" in ran.out and "step 1/2" not in ran.out
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (("--batch-size", "7"), "a batch of 7 images cannot be mixed"),
        (("--batch-size", "32"), "32 in all; the data set holds 16"),
        (("--opts", "AUG.AUTO_AUGMENT", "best"), "AUTO_AUGMENT 'best'"),
        (("--teacher", "no.pth", "--batch-size", "8"), "no.pth cannot be read"),
        (("--opts", "QAT.DISTILL.SCALE", "2"), "QAT.DISTILL.SCALE 2.0 (--opts) is given"),
        (("--batch-size", "8", "--opts", "QAT.LEARN_RANGES", "[probabilities]"), "no quantizer of"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], problem: str
) -> None:
    monkeypatch.setattr(train, "find_ranges", None)
    assert problem in refused(*TINY, "--output", tmp_path, *changes)


@pytest.mark.parametrize(
    "change",
    [("AUG.MIXUP", "0.1"), ("MODEL.LABEL_SMOOTHING", "0.2"), ("CALIB.PERCENTILE", "99.0")],
)
def test_what_changes_the_job_is_not_resumed(
    trained: Path, change: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it calibrates, and the configuration that would be repeated stays."""
    monkeypatch.setattr(train, "find_ranges", None)
    saved = (trained / "config_train.yaml").read_bytes()
    message = refused(*FINETUNE, *change, "--output", trained.parents[1])
    assert f"is of another job: {change[0]} " in message and f"{change[1]} here" in message
    assert (trained / "config_train.yaml").read_bytes() == saved


def test_other_images_make_another_job_and_the_same_elsewhere_do_not(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images")
    job = (*JOB, *BATCHES, "--output", tmp_path / "results")
    done(*job, "--data-path", images)
    moved = images.rename(tmp_path / "moved")
    assert "resumed: step 2 of 2" in done(*job, "--data-path", moved).out
    for split in ("train", "val"):
        image = next((moved / split / "3").iterdir())
        image.rename(image.with_name("another.png"))
    message = refused(*job, "--data-path", moved)
    assert "is of another job: training images" in message and "validation images" in message


@pytest.mark.parametrize("lost", ["damaged", "empty", "gone"])
def test_a_lost_best_model_is_no_dead_end(trained: Path, tmp_path: Path, lost: str) -> None:
    """Here it is the one before training, which calibrating anew has found again."""
    folder = tmp_path / "micro_swin_digits" / "qat"
    shutil.copytree(trained, folder)
    best = folder / "training" / "best.safetensors"
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    best.write_bytes(content if lost == "damaged" else b"")
    if lost == "gone":
        best.unlink()
    (folder / EXPORTED.format(1)).unlink()
    done(*FINETUNE, "--output", tmp_path)
    for name in (TRAINED, EXPORTED.format(1)):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_where_a_trained_best_model_is_lost_the_last_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = quantize_model(swinq.load(CHECKPOINT), recipe("int8"))
    session: Any = SimpleNamespace(training_folder=tmp_path, device="cpu")
    progress = Progress(judged=[(0, 50.0), (4, 70.0), (8, 60.0)], best_step=4, best_top1=70.0)
    state = load_best(session, last, {}, progress)
    assert state.keys() == last.state_dict().keys()
    assert torch.equal(state["head.weight"], last.state_dict()["head.weight"])
    assert (progress.best_step, progress.best_top1) == (8, 60.0)
    assert "exported, with top-1 60.00 % instead of 70.00 %" in capsys.readouterr().out


def test_a_best_model_that_finds_no_room_does_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of step 1 cannot be kept: that of step 2 is, though it is no better."""
    from swinq.train import qat

    real, scores = Session.write_calibrated, iter([10.0, 30.0, 20.0])

    def full(self: Session, path: Path, model: Any, *, judged: Any = None) -> None:
        if judged and judged[0] == 1:
            raise ExportError("No space left on device", "free space")
        real(self, path, model, judged=judged)

    def judge(self: Any, step: int) -> None:
        object.__setattr__(self.around, "judge", lambda model: next(scores))
        judged(self, step)

    judged = qat._Loop._judge
    monkeypatch.setattr(qat._Loop, "_judge", judge)
    monkeypatch.setattr(Session, "write_calibrated", full)
    job = ("--train", "--cfg", "demo", "--num-epochs", "2", *TINY[5:])
    ran = done(*job, "--batch-size", "16", *BATCHES[2:], "--output", tmp_path)
    assert "the model of step 1, with top-1 30.00 %, could not be kept: No space" in ran.out
    best = tmp_path / "micro_swin_digits" / "qat" / "training" / "best.safetensors"
    assert json.loads(metadata_of(best)["judged"]) == {"step": 2, "top1": 20.0}


def test_a_kept_model_counts_as_it_was_judged(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed job may have kept a model and lost the memory of having judged it."""
    folder = trained / "training"
    session: Any = SimpleNamespace(
        training_folder=folder, device="cpu", require_shared=lambda path: None
    )
    best = folder / "best.safetensors"
    judged = json.loads(metadata_of(best)["judged"])
    kept = swinq.load(best).state_dict()
    forgetful = Progress(judged=[(0, 0.5), (1, 1.5)], best_step=1, best_top1=1.5)
    state = load_best(session, swinq.load(CHECKPOINT), {}, forgetful)
    assert torch.equal(state["head.weight"], kept["head.weight"])
    assert (forgetful.best_step, forgetful.best_top1) == (judged["step"], judged["top1"])
    assert f"step {judged['step']} with top-1 {judged['top1']:.2f} %" in capsys.readouterr().out


def test_ranges_that_are_found_a_bit_differently_do_not_end_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another GPU: the job goes on with the ranges that it began with."""
    job = (*FINETUNE, "QAT.SAVE_STEPS", "1", "--output", tmp_path)
    done(*job)
    last = tmp_path / "micro_swin_digits" / "qat" / "training" / "step-00000002.safetensors"
    wanted = tensors_of(last)
    last.unlink()
    real = train.find_ranges

    def elsewhere(*args: Any) -> Any:
        found = real(*args)
        quantizer = found[0].layers[0].blocks[0].attn.proj.input_quantizer
        quantizer.load_calib_amax(quantizer.amax * 1.001)
        return found

    monkeypatch.setattr(train, "find_ranges", elsewhere)
    assert "resumed: step 1 of 2" in done(*job).out
    found = tensors_of(last)
    assert [n for n in wanted if found[n].numpy().tobytes() != wanted[n].numpy().tobytes()] == []


@pytest.mark.parametrize(
    "stated",
    [
        ("--recipe", "fastertransformer"),
        ("--calibrator", "mse"),
        ("--opts", "QUANT.WEIGHT.GRANULARITY", "per_tensor"),
    ],
)
def test_a_calibrated_checkpoint_is_not_told_how_to_find_ranges(
    trained: Path, tmp_path: Path, stated: tuple[str, ...]
) -> None:
    start = ("--resume", trained / TRAINED, "--batch-size", "8", "--output", tmp_path)
    assert "was calibrated with its own" in refused(*TINY, *start, *stated)


def teacher_of(folder: Path, classes: str | list[str]) -> Path:
    """The demo's checkpoint under other names of its classes."""
    with safe_open(CHECKPOINT, framework="pt") as file:
        metadata = file.metadata() | {"classes": json.dumps(list(classes))}
    save_file(tensors_of(CHECKPOINT), folder / "teacher.safetensors", metadata)
    return folder / "teacher.safetensors"


@pytest.mark.parametrize(
    ("classes", "problem"),
    [("9876543210", "class 0 is 9, and 0 in the model"), ("012345678x", "class 9 is x, and 9 in")],
    ids=["in another order", "partly others"],
)
def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, classes: str, problem: str) -> None:
    teacher = teacher_of(tmp_path, classes)
    message = refused(*FINETUNE, "--teacher", teacher, "--output", tmp_path)
    assert f"--teacher {teacher}: {problem}" in message and "in the same order" in message


def test_a_teacher_whose_names_cannot_be_compared_is_noted(tmp_path: Path) -> None:
    """Not so where only the model's own names differ, and the images have the teacher's."""
    words = [f"number {digit}" for digit in range(10)]
    job = (*FINETUNE, "--teacher", teacher_of(tmp_path, words), "--output", tmp_path)
    said = "names its classes otherwise (number 0, ...) than the model (0, ...)"
    assert said in done(*job).out
    fake = [f"fake {digit}" for digit in range(10)]
    job = (*FINETUNE, "--teacher", teacher_of(tmp_path, fake), "--tag", "fake")
    assert "names its classes" not in done(*job, "--output", tmp_path).out


def test_a_finetuned_model_that_is_its_own_teacher_is_noted(trained: Path, tmp_path: Path) -> None:
    model = swinq.load(trained / TRAINED)
    best = json.loads(metadata_of(trained / TRAINED)["judged"])
    assert model.judged == (best["step"], best["top1"])
    start = tmp_path / "finetuned.safetensors"
    write_calibrated(
        start,
        model,
        calibration=swinq.api.describe_calibration(model.calibration),
        classes=None,
        transform={},
        judged=(3, 50.0),
    )
    note = f"note: {start} was finetuned for 3 steps and is now its own teacher"
    job = (*FINETUNE, "--resume", start, "--output", tmp_path)
    assert note in done(*job, "--distill").out
    assert note in done(*job, "--teacher", start, "--tag", "named").out
    assert note not in done(*job, "--teacher", CHECKPOINT, "--tag", "original").out
    again = swinq.load(tmp_path / "micro_swin_digits" / "original" / TRAINED)
    assert again.judged[0] == 3  # no step was better: still the model that an earlier job trained


def test_what_a_job_reads_is_not_what_it_writes(trained: Path, tmp_path: Path) -> None:
    start = ("--resume", trained / TRAINED, "--calib-output-path", trained, "--output", tmp_path)
    message = refused(*FINETUNE, *start)
    assert f"--resume {trained / TRAINED} is the file that this run would write" in message
    best = ("--resume", trained / "training" / "best.safetensors")
    assert "--resume " in refused(*FINETUNE, *best, "--output", trained.parents[1])
    teacher = ("--teacher", trained / TRAINED, "--calib-output-path", trained)
    assert "--teacher " in refused(*FINETUNE, *teacher, "--output", tmp_path)


def test_jobs_that_share_a_folder_of_checkpoints_keep_their_own_best(tmp_path: Path) -> None:
    """A finished job that is repeated exports its model again, whatever lies there by now."""
    shared = tmp_path / "shared"
    first = (*FINETUNE, "--output", tmp_path, "--calib-output-path", shared, "--tag", "first")
    done(*first)
    exported = shared / EXPORTED.format(1)
    before = exported.read_bytes()
    (shared / TRAINED).write_bytes(CHECKPOINT.read_bytes())
    exported.unlink()
    done(*first)
    assert exported.read_bytes() == before
