"""The build of libswinq: the three states of SWINQ_CUDA, wheels, and warnings that are errors."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
STRICT_NVCC = REPO_ROOT / "csrc" / "cmake" / "strict_nvcc.sh"
PACKAGED = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("swinq_setup", REPO_ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load_setup()


def program(path: Path, body: str = "exit 0") -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# ---- which nvcc ----


def test_nvcc_is_looked_for_where_cuda_is_said_to_be(tmp_path: Path) -> None:
    usual = program(tmp_path / "usual" / "bin" / "nvcc")
    on_path = program(tmp_path / "path" / "nvcc")
    by_path = program(tmp_path / "cuda_path" / "bin" / "nvcc")
    by_home = program(tmp_path / "cuda_home" / "bin" / "nvcc")
    by_name = program(tmp_path / "my_nvcc")
    environment = {"PATH": str(tmp_path / "empty")}
    for variable, value, found in (
        (None, None, usual),
        ("PATH", on_path.parent, on_path),
        ("CUDA_PATH", by_path.parents[1], by_path),
        ("CUDA_HOME", by_home.parents[1], by_home),
        ("CUDACXX", by_name, by_name),
    ):
        if variable:
            environment[variable] = str(value)
        assert setup.find_nvcc(environment, tmp_path / "usual") == found
    assert setup.find_nvcc({"PATH": ""}, tmp_path / "nowhere") is None


# ---- SWINQ_CUDA ----

NVCC, CMAKE = Path("/opt/cuda/bin/nvcc"), "/usr/bin/cmake"


@pytest.mark.parametrize("state", ["", "1"])
def test_engine_is_built_where_the_tools_are(state: str) -> None:
    assert setup.reason_against({"SWINQ_CUDA": state}, NVCC, CMAKE, lambda nvcc: (12, 5)) is None
    assert setup.reason_against({"SWINQ_CUDA": state}, NVCC, CMAKE, lambda nvcc: (13, 0)) is None


def test_zero_skips_the_engine_even_where_the_tools_are() -> None:
    assert setup.reason_against({"SWINQ_CUDA": "0"}, NVCC, CMAKE) == "SWINQ_CUDA=0"


def test_unset_says_what_is_missing() -> None:
    assert "no nvcc in CUDACXX, CUDA_HOME" in setup.reason_against({}, None, CMAKE)
    assert setup.reason_against({}, NVCC, None) == "no cmake in PATH"
    old = setup.reason_against({}, NVCC, CMAKE, lambda nvcc: (12, 4))
    assert old == f"only {NVCC} of CUDA 12.4, wanted 12.5 or later"
    assert "that does not run" in setup.reason_against({}, NVCC, CMAKE)  # it is not there


def test_one_fails_with_what_is_missing_and_the_fix() -> None:
    with pytest.raises(SystemExit, match=r"no nvcc(.|\n)*fix: install the CUDA toolkit 12.5"):
        setup.reason_against({"SWINQ_CUDA": "1"}, None, CMAKE)
    with pytest.raises(SystemExit, match=r"no cmake(.|\n)*fix: install cmake"):
        setup.reason_against({"SWINQ_CUDA": "1"}, NVCC, None)
    with pytest.raises(SystemExit, match=r"of CUDA 11\.8(.|\n)*fix: install the CUDA toolkit 12.5"):
        setup.reason_against({"SWINQ_CUDA": "1"}, NVCC, CMAKE, lambda nvcc: (11, 8))


def test_another_value_is_refused() -> None:
    with pytest.raises(SystemExit, match="SWINQ_CUDA is 'yes'"):
        setup.reason_against({"SWINQ_CUDA": "yes"}, NVCC, CMAKE)


# ---- wheels ----


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without history and builds."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in PACKAGED:
        shutil.copy(REPO_ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("swinq", "calib", "configs"):
        shutil.copytree(REPO_ROOT / name, copy / name, symlinks=True, ignore=ignore)
    (copy / "csrc").mkdir()
    return copy


def build_wheel(
    tree: Path, folder: Path, kind: str = "wheel", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Have setuptools build a wheel, stand-ins for nvcc and CMake in front of PATH.

    `kind` is wheel, or editable for one that points into the tree.
    """
    program(
        folder / "tools" / "nvcc", "echo Cuda compilation tools, release ${SWINQ_TEST_CUDA:-13.0}"
    )
    program(
        folder / "tools" / "cmake",
        'echo "cmake $* SWINQ_STRICT=$SWINQ_STRICT" >> "$SWINQ_TEST_LOG"\nmkdir -p build/kernels\n'
        "echo a library > build/kernels/libswinq.so\n"
        "[[ $1 == --build ]] && exit ${SWINQ_TEST_BUILD:-0}\nexit ${SWINQ_TEST_CONFIGURE:-0}",
    )
    environment = {**os.environ, "SWINQ_TEST_LOG": str(folder / "log")}
    environment |= {"PATH": f"{folder / 'tools'}:/usr/bin:/bin", "CUDACXX": "", "CUDA_HOME": ""}
    environment = {k: v for k, v in environment.items() if not k.startswith(("SWINQ_C", "SWINQ_A"))}
    backend = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", backend, str(folder)],
        cwd=tree,
        env=environment | changes,
        capture_output=True,
        text=True,
    )


def names_in_wheel(folder: Path) -> tuple[str, list[str]]:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, archive.namelist()


def test_wheel_holds_the_engine_and_fits_every_python(tree: Path, tmp_path: Path) -> None:
    done = build_wheel(tree, tmp_path, SWINQ_CUDA="1", SWINQ_ARCHITECTURES="90a")
    assert done.returncode == 0, done.stderr
    name, held = names_in_wheel(tmp_path)
    assert "-py3-none-linux" in name
    assert "swinq/int8/libswinq.so" in held and "swinq/int8/engine.py" in held
    calls = (tmp_path / "log").read_text()
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'tools' / 'nvcc'}" in calls
    assert "-DSWINQ_ARCHITECTURES=90a" in calls
    assert "--target swinq SWINQ_STRICT=0" in calls


def test_wheel_without_the_engine_is_pure_python(tree: Path, tmp_path: Path) -> None:
    done = build_wheel(tree, tmp_path, SWINQ_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "the CUDA engine is not built: SWINQ_CUDA=0" in done.stdout
    name, held = names_in_wheel(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in held if file.endswith(".so")]
    assert not (tmp_path / "log").exists()


def test_editable_install_puts_the_engine_beside_the_code(tree: Path, tmp_path: Path) -> None:
    library = tree / "swinq" / "int8" / "libswinq.so"
    done = build_wheel(tree, tmp_path, "editable", SWINQ_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert library.read_text() == "a library\n"
    library.unlink()
    assert "-USWINQ_ARCHITECTURES" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("state", ["", "1"])
@pytest.mark.parametrize("step", ["SWINQ_TEST_CONFIGURE", "SWINQ_TEST_BUILD"])
def test_a_build_that_fails_fails_the_installation(
    tree: Path, tmp_path: Path, state: str, step: str
) -> None:
    done = build_wheel(tree, tmp_path, SWINQ_CUDA=state, **{step: "5"})
    assert done.returncode != 0 and "the CUDA engine does not compile" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_toolkit_that_is_too_old_is_done_without(tree: Path, tmp_path: Path, kind: str) -> None:
    done = build_wheel(tree, tmp_path, kind, SWINQ_TEST_CUDA="11.8")
    assert done.returncode == 0, done.stderr
    assert "the CUDA engine is not built: only" in done.stdout and "of CUDA 11.8" in done.stdout
    name, held = names_in_wheel(tmp_path)
    assert name.endswith("-none-any.whl") and "swinq/int8/libswinq.so" not in held


# ---- slow code is an error ----

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
    float v[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[63 - i];
}
"""


def strict(folder: Path, compiler: object, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(STRICT_NVCC), str(compiler), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "warning",
    [
        "ptxas warning : Registers are spilled to local memory in function 'f', 8 bytes",
        "ptxas warning : Local memory used for function 'f', size of stack frame: 256 bytes",
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in function 'f'",
        "ptxas info : (C7508) Potential Performance Loss: wgmma in divergent path",
    ],
)
def test_a_warning_of_slow_code_fails_and_leaves_no_object(tmp_path: Path, warning: str) -> None:
    compiler = program(tmp_path / "nvcc", f'echo "{warning}" >&2; touch out.o')
    done = strict(tmp_path, compiler, "-c", "x.cu", "-o", "out.o")
    assert done.returncode == 1
    assert warning in done.stderr and "mean slow code" in done.stderr
    assert not (tmp_path / "out.o").exists()


def test_users_get_the_warning_and_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWINQ_STRICT", "0")
    compiler = program(tmp_path / "nvcc", "echo Registers are spilled >&2; touch out.o")
    done = strict(tmp_path, compiler, "-o", "out.o")
    assert done.returncode == 0 and "Registers are spilled" in done.stderr
    assert (tmp_path / "out.o").exists()


def test_other_words_pass_and_errors_keep_their_status(tmp_path: Path) -> None:
    talking = program(tmp_path / "nvcc", 'echo "ptxas info : 0 bytes spill stores"; touch out.o')
    assert strict(tmp_path, talking, "-o", "out.o").returncode == 0
    assert (tmp_path / "out.o").exists()
    assert strict(tmp_path, program(tmp_path / "broken", "exit 3"), "-o", "out.o").returncode == 3


def test_a_spilling_kernel_does_not_build(tmp_path: Path) -> None:
    nvcc = setup.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "spilling.cu").write_text(SPILLING)
    flags = ("-arch=sm_80", "-Xptxas", "-warn-spills,-warn-lmem-usage", "-c", "spilling.cu")
    done = strict(tmp_path, nvcc, *flags, "-o", "out.o")
    assert done.returncode == 1
    assert "Registers are spilled" in done.stderr
    assert not (tmp_path / "out.o").exists()


def test_cmake_compiles_kernels_through_that_check() -> None:
    text = (REPO_ROOT / "csrc" / "CMakeLists.txt").read_text(encoding="utf-8")
    assert 'CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_SOURCE_DIR}/cmake/strict_nvcc.sh"' in text
    assert "-Xptxas -warn-spills,-warn-lmem-usage" in text
