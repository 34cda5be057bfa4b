"""libswinq is found, loaded and checked; what is wrong with it is said in words."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from swinq.errors import EngineError
from swinq.int8 import abi
from swinq.int8 import device as devices
from swinq.int8 import library as libraries
from swinq.int8.library import VARIABLE, Library, available, library, reason
from tests.int8.fake_engine import ROOT, built, compiled

REAL = Path(libraries.__file__).with_name("libswinq.so")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("library"))


def test_variable_names_the_library_and_the_module_lies_beside_the_default(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(fake))
    assert available() and reason() == ""
    assert library().path == fake and library().version == "fake"
    assert library() is library()  # loaded once
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(libraries, "__file__", str(fake.parent / "library.py"))
    assert reason() == f"{fake.parent}/libswinq.so: no such file, wanted the engine libswinq.so"


def test_a_name_is_looked_for_in_the_current_folder(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where the system's libraries are, as the loader would."""
    monkeypatch.chdir(fake.parent)
    assert Library(Path(fake.name)).version == "fake"


def test_missing_library_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = tmp_path / "libswinq.so"
    monkeypatch.setenv(VARIABLE, str(absent))
    with pytest.raises(EngineError, match=f"{absent}: no such file") as caught:
        library()
    assert VARIABLE in caught.value.fix
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(libraries, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(EngineError, match="no such file") as caught:
        library()
    assert "SWINQ_CUDA=1" in caught.value.fix
    assert not available()


def test_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "libswinq.so"
    path.write_text("not a library")
    with pytest.raises(EngineError, match=f"{path}: cannot be loaded"):
        Library(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_copy_that_was_cut_short_is_refused(fake: Path, tmp_path: Path, share: float) -> None:
    """Loading it would end the process."""
    whole = fake.read_bytes()
    path = tmp_path / "libswinq.so"
    path.write_bytes(whole[: int(share * len(whole))])
    wanted = f"{path}: {path.stat().st_size:,} bytes of {len(whole):,}, it was cut short"
    with pytest.raises(EngineError, match=re.escape(wanted)):
        Library(path)


def test_library_of_others_and_of_another_abi_are_named(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    other = compiled(source, tmp_path / "other.so", "-shared", "-fPIC")
    with pytest.raises(EngineError, match="has no function swinq_abi_version"):
        Library(other)
    with pytest.raises(EngineError, match=f"version 99, this swinq wants {abi.VERSION}"):
        Library(built(tmp_path, "-DFAKE_ABI_VERSION=99"))
    source.write_text(f"int swinq_abi_version(void) {{ return {abi.VERSION}; }}\n")
    half = compiled(source, tmp_path / "half.so", "-shared", "-fPIC")
    with pytest.raises(EngineError, match="has no function swinq_check_device"):
        Library(half)


def test_failed_call_says_what_the_library_says(fake: Path) -> None:
    loaded = Library(fake)
    assert loaded.check_device(0) == abi.OK
    with pytest.raises(EngineError) as caught:
        loaded.check_device(1)
    assert caught.value.problem == "libswinq: device 1 has compute capability 6.1"
    model = abi.ModelStruct()
    with pytest.raises(EngineError) as caught:
        loaded.plan_create(ctypes.byref(model), 0, ctypes.byref(ctypes.c_void_p()))
    assert caught.value.problem == "libswinq: head.weight is missing"
    assert caught.value.fix == "export again"
    with pytest.raises(AttributeError, match="swinq_nothing"):
        loaded.nothing  # noqa: B018


def test_structs_lie_in_memory_as_the_compiler_lays_them_out(tmp_path: Path) -> None:
    lines = []
    for name, struct in abi.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in struct._fields_:
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include "swinq.h"\nint main(void) {\n'
        + "\n".join(lines)
        + '\nprintf("%d %d\\n", SWINQ_ABI_VERSION, SWINQ_MAX_STAGES);\n'
        'printf("%d %d %d\\n", SWINQ_FLOAT, SWINQ_PRECISION_FP32, SWINQ_INTERNAL_ERROR);\n}\n'
    )
    program = compiled(source, tmp_path / "layout")
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    wanted = []
    for name, struct in abi.STRUCTS.items():
        wanted.append(f"{name} {ctypes.sizeof(struct)}")
        wanted += [f"{name}.{f[0]} {getattr(struct, f[0]).offset}" for f in struct._fields_]
    wanted.append(f"{abi.VERSION} {abi.MAX_STAGES}")
    wanted.append(f"{abi.FLOAT} {abi.PRECISIONS['fp32']} {abi.INTERNAL_ERROR}")
    assert said.splitlines() == wanted


def test_every_function_of_the_header_is_declared() -> None:
    header = (ROOT / "csrc" / "include" / "swinq.h").read_text()
    declared = {
        line.partition("(")[0].split()[-1]
        for line in header.splitlines()
        if line.startswith("SWINQ_API swinq_status")
    }
    assert set(abi.CALLS) <= declared


def test_engine_wants_a_cuda_device(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(fake))
    with pytest.raises(EngineError, match="cannot run on cpu, wanted a CUDA device"):
        devices.require("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.problem("cuda") == "device cuda: no GPU is visible to PyTorch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert devices.require("cuda") == torch.device("cuda", 0)
    assert "compute capability 6.1" in devices.problem("cuda:1")
    assert devices.problem("cuda:2") == "device cuda:2: 2 GPU(s) are visible"
    monkeypatch.setenv(VARIABLE, str(fake.parent / "absent.so"))
    assert "absent.so: no such file" in devices.problem("cuda")


@pytest.mark.skipif(not REAL.is_file(), reason="libswinq is not built")
def test_the_built_library_loads_and_says_why_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert reason() == ""
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="libswinq: .+"):
            library().check_device(0)
    with pytest.raises(EngineError, match="libswinq: .+"):
        library().check_device(1000)
    with pytest.raises(EngineError, match="libswinq: .+"):
        library().gemm(None, None)
