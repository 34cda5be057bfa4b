"""Evaluation: the same integers for every number of ranks; honest statistics of a difference."""

import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from swinq import distributed
from swinq import evaluate as evaluation
from swinq.console import progress
from swinq.data.dataset import ImageDataset
from swinq.data.datasets import open_dataset
from swinq.data.transforms import eval_transform
from swinq.errors import ConfigError, DataError, SwinqError
from swinq.evaluate import (
    KL_CAP,
    Comparison,
    Predictions,
    Scores,
    compare,
    evaluate,
    mcnemar_exact,
    paired_interval,
)
from tests.train.ranks import free_port

CLASSES = 7


def linear(seed: int, classes: int = CLASSES) -> Callable[[Tensor], Tensor]:
    """A model that is no module: logits from 4x4 average colours."""
    weight = torch.randn(classes, 48, generator=torch.Generator().manual_seed(seed))

    def model(images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ weight.T

    return model


def thumbnail(picture: Image.Image) -> Tensor:
    """Float32 (3, 8, 8) without torchvision, which would cost the two-process test seconds."""
    return torch.from_numpy(np.array(picture.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255


def fake(count: int, classes: int = CLASSES) -> ImageDataset:
    return open_dataset(f"fake:{count}", "val", thumbnail, num_classes=classes)


def predictions(logits: object, labels: object) -> Predictions:
    values = torch.as_tensor(logits, dtype=torch.float32)
    return Predictions(torch.arange(len(values)), torch.as_tensor(labels), values)


class Ranks:
    """Plays several ranks one after the other: each adds its integers to the sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._sum: Tensor | None = None

    def run(self, world: int, work: Callable[[], object]) -> list[object]:
        self._patch.setattr(distributed, "world_size", lambda: world)
        self._patch.setattr(distributed, "all_reduce_sum_", self._add)
        results = []
        for rank in range(world):
            self._patch.setattr(distributed, "rank", lambda rank=rank: rank)
            results.append(work())
        return results

    def total(self) -> list[int]:
        """What the ranks summed to since the last call."""
        assert self._sum is not None
        total, self._sum = self._sum.tolist(), None
        return total

    def _add(self, tensor: Tensor) -> Tensor:
        assert tensor.dtype == torch.int64
        self._sum = tensor.clone() if self._sum is None else self._sum + tensor
        # ranks without images must still divide by something; the last rank's value is the total
        return tensor.copy_(self._sum)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


@pytest.mark.parametrize("count", [1, 5, 13, 16, 23])
def test_scores_and_comparison_are_the_same_integers_for_1_to_8_ranks(
    ranks: Ranks, count: int
) -> None:
    data = fake(count)
    expected = None
    for world in range(1, 9):

        def one_rank() -> tuple[Predictions, Predictions]:
            settings = {"batch_size": 4, "device": "cpu"}
            return evaluate(linear(0), data, **settings), evaluate(linear(1), data, **settings)

        pairs = ranks.run(world, one_rank)
        mine = iter(pairs)
        ranks.run(world, lambda mine=mine: next(mine)[0].scores())
        scores = ranks.total()
        mine = iter(pairs)
        found = ranks.run(world, lambda mine=mine: compare(*next(mine)))[-1]
        ranks.total()
        seen = sorted(i for first, _ in pairs for i in first.indices.tolist())
        assert seen == list(range(count)) and scores[0] == count
        expected = expected or (scores, found)
        assert (scores, found) == expected


def test_a_models_answers_do_not_depend_on_the_number_of_ranks(ranks: Ranks) -> None:
    """The logits themselves, bit for bit: every rank sees the same, padded batches."""
    data = fake(11)
    shapes = set()

    def model(images: Tensor) -> Tensor:
        shapes.add(tuple(images.shape))
        return linear(0)(images)

    alone = evaluate(model, data, batch_size=4, device="cpu")
    for world in (2, 3, 4):
        parts = ranks.run(world, lambda: evaluate(model, data, batch_size=4, device="cpu"))
        for part in parts:
            assert torch.equal(part.logits, alone.logits[part.indices][:, : part.logits.shape[1]])
    assert shapes == {(4, 3, 8, 8)}


def test_the_padding_repeats_the_last_image_and_is_dropped() -> None:
    batches = []

    def model(images: Tensor) -> Tensor:
        batches.append(images.clone())
        return linear(0)(images)

    found = evaluate(model, fake(6), batch_size=4, device="cpu")
    assert len(found) == 6 and len(batches) == 2
    assert torch.equal(batches[1][2], batches[1][1]) and torch.equal(batches[1][3], batches[1][1])


SCRIPT = """
import json, sys, torch
from swinq import distributed
sys.path.insert(0, {tests!r})
from test_evaluate import fake, linear
from swinq.evaluate import compare, evaluate
torch.set_num_threads(1)
distributed.init("gloo")
data = fake(13)
first = evaluate(linear(0), data, batch_size=4, device="cpu")
second = evaluate(linear(1), data, batch_size=4, device="cpu")
result = [first.scores().to_dict(), compare(first, second).to_dict()]
if distributed.is_main():
    print(json.dumps(result))
distributed.barrier()
distributed.shutdown()
"""


def test_two_gloo_processes_give_the_scores_of_one(repo_root: Path) -> None:
    port = str(free_port())
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    base = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**base, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    data = fake(13)
    first = evaluate(linear(0), data, batch_size=4, device="cpu")
    second = evaluate(linear(1), data, batch_size=4, device="cpu")
    assert json.loads(results[0][0]) == json.loads(
        json.dumps([first.scores().to_dict(), compare(first, second).to_dict()])
    )


def test_scores_count_the_label_among_the_largest_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 20, generator=generator)
    labels = torch.randint(20, (500,), generator=generator)
    scores = predictions(logits, labels).scores()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert scores == Scores(500, int((logits.argmax(1) == labels).sum()), int(top5))
    assert scores.top1_percent == 100 * scores.top1 / 500
    assert json.loads(json.dumps(scores.to_dict()))["top5_percent"] == 100 * top5 / 500


def test_of_equal_logits_the_first_class_counts() -> None:
    scores = predictions(torch.zeros(8, 8), torch.arange(8)).scores()
    assert (scores.top1, scores.top5) == (1, 5)
    assert predictions(torch.zeros(8, 8), torch.arange(8)).predicted().tolist() == [0] * 8


@pytest.mark.parametrize("classes", [1, 3, 5])
def test_with_five_classes_or_fewer_every_image_is_in_the_top_five(classes: int) -> None:
    labels = torch.arange(6) % classes
    scores = predictions(torch.randn(6, classes), labels).scores()
    assert scores.top5 == 6 and scores.top5_percent == 100.0


def test_modules_run_in_eval_mode_and_get_their_modes_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, CLASSES))
    model[1].eval()
    first = evaluate(model, fake(5), batch_size=2, device="cpu")
    second = evaluate(model, fake(5), batch_size=2, device="cpu")
    assert torch.equal(first.logits, second.logits)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not first.logits.requires_grad


def test_modes_come_back_after_a_failure_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, CLASSES))
    with pytest.raises(RuntimeError):
        evaluate(model, fake(5), batch_size=2, device="cpu")
    assert model.training


def test_a_choice_of_images_is_evaluated_in_its_order() -> None:
    chosen = evaluate(linear(0), fake(20), batch_size=3, device="cpu", indices=[17, 4, 9, 0])
    everything = evaluate(linear(0), fake(20), batch_size=3, device="cpu")
    assert chosen.indices.tolist() == [17, 4, 9, 0]
    assert torch.allclose(chosen.logits, everything.logits[chosen.indices], atol=1e-6)


def test_logits_of_earlier_batches_are_not_kept_beside_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 50,000 images and 21,841 classes there is room for one copy, not for two."""
    parts: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def run(*arguments: object) -> Tensor:
        alive.append(sum(part() is not None for part in parts))
        logits = original(*arguments)  # type: ignore[arg-type]
        parts.append(weakref.ref(logits))
        return logits

    original = evaluation._run
    monkeypatch.setattr(evaluation, "_run", run)
    found = evaluate(linear(0), fake(11), batch_size=2, device="cpu")
    assert max(alive) <= 1 and found.logits.shape == (11, CLASSES)
    assert not found.logits.is_inference()


def test_progress_is_told_of_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def record(batches: object, label: str) -> Iterator[object]:
        seen.append((label, len(batches)))  # type: ignore[arg-type]
        yield from batches  # type: ignore[misc]

    evaluate(linear(0), fake(10), batch_size=3, device="cpu", progress=record, label="float")
    assert seen == [("float", 4)]
    evaluate(linear(0), fake(10), batch_size=3, device="cpu", progress=progress, label="int8")
    assert "int8: 4/4" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_name_the_images(value: float) -> None:
    data = fake(10)

    def model(images: Tensor) -> Tensor:
        logits = linear(0)(images)
        logits[1, 3] = value
        return logits

    with pytest.raises(SwinqError, match="NaN or Inf for 1 of 4") as caught:
        evaluate(model, data, batch_size=4, device="cpu")
    assert data.path(1) in str(caught.value) and data.path(2) not in str(caught.value)


def test_nan_in_the_padding_alone_does_not_matter() -> None:
    def model(images: Tensor) -> Tensor:
        logits = linear(0)(images)
        logits[1:] = math.nan
        return logits

    assert len(evaluate(model, fake(1), batch_size=4, device="cpu")) == 1


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = open_dataset(tmp_path, "val", eval_transform("squash", 8))
    with pytest.raises(DataError, match="no labels"):
        evaluate(linear(0), data, batch_size=4, device="cpu")


def test_a_label_without_a_logit_names_the_image_and_both_counts() -> None:
    with pytest.raises(DataError, match=r"fake/val/\d+ has label \d+, the model has 3 classes"):
        evaluate(linear(0, classes=3), fake(10), batch_size=4, device="cpu")


@pytest.mark.parametrize(
    "answer",
    [
        lambda images: images,
        lambda images: (linear(0)(images),),
        lambda images: linear(0)(images)[:2],
        lambda images: linear(0)(images)[0],
    ],
)
def test_answers_that_are_no_logits_are_refused(answer: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(SwinqError, match="want logits"):
        evaluate(answer, fake(4), batch_size=4, device="cpu")


def test_too_large_a_batch_for_the_device_says_what_to_try() -> None:
    def model(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SwinqError, match="--batch-size 32"):
        evaluate(model, fake(4), batch_size=64, device="cpu")
    with pytest.raises(SwinqError, match="fix: a larger GPU"):
        evaluate(model, fake(4), batch_size=64, device="cpu", if_too_large="a larger GPU")


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(linear(0), fake(4), batch_size=4, device="cpu", indices=[])
    with pytest.raises(ConfigError, match="batch size 0"):
        evaluate(linear(0), fake(4), batch_size=0, device="cpu")


def test_a_comparison_counts_who_is_right() -> None:
    right = torch.eye(4)
    reference = predictions(right[[0, 1, 2, 3, 3, 0]], [0, 1, 2, 3, 0, 1])
    other = predictions(right[[0, 1, 3, 0, 0, 2]], [0, 1, 2, 3, 0, 1])
    found = compare(reference, other)
    counts = (found.both_right, found.only_reference, found.only_other, found.neither)
    assert counts == (2, 2, 1, 1) and found.agree == 2 and found.images == 6
    assert found.difference == pytest.approx(-100 / 6)
    assert found.interval[0] < found.difference < found.interval[1]
    as_dict = json.loads(json.dumps(found.to_dict()))
    assert as_dict["p_value"] == 1.0 and as_dict["agreement_percent"] == pytest.approx(100 / 3)


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    same = evaluate(linear(0), fake(30), batch_size=8, device="cpu")
    found = compare(same, same)
    assert (found.agree, found.mean_kl, found.difference, found.p_value) == (30, 0.0, 0.0, 1.0)


def test_mean_kl_is_torchs_in_either_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (3 * torch.randn(200, 50, generator=generator) for _ in range(2))
    labels = torch.zeros(200, dtype=torch.int64)
    for p, q in ((first, second), (second, first)):
        expected = nn.functional.kl_div(
            q.double().log_softmax(1), p.double().softmax(1), reduction="batchmean"
        )
        found = compare(predictions(p, labels), predictions(q, labels)).mean_kl
        assert found == pytest.approx(expected.item(), abs=2**-32)


def test_mean_kl_does_not_depend_on_the_order_of_images() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(301, 40, generator=generator) for _ in range(2))
    labels = torch.zeros(301, dtype=torch.int64)
    expected = compare(predictions(first, labels), predictions(second, labels)).mean_kl
    for _ in range(5):
        order = torch.randperm(301, generator=generator)
        shuffled = compare(predictions(first[order], labels), predictions(second[order], labels))
        assert shuffled.mean_kl == expected


def test_mean_kl_of_models_far_apart_is_capped_not_overflowed() -> None:
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    first[:, 0], second[:, 1] = 3e38, 3e38
    found = compare(predictions(first, [0] * 3), predictions(second, [0] * 3))
    assert found.mean_kl == KL_CAP


def test_predictions_of_other_images_or_classes_are_not_compared() -> None:
    base = predictions(torch.zeros(4, 3), [0, 1, 2, 0])
    with pytest.raises(DataError, match="different images"):
        compare(base, predictions(torch.zeros(4, 3), [0, 1, 2, 1]))
    with pytest.raises(DataError, match="different images"):
        compare(base, predictions(torch.zeros(3, 3), [0, 1, 2]))
    with pytest.raises(SwinqError, match="3 and 5 classes"):
        compare(base, predictions(torch.zeros(4, 5), [0, 1, 2, 0]))
    none = predictions(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="no images"):
        compare(none, none)


@pytest.mark.parametrize(
    ("only_reference", "only_other", "expected"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 1, 1.0),
        (0, 5, 0.0625),
        (1, 9, 22 / 1024),  # 2 * (1 + 10) / 2**10
        (9, 1, 22 / 1024),
        (0, 1000, 2 / 2**1000),
        (0, 5000, 0.0),  # 2**-4999 is no float any more
    ],
)
def test_mcnemar_of_known_counts(only_reference: int, only_other: int, expected: float) -> None:
    assert mcnemar_exact(only_reference, only_other) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_by_log_gamma_continues_the_exact_sum() -> None:
    for n in (1025, 2500):
        for k in (n // 2, n // 2 - 5, n // 2 - 90, n // 3):
            exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
            assert mcnemar_exact(k, n - k) == pytest.approx(exact, rel=1e-9)


def test_mcnemar_keeps_its_level_when_nothing_differs() -> None:
    tosses = np.random.RandomState(0).binomial(60, 0.5, size=4000)
    false_alarms = np.mean([mcnemar_exact(int(k), 60 - int(k)) <= 0.05 for k in tosses])
    assert 0.01 < false_alarms <= 0.055


@pytest.mark.parametrize("images", [300, 3925])
@pytest.mark.parametrize(
    ("lost", "won"), [(0.01, 0.01), (0.004, 0.002), (0.03, 0.01), (0.1, 0.05), (0.3, 0.02)]
)
def test_the_interval_covers_the_true_difference_95_times_of_100(
    images: int, lost: float, won: float
) -> None:
    draws = np.random.RandomState(1).multinomial(images, [lost, won, 1 - lost - won], size=4000)
    covered = 0
    for only_reference, only_other, _ in draws.tolist():
        low, high = paired_interval(only_reference, only_other, images)
        covered += low <= won - lost <= high
    # 0.003 is one standard error of 4,000 draws; a handful of flips is coarse, the interval then
    # errs on the cautious side
    few = images * (lost + won) < 10
    assert 0.94 <= covered / 4000 <= (1.0 if few else 0.965)


@pytest.mark.parametrize(
    ("only_reference", "only_other", "images"),
    [(0, 0, 1), (0, 0, 3925), (1, 0, 1), (0, 50, 50), (7, 3, 500), (2000, 10, 50_000)],
)
def test_the_interval_holds_the_observed_difference_and_mirrors(
    only_reference: int, only_other: int, images: int
) -> None:
    low, high = paired_interval(only_reference, only_other, images)
    assert -1 <= low < high <= 1
    assert low <= (only_other - only_reference) / images <= high
    mirrored = paired_interval(only_other, only_reference, images)
    assert mirrored == pytest.approx((-high, -low))


def test_the_interval_has_the_published_width_for_large_samples() -> None:
    # 196 * sqrt(discordant share / images) points
    found = Comparison(50_000, 40_000, 250, 250, 9_500, 49_000, 0.01)
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(196 * math.sqrt(0.01 / 50_000), rel=0.01)


def test_the_digits_are_evaluated_whole() -> None:
    data = open_dataset("digits", "val", eval_transform("squash", 32), num_classes=10)
    template = torch.stack([data[i][0] for i in range(len(data))]).flatten(1)  # (355, 3072)
    means = torch.stack([template[data.labels == digit].mean(0) for digit in range(10)])

    def nearest_mean(images: Tensor) -> Tensor:
        return -torch.cdist(images.flatten(1), means)

    scores = evaluate(nearest_mean, data, batch_size=64, device="cpu").scores()
    assert scores.images == 355 and scores.top1_percent > 85
