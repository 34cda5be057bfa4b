"""The GPU benchmarks, as far as one gets without a GPU: tasks, records, tables, work, images."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark
import benchmark_accuracy
import check_large_windows
import profile_kernels
import pytest
import torch
from benchmarking import ours, peers, task
from benchmarking.cases import BATCHES, FIRST, FORMS, MODELS, TUNED, Task, tasks
from benchmarking.decoded import decoded
from benchmarking.records import Record
from benchmarking.schedule import run_all
from benchmarking.tables import renderers, rewrite, rewrite_all
from benchmarking.timing import Step
from benchmarking.turn import Turn
from benchmarking.worker import STOPPED

from swinq.data.datasets import open_dataset
from swinq.data.transforms import eval_transform
from swinq.errors import ConfigError
from swinq.export.format import expected_tensors
from swinq.int8.model import Int8Swin
from swinq.models.variants import find_variant
from tests.int8.made_checkpoint import made_architecture, made_checkpoint

REPO_ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TIMES = {"warm_ms": 1.0, "cold_ms": 1.5}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )


def row(model: str = FIRST, batch: int = 32, form: str = "compile", **more: object) -> dict:
    return {"model": model, "batch": batch, "form": form, **(more or TIMES)}


# --- what is measured ---


def test_models_are_the_official_ones_and_timms() -> None:
    timm = pytest.importorskip("timm")
    for model in MODELS.values():
        arch = find_variant(model.name)
        assert arch is not None and arch.num_classes == 1000
        assert (arch.version, arch.img_size) == (model.version, model.img_size)
        assert timm.is_model(model.timm)
        assert f"w{arch.window_size} {arch.img_size}" in model.title


def test_usual_tasks_cover_what_the_tables_want() -> None:
    keys = [key for t in tasks(list(MODELS.values()), None, None) for key in t.rows()]
    assert len(keys) == len(set(keys))
    for name in MODELS:
        compiled = BATCHES if name == FIRST else (1, 32)
        assert {b for m, b, f in keys if (m, f) == (name, "compile")} == set(compiled)
        assert {b for m, b, f in keys if (m, f) == (name, "swinq-int8-1")} == set(BATCHES)
    assert {m for m, _, f in keys if f == "compile-sdpa"} == {FIRST}
    assert not [key for key in keys if key[2] == TUNED]
    assert {form for _, _, form in keys} == set(FORMS) - {TUNED}


def test_each_compilation_is_a_process_and_nothing_is_measured_twice() -> None:
    models = [MODELS[FIRST]]
    found = tasks(models, ["compile", "eager", TUNED], [], have=[(FIRST, 8, "compile")])
    assert all(len(t.rows()) == 1 for t in found if FORMS[t.forms[0]].compiled)
    assert Task(FIRST, ("compile",), (8,)) not in found
    assert Task(FIRST, ("eager",), BATCHES) in found
    assert Task(FIRST, (TUNED,), (1,)) in found
    assert tasks(models, ["eager"], [], [4]) == [Task(FIRST, ("eager",), (4,))]


def test_fused_attention_is_asked_of_version_1_alone() -> None:
    v2 = [model for model in MODELS.values() if model.version == 2]
    assert tasks(v2, ["compile-sdpa"], []) == []


def test_list_needs_no_gpu() -> None:
    ran = run_script("scripts/benchmark.py", "--list", "--models", FIRST, "--ours")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert f"{FIRST}: compile at batch 32" in ran.stdout and "swinq" not in ran.stdout


@pytest.mark.parametrize("again", [False, True])
def test_measured_rows_are_measured_again_only_if_asked(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "latency.json")
    record.begin("NVIDIA H100", {})
    record.add(row(batch=32))
    arguments = ["benchmark.py", "--json", str(record.path), "--list", "--models", FIRST]
    arguments += ["--peers", "compile", "--ours", "--batches", "1", "32"]
    monkeypatch.setattr(sys, "argv", [*arguments, *["--again"] * again])
    assert benchmark.main() == 0
    assert ("at batch 32" in capsys.readouterr().out) is again


# --- one process ---


def test_a_failing_form_is_a_row_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise RuntimeError("no kernel\nfor you")

    def steps(*_: object) -> list[Step]:
        nan = Step("graph", 1, lambda: lambda: torch.tensor([float("nan")]))
        good = Step("eager", 1, lambda: lambda: torch.zeros(1), {"freezing": True})
        return [Step("trace", 1, broken), nan, good]  # type: ignore[arg-type]

    monkeypatch.setattr(peers, "runs", steps)
    said: list[dict] = []
    task.run(Task(FIRST, ("eager",), (1,)), CPU, Turn(), said.append)
    by_form = {r["form"]: r for r in said}
    assert by_form["trace"]["error"] == "RuntimeError: no kernel\nfor you"
    assert "not finite" in by_form["graph"]["error"]
    assert by_form["eager"]["warm_ms"] > 0 and by_form["eager"]["freezing"] is True
    assert by_form["eager"]["cold"]["repeats"] >= 20


def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peers build models of three blocks."""
    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 32, "num_classes": 10}
    sizes |= {"depths": (1, 2), "num_heads": (1, 2)}
    whole = peers.build
    monkeypatch.setattr(peers, "build", lambda *a, **k: whole(*a, **k, **sizes))


@pytest.mark.filterwarnings("ignore")
def test_peers_of_both_versions_give_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    for name in (FIRST, "swinv2_tiny_patch4_window8_256"):
        model = peers.build(MODELS[name], CPU, torch.float32)
        images = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            eager = peers.made("eager", model, images, Turn(), {})()
            traced = peers.made("trace", model, images, Turn(), {})()
        assert eager.shape == (2, 10) and float(eager.std()) > 0
        torch.testing.assert_close(traced, eager)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiling_freezes_and_takes_the_turn_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny(monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    asked: list[str] = []
    turn = Turn(tmp_path / "turn", lambda: asked.append("once"))
    model = peers.build(MODELS["swinv2_tiny_patch4_window8_256"], CPU, torch.float32)
    images = torch.randn(2, 3, 64, 64)
    about: dict = {}
    with torch.inference_mode():
        compiled = peers.made("compile", model, images, turn, about)()
        torch.testing.assert_close(compiled, model(images), rtol=1e-3, atol=1e-4)
    assert about == {"freezing": True}
    assert turn.taken and asked == ["once"]


def test_a_borrowed_turn_is_one_processs_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    first, second = Turn(path), Turn(path)
    order: list[str] = []
    with first.borrow():
        waiting = threading.Thread(target=second.borrowing(order.append), args=("second",))
        waiting.start()
        with first.borrow():
            time.sleep(0.1)
        time.sleep(0.1)  # the inner one gave nothing away
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_turn_is_asked_for_once_and_then_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    asked: list[str] = []
    taker, other = Turn(path, lambda: asked.append("may I")), Turn(path)
    taker.take()
    taker.take()
    with other.borrow(), taker.borrow():
        assert asked == ["may I"]
    Turn().take()  # by default it is always one's turn


# --- many processes ---


def fake_task(tmp_path: Path, body: str) -> list[str]:
    """A command that behaves like `benchmark.py --task ...`."""
    script = tmp_path / "task.py"
    head = "import json, os, sys, time\nsaid = json.loads(sys.argv[sys.argv.index('--task') + 1])\n"
    say = "def say(**r): print('ROW ' + json.dumps(r), flush=True)\n"
    take = "def take(): print('READY', flush=True); assert sys.stdin.readline()\n"
    script.write_text(head + say + take + body)
    return [sys.executable, str(script)]


def test_one_is_timed_when_all_of_its_round_are_ready(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = fake_task(
        tmp_path,
        f"def note(what): open({str(log)!r}, 'a').write(said['model'] + ' ' + what + '\\n')\n"
        "name = said['model']\n"
        "time.sleep({'slow': 0.4, 'dies': 0.2}.get(name, 0))\n"
        "note('made')\n"
        "if name == 'dies': os._exit(1)\n"
        "take(); note('begins'); time.sleep(0.1)\n"
        "say(model=name, batch=1, form=said['forms'][0], warm_ms=1.0); note('ends')\n",
    )
    todo = [Task(name, ("compile",), (1,)) for name in ("fast", "dies", "slow", "next")]
    rows: list[dict] = []
    assert run_all([*todo, Task("quick", ("eager",), (1,))], command, 3, None, rows.append) == []
    assert [r["model"] for r in rows if "error" not in r] == ["quick", "fast", "slow", "next"]
    assert log.read_text().splitlines() == [
        *("quick made", "quick begins", "quick ends"),
        *("fast made", "dies made", "slow made"),
        *("fast begins", "fast ends", "slow begins", "slow ends"),
        *("next made", "next begins", "next ends"),
    ]


def test_a_process_without_a_giver_of_turns_ends() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "from benchmarking import task; task.ask_for_turn()"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPO_ROOT / 'scripts'}:{REPO_ROOT}"},
    )
    assert ran.stdout == "READY\n" and "has ended" in ran.stderr and ran.returncode == 1


def test_a_task_that_dies_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    command = fake_task(
        tmp_path,
        "take()\n"
        "for b in said['batches']:\n"
        "    if b == 8: sys.stderr.write('out of luck'); os._exit(3)\n"
        "    say(model=said['model'], batch=b, form=said['forms'][0], warm_ms=1.0)\n",
    )
    todo = [Task("a", ("eager",), (1, 8)), Task("b", ("compile",), (1,))]
    rows: list[dict] = []
    assert run_all(todo, command, 2, None, rows.append) == []
    found = {(r["model"], r["batch"]): r.get("error") for r in rows}
    assert found[("a", 1)] is None and found[("b", 1)] is None
    assert found[("a", 8)] == "the process ended with code 3: out of luck"


def test_tasks_end_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarking.schedule.SHORTEST_S", 0.1)
    command = fake_task(tmp_path, "time.sleep(60)\n")
    todo = [Task("a", ("compile",), (1,)), Task("b", ("compile",), (1,))]
    rows: list[dict] = []
    started = time.monotonic()
    assert run_all(todo, command, 1, started + 1.5, rows.append) == todo
    assert time.monotonic() - started < 30 and rows == []
    monkeypatch.setattr("benchmarking.schedule.TASK_LIMIT_S", 0.5)
    assert run_all(todo[:1], command, 1, None, rows.append) == []
    assert [r["error"] for r in rows] == [STOPPED]


# --- records and tables ---


def test_calls_are_merged_and_keep_measurements(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latency.json"
    for call, new in enumerate(
        ([row(), row(batch=1, error="no")], [row(batch=1), row(error="worse luck")])
    ):
        record = Record(path)
        record.begin("NVIDIA H100", {"command": f"call {call}"})
        for one in new:
            record.add(one)
    record = Record(path)
    assert record.device == "NVIDIA H100" and len(record.calls) == 2
    assert record.measured() == {(FIRST, 32, "compile"), (FIRST, 1, "compile")}
    assert [r["call"] for r in record.rows()] == [0, 1]
    assert list(path.parent.iterdir()) == [path]


def test_another_device_and_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    record = Record(path)
    record.begin("NVIDIA H100", {})
    record.add(row())
    with pytest.raises(ConfigError, match="measured on NVIDIA H100, this is NVIDIA H200"):
        Record(path).begin("NVIDIA H200", {})
    for text in ("{", '{"rows": []}', "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no record"):
            Record(path)


def test_marked_tables_are_rewritten_and_nothing_else(tmp_path: Path) -> None:
    record = Record(None)
    record.begin("NVIDIA H100", {"versions": {"torch": "2.11"}})
    record.add(row(form="compile", warm_ms=3.0, cold_ms=4.0))
    record.add(row(form="compile-sdpa", warm_ms=2.5, cold_ms=4.5))
    record.add(row(form="swinq-int8-1", warm_ms=1.0, cold_ms=2.0))
    record.add(row(form="torchao", error="a | b\nc"))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: headline 32 -->\nstale\n<!-- end of table -->\n"
        "<!-- table: latency 32 cold -->\n<!-- end of table -->\n"
        f"<!-- table: batches {FIRST} -->\n<!-- end of table -->\n"
        "<!-- table: failures -->\n<!-- end of table -->\n"
        "<!-- table: device -->\n<!-- end of table -->\n"
        "<!-- table: kernels x -->\nkept\n<!-- end of table -->\nafter\n"
    )
    assert rewrite(page, renderers(record)) == 5
    text = page.read_text()
    assert "| Swin-T w7 224 | 2.500 |  | 1.000 (2.50x) |  |\n" in text
    assert "| Swin-T w7 224 | 4.000 | 4.500 | 2.000 |\n" in text
    assert "| swinq INT8 mode 1 |  |  |  | 1.000 |  |\n" in text
    assert "a \\| b c" in text and "NVIDIA H100; torch 2.11." in text
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "<!-- table: kernels x -->\nkept\n" in text
    assert rewrite(page, renderers(record)) == 5 and page.read_text() == text


def test_a_table_with_wrong_arguments_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for asked in ("headline", "headline many", "batches no_model"):
        page.write_text(f"<!-- table: {asked} -->\n<!-- end of table -->\n")
        with pytest.raises(ConfigError, match=f"'{asked}' is no table"):
            rewrite(page, renderers(Record(None)))


def test_tables_of_no_results_leave_the_page_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: headline 32 -->\nmeasured\n<!-- end of table -->\n")
    for options in ([], ["--json", str(tmp_path / "typo.json")]):
        done = run_script("scripts/benchmark.py", *options, "--tables", str(page))
        assert done.returncode == 2 and "tables would be left empty" in done.stderr
    assert "measured" in page.read_text()
    record = Record(tmp_path / "good.json")
    record.begin("NVIDIA H100", {})
    record.add(row())
    with pytest.raises(ConfigError, match=r"page\.txt: cannot be read"):
        rewrite_all([tmp_path / "page.txt"], {}, record.path, record.rows())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batches", "0"], "invalid positive value: '0'"),
        (["--device", "cuda"], "no GPU is visible"),
        (["--json", "."], "is no record of this benchmark (IsADirectoryError"),
    ],
)
def test_mistakes_in_the_command_are_named(options: list[str], said: str) -> None:
    done = run_script("scripts/benchmark.py", *options)
    assert done.returncode == 2 and said in done.stderr


def test_every_table_of_the_pages_has_a_program_that_writes_it(repo_root: Path) -> None:
    known = {*renderers(Record(None)), *profile_kernels.renderers(Record(None)), "engine"}
    for page in [repo_root / "README.md", *(repo_root / "docs").glob("*.md")]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("<!-- table: "):
                assert line.split()[2] in known, f"{page.name}: {line}"


# --- our engine's weights ---


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", [1, 2, None])
def test_made_up_weights_are_a_whole_model_with_finite_logits(
    version: int, mode: int | None
) -> None:
    arch = made_architecture(version)
    made = ours.made_up(arch, mode)
    wanted = expected_tensors(arch, made.precision, mode or 1)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in made.tensors.items()} == {
        n: (spec.dtype, spec.shapes[0]) for n, spec in wanted.items()
    }
    base = made_checkpoint(arch, mode=mode or 1, precision=made.precision)
    fields = {**vars(base), "tensors": made.tensors}
    logits = Int8Swin(type(base)(**fields))(torch.randn(2, 3, 32, 32))
    assert bool(logits.isfinite().all()) and float(logits.std()) > 1e-3


def test_forms_name_their_mode() -> None:
    modes = {form: ours.mode_of(form) for form in FORMS if FORMS[form].ours}
    assert modes["swinq-fp16"] is None and modes["swinq-int8-2-stream"] == 2
    assert sorted(modes.values(), key=str) == [1, 1, 2, 2, None, None]


# --- accuracy ---


def test_decoded_images_are_the_bits_of_the_transform(tmp_path: Path) -> None:
    made = decoded("fake:5", "val", "official", 32, 4, tmp_path)
    dataset = open_dataset("fake:5", "val", eval_transform("official", 32))
    wanted = torch.stack([dataset[int(index)][0] for index in made.indices])
    assert made.images.dtype is torch.uint8
    assert torch.equal(torch.cat(list(made.batches(3, CPU))), wanted)
    again = decoded(None, "val", "official", 32, 4, tmp_path)
    assert torch.equal(again.images, made.images) and torch.equal(again.labels, made.labels)
    with pytest.raises(ConfigError, match="no decoded images"):
        decoded(None, "val", "official", 64, 4, tmp_path)


def test_accuracy_of_several_calls_is_merged(repo_root: Path, tmp_path: Path) -> None:
    results = tmp_path / "accuracy.json"
    benchmark_accuracy.merge(results, "other", {"rows": []})
    checkpoint = repo_root / "swinq" / "demo" / "micro_swin_digits.safetensors"
    arguments = ["--data-path", "digits", "--images", "24", "--calibration-images", "8"]
    arguments += ["--cache", str(tmp_path / "cache"), "--recipes", "int8", "--device", "cpu"]
    arguments += ["--reference-images", "16", "--json", str(results), str(checkpoint)]
    ran = run_script("scripts/benchmark_accuracy.py", *arguments)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "no CUDA engine" in ran.stdout
    held = json.loads(results.read_text())["results"]
    rows = {r["model"]: r for r in held["micro_swin_digits"]["rows"]}
    assert "other" in held and rows["int8, mode 1"]["images"] == 24
    integer = rows["integer model, mode 2"]
    assert integer["against_fake_quant"]["images"] == 16
    assert integer["agreement_with_fake_quant"] > 80


def test_engine_table_shows_the_paired_comparison() -> None:
    engine = {
        "model": "CUDA engine, mode 1",
        "top1_percent": 83.25,
        "against_fake_quant": {
            "interval_points": [-0.5, 0.25],
            "difference_points": -0.125,
            "agreement_percent": 99.5,
        },
        "against_reference": {"agreement_percent": 99.75, "images": 3925},
        "fake_quant_self_agreement_fp16_stream": 99.625,
    }
    fake = {"model": "int8, mode 1", "top1_percent": 83.375}
    lines = benchmark_accuracy.engine_table({"swin": {"rows": [fake, engine]}, "old": {"rows": []}})
    assert lines[2:] == [
        "| swin | 1 | 83.38 | 83.25 | -0.12 | -0.50 to +0.25 | 99.50 | 99.62 | 99.75 of 3,925 |"
    ]


def test_large_windows_without_an_engine_do_not_pass() -> None:
    arch = made_architecture(2, img_size=16, embed_dim=32)
    rows = check_large_windows.checked(arch, 2, CPU)
    assert [r["mode"] for r in rows] == [1, 2]
    for found in rows:
        assert 0 < found["noise_floor"] < 1 and 0 < found["reference_from_fake_quant"] < 1
        assert found["error"] and not check_large_windows.passes(found)
    assert check_large_windows.passes({"noise_floor": 0.1, "engine_from_reference": 0.2})
    assert not check_large_windows.passes({"noise_floor": 0.1, "engine_from_reference": 0.21})
