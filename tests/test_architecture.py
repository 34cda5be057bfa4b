"""Imports run one way between the rooms, the symlinks resolve, int8 stays free of quantizers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
PACKAGE = REPO_ROOT / "swinq"

# Open to all; they import each other and nothing else of ours.
OPEN = {"swinq", "errors", "console", "distributed", "files"}

# Room -> what it may import besides itself and OPEN. A dotted name allows one module only.
ROOMS: dict[str, set[str]] = {
    "calib": {"quant"},
    "config": {"config_files", "defaults", "schema", "yaml_reader"},
    "config_files": {"schema"},
    "console": set(),
    "data": set(),
    "defaults": set(),
    "demo": set(),
    "distributed": set(),
    "errors": set(),
    "evaluate": {"data"},
    "export": {"quant", "models"},
    "files": set(),
    "flags": {"config", "defaults"},
    "int8": {"export.format", "export.reader", "config", "models.architecture"},
    "latency": set(),
    "models": set(),
    "quant": set(),
    "report": {"evaluate"},
    "schema": set(),
    "swinq": {"api"},
    "train": {"quant", "models", "data", "export.integrity", "export.format"},
}
SEE_ALL = {"main", "cli", "api", "commands", "preflight"}


def module_files(package: Path) -> list[Path]:
    """Python files under `package`, through its symlinks, as paths relative to it."""
    found = []
    for folder, _, names in os.walk(package, followlinks=True):
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path.relative_to(package) for path in found)


def room_of(path: Path) -> str:
    """`quant/affine.py` -> quant, `config.py` -> config, `__init__.py` -> swinq."""
    if len(path.parts) > 1:
        return path.parts[0]
    return "swinq" if path.stem == "__init__" else path.stem


def imports_of(source: str) -> set[str]:
    """Dotted names below `swinq` that a source imports anywhere, `swinq` itself as 'swinq'.

    `from swinq.a import b` gives 'a.b': b may be a module or something inside a, both are judged.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.partition(".")[2] for name in found if name.partition(".")[0] == "swinq"}
    return {name if name and not name.startswith("__") else "swinq" for name in ours}


def forbidden(path: Path, source: str) -> set[str]:
    """Imports of a module that its room may not have."""
    room = room_of(path)
    if room in SEE_ALL:
        return set()
    allowed = ROOMS[room] | OPEN | {room}
    return {
        name
        for name in imports_of(source)
        if not any(name == door or name.startswith(door + ".") for door in allowed)
    }


@pytest.mark.parametrize("path", module_files(PACKAGE), ids=str)
def test_module_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS or room in SEE_ALL, f"{room} is a new room: say here what it may import"
    wrong = forbidden(path, (PACKAGE / path).read_text())
    assert not wrong, f"swinq/{path} may not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/affine.py", "import swinq.calib.methods"),
        ("int8/model.py", "from swinq.quant import affine"),
        ("int8/model.py", "from swinq.export import writer"),
        ("int8/model.py", "from swinq.models.swin import SwinTransformer"),
        ("models/swin.py", "def f():\n    from swinq.data.datasets import open_dataset"),
        ("report/page.py", "from swinq import int8"),
    ],
)
def test_the_check_sees_a_wrong_import(path: str, source: str) -> None:
    assert forbidden(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("int8/model.py", "from swinq.export.reader import read_checkpoint"),
        ("int8/model.py", "from swinq.models.architecture import Architecture"),
        ("quant/insert.py", "from swinq.errors import ConfigError\nimport torch"),
        ("export/writer.py", "from swinq import __version__"),
        ("commands/calib.py", "from swinq.report import page"),
    ],
)
def test_the_check_lets_a_right_import_pass(path: str, source: str) -> None:
    assert not forbidden(Path(path), source)


def test_symlinks_into_the_package_resolve() -> None:
    links = {path.name: path for path in PACKAGE.iterdir() if path.is_symlink()}
    assert {"calib", "configs"} <= set(links), "this copy of the checkout has lost its symlinks"
    for name, link in links.items():
        assert os.readlink(link) == f"../{name}"
        assert link.is_dir(), f"swinq/{name} points nowhere"


@pytest.mark.skipif(not (PACKAGE / "int8").is_dir(), reason="no integer model in this tree")
def test_importing_the_integer_model_loads_no_quantizer() -> None:
    modules = [
        ".".join(("swinq", *path.with_suffix("").parts)).removesuffix(".__init__")
        for path in module_files(PACKAGE)
        if room_of(path) == "int8"
    ]
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "print(*sorted(m for m in sys.modules if m.startswith(('swinq.quant', 'swinq.calib'))))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
