"""--eval: the right transform, every kind of checkpoint, and contradictions named."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import swinq
from swinq import cli
from swinq.data.datasets import open_dataset
from swinq.data.sampling import calibration_indices
from swinq.data.transforms import eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.evaluate import evaluate
from swinq.flags import parse
from swinq.models.build import build_model
from swinq.preflight import architecture
from swinq.report.schema import from_json
from tests.commands.command_line import FEW, done, refused, write_digits, write_flat
from tests.commands.conftest import Demo
from tests.export.faster_transformer import named_by_faster_transformer

DIGITS = ("--data-path", "digits", "--workers", "0")


def results(output: Path, stem: str) -> dict[str, dict[str, float]]:
    """Rows of a checkpoint's eval_*.json by model."""
    folder = output / stem.removesuffix("_calib") / "default"
    saved = json.loads((folder / f"eval_{stem}.json").read_text())
    return {row["model"]: row for row in saved["results"]}


@pytest.mark.parametrize(
    ("kind", "models"),
    [
        ("calib", ["fake-quant mode 1", "fake-quant mode 2"]),
        ("int8_mode1", ["INT8 mode 1"]),
        ("int8_mode2", ["INT8 mode 2"]),
    ],
)
def test_scores_of_a_file_are_those_in_the_report(
    kind: str, models: list[str], demo: Demo, tmp_path: Path
) -> None:
    file = demo.checkpoint(kind)
    ran = done("--eval", "--resume", file, *DIGITS, "--output", tmp_path)
    assert "squash (bicubic resize 32x32)" in ran.out  # recorded in the file
    reported = from_json((demo.folder / "report.json").read_text()).models
    found = results(tmp_path, file.stem)
    assert list(found) == models
    for row in reported:
        if row.name in models:
            assert found[row.name]["images"] == row.images == 355
            assert found[row.name]["top1_percent"] == row.top1
            assert found[row.name]["top5_percent"] == row.top5
            assert ran.row(row.name) == ["355", f"{row.top1:.3f}", f"{row.top5:.3f}"]


def test_demo_alone_is_evaluated_in_float(tmp_path: Path) -> None:
    ran = done("--eval", "--output", tmp_path)
    assert ran.row("float")[0] == "355"
    assert results(tmp_path, "micro_swin_digits")["float"]["top1"] == 353


def test_a_stated_transform_wins_over_the_recorded_one(demo: Demo, tmp_path: Path) -> None:
    file = demo.checkpoint("int8_mode1")
    argv = ("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--eval-images", "8")
    said = done(*argv, "--eval-transform", "official").out
    assert "official (bicubic resize 36, centre crop 32)" in said
    said = done(*argv, "--opts", "DATA.INTERPOLATION", "bilinear").out
    assert "squash (bilinear resize 32x32)" in said


def test_a_files_crop_yields_to_the_recorded_transform(demo: Demo, tmp_path: Path) -> None:
    cfg = tmp_path / "model.yaml"
    saved = yaml.safe_load((demo.folder / "config.yaml").read_text())
    model = {"TEST": {"CROP": True}, "DATA": {"IMG_SIZE": 32}, "MODEL": saved["MODEL"]}
    cfg.write_text(yaml.safe_dump(model))
    file = demo.checkpoint("int8_mode1")
    argv = ("--eval", "--cfg", cfg, "--resume", file, *DIGITS, "--eval-images", "8")
    assert "squash (bicubic resize 32x32)" in done(*argv, "--output", tmp_path).out
    typed = done(*argv, "--output", tmp_path, "--opts", "TEST.CROP", "true").out
    assert "official (bicubic resize 36, centre crop 32)" in typed


def test_evaluating_a_runs_files_replaces_none_of_it(tmp_path: Path) -> None:
    done("--calib", *FEW, "--output", tmp_path)
    folder = tmp_path / "micro_swin_digits" / "default"
    before = (folder / "config.yaml").read_bytes()
    for kind in ("calib", "int8_mode1"):
        file = folder / f"micro_swin_digits_{kind}.safetensors"
        done(
            *("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--eval-images", "8"),
            *("--opts", "MODEL.NAME", "micro_swin_digits"),
        )
        assert (folder / f"eval_micro_swin_digits_{kind}.json").exists()
    assert (folder / "config.yaml").read_bytes() == before
    assert (folder / "config_eval.yaml").exists()


def test_a_cache_mode_for_plain_folders_is_said_to_change_nothing(
    demo: Demo, tmp_path: Path
) -> None:
    data = write_digits(tmp_path / "digits")
    argv = ("--eval", "--resume", demo.checkpoint("int8_mode1"), "--data-path", data)
    ran = done(*argv, "--workers", "0", "--output", tmp_path, "--cache-mode", "full")
    assert "note: --cache-mode changes nothing" in ran.out


@pytest.mark.parametrize(
    ("size", "wanted"), [(224, "resize 256, centre crop 224"), (384, "resize 384x384")]
)
def test_without_a_recorded_transform_the_official_one_of_the_size_is_taken(
    size: int, wanted: str, tmp_path: Path
) -> None:
    window = 7 if size == 224 else 12
    sizes = {"EMBED_DIM": 32, "DEPTHS": [1], "NUM_HEADS": [1], "WINDOW_SIZE": window}
    model = {"TYPE": "swin", "NUM_CLASSES": 7, "SWIN": {**sizes, "PATCH_SIZE": 8}}
    cfg = tmp_path / "model.yaml"
    cfg.write_text(yaml.safe_dump({"DATA": {"IMG_SIZE": size}, "MODEL": model}))
    config, _ = cli.resolve(parse(["--throughput", "--cfg", str(cfg)]))
    weights = tmp_path / "swin.pth"  # as microsoft's code saves it, without any metadata
    torch.save({"model": build_model(architecture(config)).state_dict()}, weights)
    ran = done(
        *("--eval", "--cfg", cfg, "--resume", weights, "--data-path", "fake:2", "--workers", "0"),
        *("--batch-size", "2", "--output", tmp_path),
    )
    assert f"official (bicubic {wanted})" in ran.out
    assert "FAKE random images" in ran.out


def test_mode_of_a_calibrated_file_can_be_chosen(demo: Demo, tmp_path: Path) -> None:
    file = demo.checkpoint("calib")
    argv = ("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--eval-images", "16")
    assert results_of(done(*argv, "--int8-mode", "2").out) == ["fake-quant mode 2"]


def results_of(out: str) -> list[str]:
    """Names in the printed table."""
    rule = next(i for i, line in enumerate(out.splitlines()) if line.startswith("---"))
    return [line.split("  ")[0] for line in out.splitlines()[rule + 1 : -1]]


def test_other_mode_than_the_files_is_refused(demo: Demo, tmp_path: Path) -> None:
    file = demo.checkpoint("int8_mode1")
    message = refused("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--int8-mode", "2")
    assert f"--int8-mode 2 is given, but {file} was exported in mode 1" in message
    assert "use --int8-mode 1" in message


def test_mode_of_a_float_file_is_refused(tmp_path: Path) -> None:
    message = refused(
        *("--eval", "--resume", CHECKPOINT, *DIGITS, "--output", tmp_path, "--int8-mode", "1")
    )
    assert "--int8-mode 1 is given" in message and "float checkpoint" in message
    assert "--calib" in message


@pytest.mark.parametrize("kind", ["float", "calib", "int8_mode1"])
def test_wrong_version_is_refused(kind: str, demo: Demo, tmp_path: Path) -> None:
    file = CHECKPOINT if kind == "float" else demo.checkpoint(kind)
    argv = ("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--eval-images", "4")
    message = refused(*argv, "--version", "2")
    assert "--version 2 is given" in message and "Swin of version 1" in message
    done(*argv, "--version", "1")


@pytest.mark.parametrize(
    ("key", "value", "held"),
    [
        ("MODEL.SWIN.WINDOW_SIZE", "7", "window_size 4"),
        ("MODEL.NUM_CLASSES", "11", "num_classes 10"),
        ("DATA.IMG_SIZE", "64", "img_size 32"),
        ("MODEL.SWIN.DEPTHS", "[2,6]", "depths [2, 2]"),
    ],
)
@pytest.mark.parametrize("kind", ["float", "int8_mode1"])
def test_stated_size_that_is_not_the_files_is_refused(
    kind: str, key: str, value: str, held: str, demo: Demo, tmp_path: Path
) -> None:
    file = CHECKPOINT if kind == "float" else demo.checkpoint(kind)
    message = refused(
        *("--eval", "--resume", file, *DIGITS, "--output", tmp_path, "--opts", key, value)
    )
    assert f"{key} is {value.replace(',', ', ')} (--opts)" in message
    assert held in message and "--pretrained" in message


@pytest.mark.parametrize("kind", ["float", "calib", "int8_mode1"])
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("MODEL.SWIN.WINDOW_SIZE", "8", "window"), ("MODEL.NUM_CLASSES", "11", "num_classes: 10")],
)
def test_configuration_of_another_model_is_refused(
    kind: str, key: str, value: str, named: str, demo: Demo, tmp_path: Path
) -> None:
    file = CHECKPOINT if kind == "float" else demo.checkpoint(kind)
    argv = ("--eval", "--cfg", "demo", "--resume", file, "--output", tmp_path)
    message = refused(*argv, "--opts", key, value)
    assert named in message and value in message


def test_other_windows_are_fitted_when_asked_for(tmp_path: Path) -> None:
    ran = done(
        *("--eval", "--cfg", "demo", "--pretrained", CHECKPOINT, "--output", tmp_path),
        *("--opts", "MODEL.SWIN.WINDOW_SIZE", "8", "DATA.IMG_SIZE", "64"),
        *("--eval-images", "32", "--batch-size", "32"),
    )
    assert "window 8, 64 px" in ran.out
    assert float(ran.row("float")[1]) > 50  # twice as large digits, still mostly right


def test_data_of_other_classes_are_refused(demo: Demo, tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images", classes=4)
    message = refused(
        *("--eval", "--resume", demo.checkpoint("int8_mode1"), "--data-path", images),
        *("--output", tmp_path),
    )
    assert "holds 4 classes" in message and "the model has 10" in message


def test_images_without_labels_cannot_be_evaluated(demo: Demo, tmp_path: Path) -> None:
    images = write_flat(tmp_path / "flat")
    message = refused(
        *("--eval", "--resume", demo.checkpoint("int8_mode1"), "--data-path", images),
        *("--workers", "0", "--output", tmp_path),
    )
    assert "no labels" in message and "val/<class>/<image>" in message


def test_classes_that_the_checkpoint_numbers_otherwise_are_refused(tmp_path: Path) -> None:
    """Scores would be wrong without a sign: every label means another class."""
    images = write_digits(tmp_path / "images")
    argv = ("--eval", "--resume", CHECKPOINT, "--data-path", images, "--output", tmp_path)
    done(*argv, "--workers", "0")
    for split in ("train", "val"):
        (images / split / "0").rename(images / split / "zero")
    message = refused(*argv, "--workers", "0")
    assert "class 1 is number 0 in" in message and "number 1 in the checkpoint" in message


def test_a_sample_of_the_images_is_the_same_one_each_time(demo: Demo, tmp_path: Path) -> None:
    argv = ("--eval", "--resume", demo.checkpoint("int8_mode1"), *DIGITS, "--eval-images", "40")
    first = done(*argv, "--output", tmp_path / "1", "--batch-size", "40")
    second = done(*argv, "--output", tmp_path / "2", "--batch-size", "7")
    assert first.row("INT8 mode 1") == second.row("INT8 mode 1")
    assert first.row("INT8 mode 1")[0] == "40"


def test_a_sample_is_drawn_from_all_images_by_the_seed(tmp_path: Path) -> None:
    argv = ("--eval", "--resume", CHECKPOINT, "--data-path", "fake:400", "--workers", "0")
    done(*argv, "--eval-images", "60", "--seed", "3", "--output", tmp_path)
    found = results(tmp_path, CHECKPOINT.stem)["float"]
    model = swinq.load(CHECKPOINT)
    images = open_dataset("fake:400", "val", eval_transform("squash", 32), num_classes=10)

    def right(indices: Sequence[int]) -> tuple[float, float]:
        run = evaluate(model, images, batch_size=20, device="cpu", indices=indices)
        scores = run.scores()
        return scores.top1_percent, scores.top5_percent

    drawn = (found["top1_percent"], found["top5_percent"])
    assert drawn == right(calibration_indices(400, 60, 3))
    assert drawn != right(range(60))  # nor would these do
    assert drawn != right(calibration_indices(400, 60, 0))


def test_faster_transformers_own_file_is_evaluated_under_its_recipe(tmp_path: Path) -> None:
    done("--calib", *FEW, "--output", tmp_path, "--recipe", "fastertransformer")
    calibrated = tmp_path / "micro_swin_digits" / "default" / "micro_swin_digits_calib.safetensors"
    state = named_by_faster_transformer(swinq.load(calibrated))
    state["layers.0.blocks.0.attn.softmax_input_quantizer._amax"] = torch.tensor(2.0)
    torch.save({"model": state}, tmp_path / "ancestor.pth")
    argv = (
        "--eval",
        "--cfg",
        "demo",
        "--output",
        tmp_path,
        "--tag",
        "again",
        "--eval-images",
        "60",
    )
    ours = done(*argv, "--resume", calibrated)
    theirs = done(*argv, "--resume", tmp_path / "ancestor.pth")
    for mode in (1, 2):
        assert theirs.row(f"fake-quant mode {mode}") == ours.row(f"fake-quant mode {mode}")
    assert "note: ranges without a place in swinq, dropped: 1 softmax_input_quantizer" in theirs.out
