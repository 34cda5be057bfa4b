"""The loop: what one step computes, what is kept, and what a job on several ranks agrees on."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinq.errors import CheckpointError, ConfigError, SwinqError
from swinq.quant.insert import float_layers, named_quantizers
from swinq.train.distill import Distillation
from swinq.train.job import require_same_job
from swinq.train.qat import StoppedError
from swinq.train.state import CheckpointFolder
from tests.train.jobs import Judge, run_job, tiny_calibrated

RANK_JOB = Path(__file__).with_name("rank_job.py")


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest magnitude of each tensor."""
    assert one.keys() == other.keys()
    return max(float((a - other[n]).abs().max() / (a.abs().max() + 1e-12)) for n, a in one.items())


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two ends lie apart, as a share of the way that one of them has come."""

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.stack([(a[n] - b[n]).double().square().sum() for n in start]).sum().sqrt()

    return float(distance(one, other) / distance(one, start))


def test_training_lowers_the_loss_and_leaves_a_plain_model(
    tmp_path: Path, single_thread: None
) -> None:
    model = tiny_calibrated()
    before = parameters(model)
    progress = run_job(tmp_path, model, epochs=8, augment=False)
    losses = [loss for _, loss, _ in progress.curve]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert parameters(model).keys() == before.keys()  # no learned range is left behind
    assert furthest(before, parameters(model)) > 0


def test_accumulation_equals_the_larger_batch(tmp_path: Path, single_thread: None) -> None:
    """The mean of two micro-batches' gradients is that of both together, but for rounding.

    A large eps keeps AdamW from dividing gradients that are nothing but rounding by themselves.
    """
    start = parameters(tiny_calibrated())
    large, small = tiny_calibrated(), tiny_calibrated()
    kinds = {"epochs": 1, "augment": False, "eps": 1e-2}
    run_job(tmp_path / "large", large, batch=8, **kinds)
    run_job(tmp_path / "small", small, batch=4, accumulation=2, **kinds)
    assert apart(parameters(large), parameters(small), start) < 0.02


def test_frozen_ranges_stay_and_learned_ones_move(tmp_path: Path) -> None:
    model = tiny_calibrated()
    before = {n: q.amax.clone() for n, q in named_quantizers(model).items()}
    run_job(tmp_path, model, learned=("output",))
    for name, quantizer in named_quantizers(model).items():
        if not before[name].isnan().any():
            moved = not torch.equal(before[name], quantizer.amax)
            assert moved == name.endswith("output_quantizer"), name


def test_learned_ranges_stay_in_the_last_steps(tmp_path: Path) -> None:
    """With the ranges fixed from the start, only the weights move."""
    model = tiny_calibrated()
    before = {n: q.amax.clone() for n, q in named_quantizers(model).items()}
    run_job(tmp_path, model, learned=("output", "input", "weight"), fix_ranges=0.0)
    for name, quantizer in named_quantizers(model).items():
        torch.testing.assert_close(quantizer.amax, before[name], rtol=1e-6, atol=0, equal_nan=True)


def test_the_teacher_has_no_gradients_and_stays(tmp_path: Path) -> None:
    model = tiny_calibrated()
    teacher = copy.deepcopy(model)
    before = parameters(teacher)
    distillation = Distillation(
        teacher, scale=1.0, temperature=3.0, features=0.5, compile_blocks=False
    )
    run_job(tmp_path, model, distillation=distillation, distill=1.0, features=0.5)
    assert all(p.grad is None for p in teacher.parameters())
    assert furthest(before, parameters(teacher)) == 0


def test_the_last_epoch_is_saved_and_a_finished_job_repeats_nothing(tmp_path: Path) -> None:
    model, again = tiny_calibrated(), tiny_calibrated()
    run_job(tmp_path, model)
    assert [p.name for p in sorted((tmp_path / "training").iterdir())] == [
        "step-00000004.safetensors",
        "step-00000008.safetensors",
    ]
    judge = Judge()
    progress = run_job(tmp_path, again, judge)
    assert len(progress.curve) == 8
    assert [step for step, _ in progress.judged] == [0, 4, 8]
    assert furthest(parameters(model), parameters(again)) == 0


def test_the_best_is_the_first_of_equals_and_may_be_the_start(tmp_path: Path) -> None:
    judge = Judge(60.0, 61.0, 61.0)
    progress = run_job(tmp_path / "rises", tiny_calibrated(), judge)
    assert (progress.best_step, progress.best_top1) == (4, 61.0)
    assert len(judge.kept) == 2
    assert torch.equal(judge.kept[1]["head.weight"], judge.seen[1]["head.weight"])
    falls = run_job(tmp_path / "falls", tiny_calibrated(), Judge(60.0, 50.0))
    assert falls.best_step == 0


def test_the_average_is_what_is_judged(tmp_path: Path) -> None:
    """With a decay near 1 the average stays near the start, though its warm-up moves it."""
    model, averaged = tiny_calibrated(), tiny_calibrated()
    before = parameters(model)
    run_job(tmp_path / "plain", model)
    run_job(tmp_path / "average", averaged, ema=0.999)
    assert 0 < furthest(before, parameters(averaged)) < furthest(before, parameters(model))


def test_a_signal_while_the_last_step_is_judged_is_obeyed(tmp_path: Path) -> None:
    judge = Judge(60.0, 61.0, 62.0)

    def signalled(model: nn.Module) -> float:
        if len(judge.seen) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return Judge.judge(judge, model)

    judge.judge = signalled  # type: ignore[method-assign]
    with pytest.raises(StoppedError, match="after step 8 of 8") as stopped:
        run_job(tmp_path, tiny_calibrated(), judge)
    assert stopped.value.code == 138
    assert run_job(tmp_path, tiny_calibrated(), Judge(62.0)).judged == [
        (0, 60.0),
        (4, 61.0),
        (8, 62.0),
    ]


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run_job(tmp_path, tiny_calibrated())
    with pytest.raises(ConfigError, match=r"another job: rate 0\.001 there, 0\.002 here"):
        run_job(tmp_path, tiny_calibrated(), rate=2e-3)


@pytest.mark.parametrize("state", [{"progress": {}}, {"job": None}, ["job"]])
def test_a_file_that_tells_no_job_is_named(tmp_path: Path, state: Any) -> None:
    path = CheckpointFolder(tmp_path / "training").save(4, {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=f"{path} does not say what job") as caught:
        require_same_job(path, state, {})
    assert "move it out" in caught.value.fix
    with pytest.raises(CheckpointError, match=f"{path} does not say what job"):
        run_job(tmp_path, tiny_calibrated())


def test_a_job_that_no_longer_fits_goes_on_with_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swinq.train import settings

    before = tuple(name for name in settings.FREE if name != "checkpointing")
    with monkeypatch.context() as older:  # a checkpoint that names it all the same
        older.setattr(settings, "FREE", before)
        run_job(tmp_path, tiny_calibrated())
    progress = run_job(tmp_path, tiny_calibrated(), checkpointing=True)
    assert len(progress.judged) == 3 and progress.judged[-1][0] == 8


def test_a_gradient_that_is_not_finite_ends_the_job_and_spares_the_checkpoint(
    tmp_path: Path,
) -> None:
    model = tiny_calibrated()
    with pytest.raises(SwinqError, match=r"gradient of step \d is nan"):
        run_job(tmp_path, model, rate=1e30, range_rate=1.0, warmup=0.0, clip=0.0)
    assert not (tmp_path / "training").exists()  # nothing unsound was written


@pytest.mark.parametrize(
    ("group", "rate", "named"),
    [
        ("decayed", 1e38, r"model\..*"),
        ("ranges", 1e3, r"the range of model\..*log_amax"),
        ("decayed", None, r"optimizer\..*exp_avg_sq"),
    ],
)
def test_what_is_spoiled_is_never_saved_over_a_good_state(
    tmp_path: Path, group: str, rate: float | None, named: str
) -> None:
    """The step before a save goes wrong: no gradient has seen what it made."""
    from swinq.train import qat

    real = qat.Schedule.set

    def spoil(self: qat.Schedule, step: int) -> float:
        usual = real(self, step)
        for part in self.optimizer.param_groups:
            if step == 3 and part["name"] == group and rate:
                part["lr"] = rate
            elif step == 3 and part["name"] == group:
                for parameter in part["params"]:
                    self.optimizer.state[parameter]["exp_avg_sq"].fill_(torch.inf)
        return usual

    with pytest.MonkeyPatch.context() as spoiling:
        spoiling.setattr(qat.Schedule, "set", spoil)
        with pytest.raises(SwinqError, match=f"{named} has numbers .* step 4; .*before it"):
            run_job(tmp_path, tiny_calibrated(), save_steps=2)
    assert [p.name for p in (tmp_path / "training").iterdir()] == ["step-00000002.safetensors"]
    assert run_job(tmp_path, tiny_calibrated(), save_steps=2).judged[-1][0] == 8


def test_a_step_that_fp16_skips_does_not_spoil_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the loss nor the norm of such a step need be numbers, and JSON has only those."""
    from swinq.train import qat

    real, calls = qat._Unread.read, []

    def read(self):  # type: ignore[no-untyped-def]
        norm, parts = real(self)
        calls.append(norm)
        return (norm, parts) if len(calls) > 1 else (float("nan"), {"loss": float("nan")})

    monkeypatch.setattr(qat._Unread, "read", read)
    progress = run_job(tmp_path, tiny_calibrated(), amp="fp16", save_steps=1)
    assert [step for step, _, _ in progress.curve] == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("version", [1, 2])
def test_a_half_trained_job_goes_on_with_the_same_bits(
    tmp_path: Path, single_thread: None, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path, mixing and augmentation on, EMA too: nothing may hide outside the state."""
    kinds = {"drop_path": 0.3, "ema": 0.9, "save_steps": 1, "learned": ("output", "weight")}
    whole, resumed = tiny_calibrated(version), tiny_calibrated(version)
    run_job(tmp_path / "whole", whole, **kinds)

    from swinq.train import qat

    real, calls = qat._Loop._step, []

    def step(self, number, batches):  # type: ignore[no-untyped-def]
        calls.append(number)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, number, batches)

    monkeypatch.setattr(qat._Loop, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        run_job(tmp_path / "cut", tiny_calibrated(version), **kinds)
    torch.manual_seed(99)  # another process begins in another random state
    run_job(tmp_path / "cut", resumed, **kinds)
    assert calls == [0, 1, 2, 3, 4, 5, 5, 6, 7]
    assert furthest(parameters(whole), parameters(resumed)) == 0
    for name, quantizer in named_quantizers(whole).items():
        other = named_quantizers(resumed)[name].amax
        assert torch.equal(quantizer.amax.nan_to_num(-1), other.nan_to_num(-1)), name


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_agree_with_one(tmp_path: Path, repo_root: Path, parallel: str) -> None:
    """Two ranks see the micro-batches that one accumulates; only sums are ordered otherwise."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *(torchrun if ranks > 1 else []), str(RANK_JOB), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*command, parallel], env=environment, capture_output=True, text=True, timeout=240
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        states = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)]
        for state in states[1:]:
            assert furthest(states[0]["model"], state["model"]) == 0
            assert torch.equal(states[0]["losses"], state["losses"])
        found.append(states[0])
    one, two = found
    assert apart(one["model"], two["model"], parameters(tiny_calibrated())) < 1e-4
    assert torch.allclose(one["losses"], two["losses"], rtol=1e-4)


def test_distillation_pulls_towards_the_teacher(tmp_path: Path, single_thread: None) -> None:
    """Without labels, the student's logits come nearer to those of the float model."""
    model, teacher = tiny_calibrated(), tiny_calibrated(seed=2)
    images = torch.randn(8, 3, 32, 32)
    with float_layers(teacher), torch.no_grad():
        wanted = teacher(images).log_softmax(-1)

    def distance() -> float:
        with torch.no_grad():
            said = model.eval()(images).log_softmax(-1)
        return float((wanted.exp() * (wanted - said)).sum(-1).mean())

    before = distance()
    distillation = Distillation(
        teacher, scale=1.0, temperature=1.0, features=0.0, compile_blocks=False
    )
    run_job(tmp_path, model, distillation=distillation, distill=1.0, labels=0.0, epochs=4)
    assert distance() < 0.7 * before


def test_saves_take_a_fiftieth_of_the_time_where_no_interval_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of seconds: 1 a step, 0.09 a save, 60 more to compile and 60 to validate.

    5 steps then lie between two saves; a validation has one before it.
    """
    from swinq.train import qat, saving

    now, saved = [0.0], []
    monkeypatch.setattr(qat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(saving, "FIRST_SAVE", 2)
    step, save, judge = qat._Loop._step, qat.CheckpointFolder.save, Judge()

    def slow_step(self, number, batches):  # type: ignore[no-untyped-def]
        now[0] += 1.0 if number else 61.0
        return step(self, number, batches)

    def slow_save(self, number, *args):  # type: ignore[no-untyped-def]
        now[0] += 0.09
        saved.append(number)
        return save(self, number, *args)

    def slow_judge(model: nn.Module) -> float:
        now[0] += 60.0
        return Judge.judge(judge, model)

    judge.judge = slow_judge  # type: ignore[method-assign]
    monkeypatch.setattr(qat._Loop, "_step", slow_step)
    monkeypatch.setattr(qat.CheckpointFolder, "save", slow_save)
    run_job(tmp_path, tiny_calibrated(), judge, epochs=8, eval_epochs=4, save_steps=0)
    assert saved == [2, 7, 12, 16, 21, 26, 31, 32]
