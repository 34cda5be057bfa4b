"""--engine: the CUDA engine runs INT8 where it is asked for, and every output says what ran."""

import json
from pathlib import Path

import pytest
import torch

import swinq
from swinq import api
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import ConfigError, EngineError
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin
from swinq.int8.library import VARIABLE
from swinq.int8.model import Int8Swin
from swinq.report.schema import from_json
from tests.commands.command_line import FEW, done, refused
from tests.commands.conftest import Demo
from tests.int8 import fake_engine

DIGITS = ("--data-path", "digits", "--workers", "0", "--eval-images", "8")


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_engine.built(tmp_path_factory.mktemp("library"))


@pytest.fixture
def fake(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for libswinq, with the CPU for its GPU."""
    fake_engine.use(library_path, monkeypatch)


def test_demanded_engine_that_cannot_be_had_stops_before_any_work(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.so"))
    for action in (("--calib",), ("--eval", "--resume", demo.checkpoint("int8_mode1"), *DIGITS)):
        message = refused(*action, "--engine", "cuda", "--device", "cpu", "--output", tmp_path)
        assert "cannot run on cpu, wanted a CUDA device" in message and "reference" in message
    assert list(tmp_path.iterdir()) == []


def test_reference_is_named_where_it_runs(demo: Demo, tmp_path: Path) -> None:
    argv = ("--eval", "--resume", demo.checkpoint("int8_mode1"), *DIGITS, "--output", tmp_path)
    for engine in ("auto", "reference"):
        said = done(*argv, "--device", "cpu", "--engine", engine).out
        assert "10 classes, run by the reference from" in said
    saved = next(tmp_path.rglob("eval_*.json")).read_text()
    assert json.loads(saved)["results"][0]["engine"] == "the reference"


@pytest.mark.usefixtures("fake")
def test_engine_evaluates_a_file_and_a_float_model(demo: Demo, tmp_path: Path) -> None:
    argv = ("--eval", *DIGITS, "--engine", "cuda", "--output", tmp_path)
    said = done(*argv, "--resume", demo.checkpoint("int8_mode1"))
    assert "run by libswinq fake" in said.out and said.row("INT8 mode 1")[0] == "8"
    rows = json.loads(next(tmp_path.rglob("eval_*.json")).read_text())["results"]
    assert [row["engine"] for row in rows] == ["libswinq fake"]
    said = done(*argv, "--resume", CHECKPOINT)
    assert said.row("float")[0] == said.row("FP16, CUDA engine")[0] == "8"


@pytest.mark.usefixtures("fake")
def test_engine_is_timed_with_and_without_a_graph(demo: Demo, tmp_path: Path) -> None:
    argv = ("--throughput", "--batch-size", "2", "--output", tmp_path, "--engine")
    said = done(*argv, "cuda", "--resume", demo.checkpoint("int8_mode1"))
    for name in ("INT8 mode 1", "INT8 mode 1, CUDA graph"):
        assert said.row(name)[0] == "2"
    said = done(*argv, "cuda", "--resume", CHECKPOINT)
    for name in ("float", "FP16, CUDA engine", "FP16, CUDA engine, CUDA graph"):
        assert said.row(name)[0] == "2"
    config = demo.folder / "config.yaml"
    said = done(*argv, "cuda", "--cfg", config, "--opts", "DEMO", "false")
    assert said.row("FP16, CUDA engine")[0] == "2"
    said = done(*argv, "reference", "--resume", CHECKPOINT)
    assert "FP16" not in said.out


@pytest.mark.usefixtures("fake")
def test_report_has_rows_of_the_engine_and_names_it(tmp_path: Path) -> None:
    said = done("--calib", *FEW, "--engine", "cuda", "--output", tmp_path)
    report = from_json(next(tmp_path.rglob("report.json")).read_text())
    assert {row.name: row.engine for row in report.models} == {
        "float": "",
        "fake-quant mode 1": "",
        "fake-quant mode 2": "",
        "INT8 mode 1": "libswinq fake",
        "INT8 mode 2": "libswinq fake",
    }
    assert {row.name: (row.kind, row.engine) for row in report.latency} == {
        "float": ("float", ""),
        "FP16, CUDA engine": ("float", "libswinq fake, CUDA graph"),
        "INT8 mode 1": ("int8", "libswinq fake, CUDA graph"),
        "INT8 mode 2": ("int8", "libswinq fake, CUDA graph"),
    }
    assert "libswinq" not in " ".join(report.notes)
    for kind in ("html", "md", "csv"):
        assert "libswinq fake, CUDA graph" in next(tmp_path.rglob(f"report.{kind}")).read_text()
    assert "error" not in said.err


def test_report_says_why_the_reference_ran_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Int8Swin.load

    def fallen_back(path: Path, **options: object) -> Int8Swin:
        model = load(path)
        model.notes.append("the reference runs this model on cuda:0, not libswinq: too old")
        return model

    monkeypatch.setattr("swinq.int8.choice.load", fallen_back)
    said = done("--calib", *FEW, "--output", tmp_path)
    assert said.out.count("note: the reference runs this model on cuda:0") == 1
    report = from_json(next(tmp_path.rglob("report.json")).read_text())
    assert sum("not libswinq: too old" in note for note in report.notes) == 1


def test_dry_run_tells_which_engine_would_run(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--eval", "--resume", demo.checkpoint("int8_mode1"), *DIGITS, "--dry-run")
    argv = (*argv, "--output", tmp_path, "--engine")
    assert "ok    engine: the reference" in done(*argv, "auto", "--device", "cpu").out
    assert "ok    engine: the reference" in done(*argv, "reference").out
    monkeypatch.setattr("swinq.distributed.select_device", lambda name: torch.device("cuda", 0))

    def refuse(device: object) -> torch.device:
        raise EngineError("too old a GPU", "use another")

    monkeypatch.setattr(devices, "require", refuse)
    assert "engine: the reference, as too old a GPU" in done(*argv, "auto").out
    assert "FAIL  engine: too old a GPU" in refused_in_dry_run(*argv, "cuda")
    monkeypatch.setattr(devices, "require", lambda device: device)
    assert "ok    engine: libswinq" in done(*argv, "auto").out


def refused_in_dry_run(*argv: object) -> str:
    """What a dry run that fails prints."""
    from tests.commands.command_line import swinq as run

    ran = run(*argv)
    assert ran.code == 2
    return ran.out


@pytest.mark.usefixtures("fake")
def test_python_api_reaches_the_engine(demo: Demo) -> None:
    int8 = swinq.load(demo.checkpoint("int8_mode1"), engine="cuda")
    assert isinstance(int8, CudaSwin) and int8.int8_mode == 1
    assert api.device_of(int8) == torch.device("cpu")
    transform = api.transform_of(int8)
    assert transform is not None and transform.img_size == 32
    assert swinq.run(int8, torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    model = swinq.load(CHECKPOINT)
    half = swinq.cuda_model(model)
    assert half.int8_mode is None and half.classes == model.classes
    assert api.transform_of(half) == api.transform_of(model)
    assert swinq.evaluate_model(half, "digits").scores().images == 355
    with pytest.raises(ConfigError, match="quantized already"):
        swinq.calibrate(half, [])
