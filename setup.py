"""Build libswinq, the CUDA engine, along with the Python package; pyproject.toml says the rest.

SWINQ_CUDA=0 leaves it out and SWINQ_CUDA=1 demands it. Unset, it is built where nvcc and CMake are
new enough, and the reason is told where they are not. A GPU is neither needed nor looked for.

SWINQ_ARCHITECTURES  GPUs to build for, such as 90a; default: all, see csrc/CMakeLists.txt
SWINQ_TESTS=1        also the programs and tests of csrc/; then spilled registers are an error
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "kernels"
USUAL_CUDA = Path("/usr/local/cuda")
OLDEST_CUDA = (12, 5)  # csrc/CMakeLists.txt says so too
WANTED_CUDA = "{}.{} or later".format(*OLDEST_CUDA)


def find_nvcc(environment: Mapping[str, str], usual: Path = USUAL_CUDA) -> Path | None:
    """The first nvcc of CUDACXX, CUDA_HOME, CUDA_PATH, PATH and the usual folder."""
    folders = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    named = [environment.get("CUDACXX", ""), *(str(Path(f, "bin", "nvcc")) for f in folders)]
    for candidate in (*named, "nvcc", str(usual / "bin" / "nvcc")):
        found = shutil.which(candidate, path=environment.get("PATH", "")) if candidate else None
        if found:
            return Path(found)
    return None


def cuda_of(nvcc: Path) -> tuple[int, int] | None:
    """The CUDA release of an nvcc; None if it does not say one."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    return (int(release[1]), int(release[2])) if release else None


def reason_against(
    environment: Mapping[str, str],
    nvcc: Path | None,
    cmake: str | None,
    release_of: Callable[[Path], tuple[int, int] | None] = cuda_of,
) -> str | None:
    """Why the engine is not built, in words; None where it is.

    Args:
        nvcc, cmake: the tools that were found.
        release_of: the CUDA release of an nvcc.

    Raises:
        SystemExit: it is demanded and cannot be built, or SWINQ_CUDA is none of the three.
    """
    wanted = environment.get("SWINQ_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"swinq: SWINQ_CUDA is {wanted!r}\n  fix: set it to 0 or 1, or unset it")
    if wanted == "0":
        return "SWINQ_CUDA=0"
    missing = None
    if nvcc is None:
        missing = f"no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or {USUAL_CUDA}"
    elif cmake is None:
        missing = "no cmake in PATH"
    else:
        release = release_of(nvcc)
        if release is None or release < OLDEST_CUDA:
            of = f"of CUDA {release[0]}.{release[1]}" if release else "that does not run"
            missing = f"only {nvcc} {of}, wanted {WANTED_CUDA}"
    if missing and wanted == "1":
        toolkit = f"the CUDA toolkit {WANTED_CUDA} (no GPU is needed)"
        tool = "cmake" if nvcc and not cmake else toolkit
        raise SystemExit(
            f"swinq: SWINQ_CUDA=1 demands the CUDA engine, but there is {missing}\n"
            f"  fix: install {tool}, or unset SWINQ_CUDA to do without the engine"
        )
    return missing


class BuildEngine(build_ext):
    """Runs CMake instead of the compiler of Python extensions."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain name: the library knows nothing of Python and its versions."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Build in BUILD, where only what has changed is compiled again, and copy the library."""
        configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(BUILD)]
        if not (BUILD / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc(os.environ)}")
        architectures = os.environ.get("SWINQ_ARCHITECTURES")
        configure.append(
            f"-DSWINQ_ARCHITECTURES={architectures}" if architectures else "-USWINQ_ARCHITECTURES"
        )
        build = ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)]
        strict = os.environ.get("SWINQ_TESTS") == "1"
        if strict:
            configure.append("-DSWINQ_TESTS=ON")
        else:
            build += ["--target", "swinq"]
        environment = os.environ | {"SWINQ_STRICT": str(int(strict))}
        for command in (configure, build):
            if subprocess.run(command, check=False, env=environment).returncode:
                raise SystemExit(
                    "swinq: the CUDA engine does not compile, see above\n"
                    "  fix: mend that, or set SWINQ_CUDA=0 to do without the engine"
                )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copy(BUILD / "libswinq.so", partial)
        partial.replace(target)  # a process that has the old one loaded keeps it


class PlatformWheel(bdist_wheel):
    """A wheel with the engine fits every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Say so in the wheel's name."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def main() -> None:
    """Decide about the engine and hand over to setuptools."""
    against = reason_against(os.environ, find_nvcc(os.environ), shutil.which("cmake"))
    if against:
        print(f"swinq: the CUDA engine is not built: {against}")
    setup(
        ext_modules=[] if against else [Extension("swinq.int8.libswinq", sources=[])],
        cmdclass={"build_ext": BuildEngine, "bdist_wheel": PlatformWheel},
    )


if __name__ == "__main__":
    main()
