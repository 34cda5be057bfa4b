"""--calib: the demo whole, recipes of every kind, unlabelled images, and files that repeat."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from swinq import cli
from swinq import config as configuration
from swinq.commands import report as report_command
from swinq.demo.checkpoint import CHECKPOINT
from swinq.export.reader import read_checkpoint
from swinq.flags import parse
from swinq.models.architecture import Architecture
from swinq.report.figures import size
from swinq.report.schema import Report, from_json
from tests.commands.command_line import (
    FEW,
    changed_micro_swin,
    done,
    metadata_of,
    refused,
    tensors_of,
    write_flat,
)
from tests.commands.conftest import Demo
from tests.export.calibrated_model import lively_model

MODES = (1, 2)
DIGITS = ("--resume", CHECKPOINT, "--data-path", "digits", "--workers", "0")


def report_of(folder: Path) -> Report:
    return from_json((folder / "report.json").read_text())


def folder_of(output: Path, name: str = "micro_swin_digits", tag: str = "default") -> Path:
    return output / name / tag


def recipe(path: Path, **quant: object) -> Path:
    path.write_text(yaml.safe_dump({"QUANT": quant}))
    return path


def test_demo_leaves_every_file(demo: Demo) -> None:
    names = {path.name for path in demo.folder.iterdir()}
    assert names == {
        *(f"report.{suffix}" for suffix in ("html", "md", "json", "csv")),
        *(
            f"micro_swin_digits_{kind}.safetensors"
            for kind in ("calib", "int8_mode1", "int8_mode2")
        ),
        "config.yaml",
        "tensorboard",
    }
    assert list((demo.folder / "tensorboard").glob("events.*"))
    assert (demo.folder / "report.html").stat().st_size < 2 * 2**20
    assert "http" not in (demo.folder / "report.html").read_text().split("<body", 1)[1]


def test_demo_says_that_it_is_one_and_what_to_do_next(demo: Demo) -> None:
    out = demo.ran.out
    assert "demo: the shipped micro-Swin on scikit-learn's handwritten digits" in out
    assert f"report: {demo.folder / 'report.html'}" in out
    assert out.splitlines()[-1].startswith("next: python swinq/main.py --calib --resume ")
    assert "calibrating: 80/80" in demo.ran.err


def test_demo_keeps_the_accuracy_of_the_float_model(demo: Demo) -> None:
    rows = {row.name: row for row in report_of(demo.folder).models}
    assert list(rows) == [
        "float",
        "fake-quant mode 1",
        "fake-quant mode 2",
        "INT8 mode 1",
        "INT8 mode 2",
    ]
    assert [rows[f"INT8 mode {mode}"].int8_mode for mode in MODES] == [1, 2]
    for row in rows.values():
        assert row.images == 355
        assert row.top1 >= 97
        if row.kind != "float":
            compared = row.comparison
            assert compared is not None
            assert compared.images == 355 and compared.agreement_percent >= 99
            assert compared.low <= compared.difference <= compared.high
            assert compared.mean_kl < 1e-2


def test_printed_table_is_the_reports(demo: Demo) -> None:
    for row in report_of(demo.folder).models:
        cells = demo.ran.row(row.name)
        assert cells[:2] == [f"{row.top1:.2f}", f"{row.top5:.2f}"]
        if row.comparison:
            assert f"{row.comparison.agreement_percent:.2f}" in cells


def test_demo_reports_layers_ranges_and_latency(demo: Demo) -> None:
    report = report_of(demo.folder)
    assert {row.name for row in report.latency} == {"float", "INT8 mode 1", "INT8 mode 2"}
    layers = {row.layer for row in report.layer_errors}
    assert len(layers) == 4 * 5 + 1  # qkv, attention, proj, fc1, fc2 of each block, and the merge
    assert report.sensitivity is not None and report.sensitivity.images == 2
    assert {row.layer for row in report.sensitivity.rows} == layers
    # inputs and weights of 17 linears, q, k, v of 4 attentions, outputs of 4 proj, 4 fc2, 1 merge
    assert len(report.quantizers) == 2 * 17 + 3 * 4 + 9
    roles = {file.role: file for file in report.files}
    assert set(roles) == {"checkpoint", "calibrated", "INT8 mode 1", "INT8 mode 2"}
    calibration, evaluation = report.data
    assert (calibration.images, evaluation.images) == (80, 355)
    assert len(calibration.sha256) == len(evaluation.sha256) == 64
    assert calibration.sha256 != evaluation.sha256
    command = f"python swinq/main.py --calib --output {demo.folder.parents[1]}"
    assert report.run.command == f"{command} --sensitivity-images 2"


def test_demo_report_compares_the_int8_file_with_the_checkpoint(demo: Demo) -> None:
    float_row = report_of(demo.folder).models[0]
    assert float_row.size_bytes == CHECKPOINT.stat().st_size
    page = (demo.folder / "report.html").read_text()
    assert "INT8 file" in page and f"against {size(float_row.size_bytes)} of the checkpoint" in page
    assert any("calibration took" in note for note in report_of(demo.folder).notes)
    assert report_of(demo.folder).warnings == []


def test_commands_that_are_advised_keep_the_ranks_and_quote_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "two words"
    words = ["torchrun", "--nproc_per_node", "8", "swinq/main.py"]
    monkeypatch.setattr(report_command, "launcher", lambda: words)
    ran = done("--calib", *DIGITS, *FEW, "--output", output, "--int8-mode", "1")
    advised = shlex.split(ran.out.splitlines()[-1].removeprefix("next: "))
    assert advised[:4] == words and advised[4] == "--eval"
    assert Path(advised[advised.index("--resume") + 1]).is_file()
    assert shlex.split(report_of(folder_of(output)).run.command)[:5] == [*words, "--calib"]


def test_large_evaluation_sets_are_digested_by_name_and_a_hub_folder_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_command, "DIGESTED_IMAGES", 19)  # one fewer than are evaluated
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copy(CHECKPOINT, hub / "model.safetensors")
    data = ("--data-path", "digits", "--workers", "0")
    done("--calib", "--resume", hub, *data, *FEW, "--output", tmp_path, "--int8-mode", "1")
    made = report_of(folder_of(tmp_path, "hub"))
    assert len(made.data[1].sha256) == 64
    assert any("20 evaluation images is of their names" in note for note in made.notes)
    assert made.files[0].path == str(hub / "model.safetensors")
    assert made.models[0].size_bytes == made.files[0].size_bytes


def test_int8_files_describe_their_calibration(demo: Demo) -> None:
    report = report_of(demo.folder)
    for mode in MODES:
        file = read_checkpoint(demo.checkpoint(f"int8_mode{mode}"), int8_mode=mode)
        assert file.calibration["images"] == 80
        assert file.calibration["method"] == "percentile"
        assert file.calibration["sample_sha256"] == report.data[0].sha256
        assert max(file.calibration["residual_max"].values()) < 100
        assert file.classes == [str(digit) for digit in range(10)]
        assert file.transform["resize"] == [32, 32]


def test_saved_configuration_means_the_same_command(demo: Demo) -> None:
    words = ["--calib", "--cfg", str(demo.folder / "config.yaml")]
    again, _ = cli.resolve(parse(words))
    saved = yaml.safe_load((demo.folder / "config.yaml").read_text())
    assert dict(configuration.leaves(again)) == dict(configuration.leaves(saved))


def test_calibrating_again_gives_the_same_tensors(demo: Demo, tmp_path: Path) -> None:
    """From the calibrated file, whose own ranges are left out, and with other batches."""
    done(
        *("--calib", "--resume", demo.checkpoint("calib"), "--data-path", "digits"),
        *("--workers", "0", "--num-calib-batch", "5", "--calib-batchsz", "16"),
        *("--eval-images", "20", "--sensitivity-images", "0", "--output", tmp_path),
    )
    folder = folder_of(tmp_path)
    for kind in ("calib", "int8_mode1", "int8_mode2"):
        first = tensors_of(demo.checkpoint(kind))
        second = tensors_of(folder / f"micro_swin_digits_{kind}.safetensors")
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            if name.endswith("_amax") and tensor.isnan().all():  # of a quantizer that no mode uses
                assert second[name].isnan().all(), name
            else:
                assert torch.equal(tensor, second[name]), (kind, name)


def test_version_two_goes_the_whole_way(tmp_path: Path, tiny_architecture_v2: Architecture) -> None:
    sizes = {"PATCH_SIZE": 2, "EMBED_DIM": 32, "DEPTHS": [2, 2], "NUM_HEADS": [1, 2]}
    sizes |= {"WINDOW_SIZE": 4, "MLP_RATIO": 2.0}
    cfg = tmp_path / "tiny.yaml"
    model = {"TYPE": "swinv2", "NAME": "tiny_v2", "NUM_CLASSES": 10, "SWINV2": sizes}
    cfg.write_text(yaml.safe_dump({"DATA": {"IMG_SIZE": 32}, "MODEL": model}))
    weights = tmp_path / "v2.pth"
    torch.save({"model": lively_model(tiny_architecture_v2).state_dict()}, weights)
    ran = done(
        *("--calib", "--cfg", cfg, "--resume", weights, "--version", "2", "--output", tmp_path),
        *("--data-path", "fake:24", "--workers", "0", *FEW),
    )
    report = report_of(folder_of(tmp_path, "tiny_v2"))
    assert len(report.models) == 5
    for row in report.models[1:]:
        assert row.comparison is not None and row.comparison.agreement_percent >= 90
    assert "FAKE random images" in ran.out
    (warning,) = report.warnings
    assert "random pixels" in warning and "mean nothing" in warning
    file = read_checkpoint(folder_of(tmp_path, "tiny_v2") / "tiny_v2_int8_mode1.safetensors")
    assert file.architecture == tiny_architecture_v2
    scales = file.tensors["layers.1.blocks.0.attn.q_scale"]
    assert scales.shape == (2,) and bool((scales <= 1 / 127).all())  # of normalised queries


def test_one_mode_is_written_where_one_is_asked_for(tmp_path: Path) -> None:
    files = tmp_path / "checkpoints"
    ran = done(
        "--calib", *FEW, "--output", tmp_path, "--int8-mode", "2", "--calib-output-path", files
    )
    names = {path.name for path in files.iterdir()}
    assert names == {
        "micro_swin_digits_calib.safetensors",
        "micro_swin_digits_int8_mode2.safetensors",
    }
    assert "mode 1" not in ran.out
    assert [row.name for row in report_of(folder_of(tmp_path)).models] == [
        "float",
        "fake-quant mode 2",
        "INT8 mode 2",
    ]


@pytest.mark.parametrize("method", ["max", "mse", "entropy"])
def test_every_method_runs_through(method: str, tmp_path: Path) -> None:
    done("--calib", *FEW, "--output", tmp_path, "--calibrator", method, "--int8-mode", "1")
    report = report_of(folder_of(tmp_path))
    assert {row.method for row in report.quantizers} >= {method, "max"}
    assert report.models[-1].top1 >= 95
    file = read_checkpoint(folder_of(tmp_path) / "micro_swin_digits_int8_mode1.safetensors")
    assert file.calibration["method"] == method


def test_fastertransformer_recipe_is_judged_but_not_exported(tmp_path: Path) -> None:
    ran = done("--calib", *DIGITS, *FEW, "--output", tmp_path, "--recipe", "fastertransformer")
    report = report_of(folder_of(tmp_path))
    assert [row.name for row in report.models] == [
        "float",
        "fake-quant mode 1",
        "fake-quant mode 2",
    ]
    assert any(note.startswith("not exported: ") and "static" in note for note in report.notes)
    assert "note: not exported: QUANT.ATTENTION.PROBABILITIES static" in ran.out
    assert not list(folder_of(tmp_path).glob("*int8*"))
    names = {row.name for row in report.quantizers}
    assert "layers.0.blocks.0.attn.a_quantizer" in names
    assert "layers.0.blocks.0.attn.qkv.output_quantizer" in names
    assert ran.out.splitlines()[-1].endswith("--recipe int8 --tag int8")  # what can be exported


def test_precision_of_each_layer_reaches_the_int8_file(tmp_path: Path) -> None:
    rules = [
        {"PATTERN": "layers.0.blocks.1.*", "PRECISION": "fp16"},
        {"PATTERN": "layers.1.blocks.0.attn", "PRECISION": "fp16"},
        {"PATTERN": "*.blocks.0.attn.proj", "PRECISION": "int8-unrounded"},
        {"PATTERN": "layers.0.downsample.reduction", "PRECISION": "int8-unrounded"},
        {"PATTERN": "layers.0.blocks.1.mlp.fc2", "PRECISION": "int8"},  # the later rule wins
    ]
    path = recipe(tmp_path / "mixed.yaml", LAYERS=rules)
    ran = done("--calib", *DIGITS, *FEW, "--output", tmp_path, "--recipe", path)
    file = read_checkpoint(folder_of(tmp_path) / "micro_swin_digits_int8_mode1.safetensors")
    unusual = {name: word for name, word in file.precision.items() if word != "int8"}
    assert unusual == {
        "layers.0.blocks.0.attn.proj": "int8-unrounded",
        "layers.0.blocks.1.attn.qkv": "fp16",
        "layers.0.blocks.1.attn": "fp16",
        "layers.0.blocks.1.attn.proj": "fp16",
        "layers.0.blocks.1.mlp.fc1": "fp16",
        "layers.0.downsample.reduction": "int8-unrounded",
        "layers.1.blocks.0.attn": "fp16",
        "layers.1.blocks.0.attn.proj": "int8-unrounded",
    }
    assert file.tensors["layers.0.blocks.1.mlp.fc1.weight"].dtype == torch.float16
    assert "layers.0.downsample.reduction.output_scale" not in file.tensors
    for mode in MODES:
        assert ran.row(f"INT8 mode {mode}")[0] == "100.00"


def test_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.yaml", LAYERS=[{"PATTERN": "layers.9.*", "PRECISION": "fp16"}])
    message = refused("--calib", *DIGITS, *FEW, "--output", tmp_path, "--recipe", path)
    assert "'layers.9.*' matches no layer" in message


def test_images_without_labels_are_enough_to_calibrate(tmp_path: Path) -> None:
    images = write_flat(tmp_path / "flat")
    ran = done(
        *("--calib", "--resume", CHECKPOINT, "--data-path", images, "--workers", "0"),
        *("--num-calib-batch", "2", "--calib-batchsz", "4", "--output", tmp_path),
        *("--sensitivity-images", "2"),
    )
    assert "accuracy was not measured" in ran.out and "has no labels" in ran.out
    report = report_of(folder_of(tmp_path))
    assert report.models == [] and report.sensitivity is not None
    assert report.data[0].images == 8
    assert len(report.latency) == 3
    for mode in MODES:
        read_checkpoint(folder_of(tmp_path) / f"micro_swin_digits_int8_mode{mode}.safetensors")


def hidden_by_an_outlier() -> dict[str, Tensor]:
    """One channel of q is loud and the same one of k quiet: the float function is unchanged.

    With one scale for all channels the others' codes become 0, and attention sees nothing.
    """
    name = "layers.0.blocks.0.attn.qkv"
    tensors = tensors_of(CHECKPOINT)
    weight, bias = tensors[f"{name}.weight"].clone(), tensors[f"{name}.bias"].clone()
    for row, factor in ((3, 2.0**10), (32 + 3, 2.0**-10)):  # rows are 32 of q, 32 of k, 32 of v
        weight[row] *= factor
        bias[row] *= factor
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def test_suggested_recipe_can_be_run_at_once(tmp_path: Path) -> None:
    weights = changed_micro_swin(tmp_path / "outlier.safetensors", hidden_by_an_outlier())
    path = tmp_path / "own.yaml"
    calib = {"METHOD": "mse", "NUM_BATCHES": 2}
    path.write_text(yaml.safe_dump({"QUANT": {"BIAS_CORRECTION": False}, "CALIB": calib}))
    ran = done(
        *("--calib", "--resume", weights, "--data-path", "digits", "--workers", "0", "--tag=first"),
        *("--recipe", path, "--eval-images", "80", "--batch-size", "40"),
        *("--sensitivity-images", "6", "--output", tmp_path),
    )
    folder = folder_of(tmp_path, "outlier", "first")
    report = report_of(folder)
    assert report.sensitivity is not None and report.sensitivity.suggestion is not None
    assert "layers.0.blocks.0.attn" in report.sensitivity.suggestion.layers
    _, script, *words = shlex.split(ran.out.splitlines()[-1].removeprefix("next: "))
    assert script == "swinq/main.py"
    assert words[words.index("--recipe") + 1] == str(folder / "suggested_recipe.yaml")
    suggested = yaml.safe_load((folder / "suggested_recipe.yaml").read_text())
    assert suggested["CALIB"] == calib and suggested["QUANT"]["BIAS_CORRECTION"] is False
    again = done(*words)
    before, after = (float(r.row("INT8 mode 1")[6]) for r in (ran, again))  # agreement with float
    assert after > before
    better = report_of(folder_of(tmp_path, "outlier", "excluded")).models[-1]
    assert better.comparison is not None and better.comparison.agreement_percent >= 98
    file = folder_of(tmp_path, "outlier", "excluded") / "outlier_int8_mode1.safetensors"
    assert read_checkpoint(file).precision["layers.0.blocks.0.attn"] == "fp16"


def test_int8_checkpoint_cannot_be_calibrated(demo: Demo, tmp_path: Path) -> None:
    file = demo.checkpoint("int8_mode1")
    message = refused("--calib", "--resume", file, "--data-path", "digits", "--output", tmp_path)
    assert f"{file} is an exported INT8 checkpoint" in message
    assert "the float checkpoint it was made from" in message


def test_a_calibrated_file_is_not_calibrated_over_itself(demo: Demo, tmp_path: Path) -> None:
    file = Path(shutil.copy(demo.checkpoint("calib"), tmp_path))
    before = file.read_bytes()
    again = ("--calib", "--resume", file, "--data-path", "digits", "--calib-output-path", tmp_path)
    message = refused(*again, "--output", tmp_path / "results")
    assert f"--resume {file} is the file that this run would write" in message
    assert "--tag NAME" in message and file.read_bytes() == before
    assert not (tmp_path / "results").exists()  # nor is the configuration of another run replaced


def test_float_weights_of_the_calibrated_file_are_the_ones_it_was_given(demo: Demo) -> None:
    calibrated, given = tensors_of(demo.checkpoint("calib")), tensors_of(CHECKPOINT)
    assert all(torch.equal(calibrated[name], given[name]) for name in given)
    assert metadata_of(demo.checkpoint("calib"))["format"] == "swinq-calibrated"
