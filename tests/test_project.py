"""Rules for the whole project: small files, no pickles, no machine's paths, files that parse."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import swinq

REPO_ROOT = Path(__file__).resolve().parents[1]

PYTHON_ROOTS = ("swinq", "calib", "train", "scripts", "tests")
PYTHON_FILES = sorted(path for root in PYTHON_ROOTS for path in (REPO_ROOT / root).rglob("*.py"))
LIBRARY_FILES = [path for path in PYTHON_FILES if path.relative_to(REPO_ROOT).parts[0] != "tests"]
SHELL_FILES = sorted([*REPO_ROOT.glob("scripts/*.sh"), *REPO_ROOT.glob("scripts/*.sbatch")])
SHELL_FILES.append(REPO_ROOT / ".ci" / "run")
YAML_FILES = sorted(REPO_ROOT.glob("configs/**/*.yaml"))
TEXT_SUFFIXES = {".py", ".sh", ".sbatch", ".yaml", ".toml", ".txt", ".md", ".j2", ".cfg", ".css"}

MODEL_FILE_LINES = 1000
FILE_LINES = 400
TEST_FILE_LINES = 600  # tables of mistakes and cases are long, and read one row at a time
EMBEDDED_BYTES = 2 * 1024 * 1024

# The one module that reads pickles, and executes none of them.
PICKLE_READER = "swinq/models/pickle_reader.py"

# Calls and imports that execute what a file says.
EXECUTING_CALLS = {
    "torch.load",
    "yaml.load",  # unless its Loader is a safe one, see is_safe_yaml
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "np.load",
    "numpy.load",
    "os.system",
}
EXECUTING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}


def name_of(path: Path) -> str:
    """Path of a file below the root, as a test id."""
    return path.relative_to(REPO_ROOT).as_posix()


def dotted(node: ast.expr) -> str:
    """`a.b.c` for nested attributes of a name, '' for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_safe_yaml(call: ast.Call, tree: ast.Module) -> bool:
    """Whether a `yaml.load` names SafeLoader, or a class of the same file that derives from it."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and {dotted(base) for base in node.bases} & safe:
            safe.add(node.name)
    loaders = [word.value for word in call.keywords if word.arg == "Loader"] + call.args[1:2]
    return dotted(call.func) == "yaml.load" and len(loaders) == 1 and dotted(loaders[0]) in safe


def executing(source: str) -> list[str]:
    """Uses in a source that would execute the contents of a file or a string."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in EXECUTING_CALLS:
            if is_safe_yaml(node, tree):
                continue
            found.append(f"line {node.lineno}: {dotted(node.func)}(")
        elif isinstance(node, ast.Import):
            modules = {alias.name.partition(".")[0] for alias in node.names}
            found += [f"line {node.lineno}: {name}" for name in modules & EXECUTING_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.partition(".")[0]
            found += [f"line {node.lineno}: {module}"] if module in EXECUTING_MODULES else []
    return found


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    limit = FILE_LINES
    if path.parent == REPO_ROOT / "swinq" / "models":
        limit = MODEL_FILE_LINES
    elif path.is_relative_to(REPO_ROOT / "tests"):
        limit = TEST_FILE_LINES
    lines = source.count("\n")
    assert lines <= limit, f"{name_of(path)} has {lines} lines, wanted at most {limit}"
    assert ast.get_docstring(ast.parse(source)), f"{name_of(path)} does not say what it is for"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_library_executes_nothing_that_a_file_says(path: Path) -> None:
    if name_of(path) == PICKLE_READER:
        allowed = re.compile(r"line \d+: (pickle|_pickle)$")
        assert not [use for use in executing(path.read_text()) if not allowed.match(use)]
    else:
        assert executing(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text)",
        "class Loader(yaml.Loader): ...\nyaml.load(text, Loader=Loader)",
        "from pickle import Unpickler",
        "import pickle as p",
        "def f(text):\n    return eval(text)",
    ],
)
def test_the_check_for_execution_fires(source: str) -> None:
    assert executing(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
    ],
)
def test_the_check_for_execution_lets_harmless_code_pass(source: str) -> None:
    assert executing(source) == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    personal = re.compile(r"(?<![\w.$}/-])/(home|Users|root|work|mnt)/[\w.-]+")
    wrong = []
    for path in sorted(REPO_ROOT.rglob("*")):
        parts = path.relative_to(REPO_ROOT).parts
        if parts[0] in {".venv", ".git", "output", "build", "dist"} or "egg-info" in parts[0]:
            continue
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path != Path(__file__):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if personal.search(line):
                    wrong.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_config_parses_to_sections(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", SHELL_FILES, ids=name_of)
def test_shell_script_parses_and_stops_at_the_first_failure(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ") or text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text or "\nexec bash " in text


def test_every_shipped_binary_is_small() -> None:
    shipped = [path for path in (REPO_ROOT / "swinq").rglob("*.safetensors") if path.is_file()]
    assert shipped, "the demo's checkpoint is missing"
    for path in shipped:
        assert path.stat().st_size <= EMBEDDED_BYTES, name_of(path)


def test_public_names_resolve_and_hide_no_submodule() -> None:
    submodules = {path.stem for path in (REPO_ROOT / "swinq").iterdir()}
    for name in swinq.__all__:
        assert getattr(swinq, name) is not None
        assert name not in submodules, f"swinq.{name} is a module as well"
    with pytest.raises(AttributeError, match="no attribute 'calibrat'"):
        swinq.calibrat  # noqa: B018
    assert set(swinq.__all__) <= set(dir(swinq))


def test_console_script_points_at_a_function() -> None:
    text = (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    target = re.search(r'^swinq = "([\w.]+):(\w+)"$', text, re.MULTILINE)
    assert target
    assert callable(getattr(importlib.import_module(target[1]), target[2]))
