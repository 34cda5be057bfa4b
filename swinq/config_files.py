"""Finds configuration files and reads them strictly.

Strictly: YAML of at most 1 MiB that is one mapping, with no key twice, no aliases and no Python
objects.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from swinq.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent / "configs"  # the shipped models, the demo and recipes
MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases (which can blow up) and without silently repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not accepted", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name.value} stands there twice", problem_mark=name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, is no text, is too large, or is not one YAML mapping.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_BYTES >> 20} MiB, too large for a configuration",
            "a checkpoint is given with --resume",
        )
    try:
        tree = yaml.load(raw.decode("utf-8"), Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a text file (byte {error.start} is not UTF-8)",
            "--cfg and --recipe take YAML files; a checkpoint is given with --resume",
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: {error.problem or error.context}", "mend the YAML there"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}", "mend it") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}, wanted sections with keys",
            "write for example CALIB: {NUM_BATCHES: 10}",
        )
    return tree


def find(kind: str, name: str) -> Path:
    """The file a user means: a path, or the name of one that is shipped.

    Args:
        kind: "model" or "recipe".
        name: a path as seen from here or from the project's root, or a bare name.
    """
    candidates = (Path(name), CONFIGS.parent.parent / name, CONFIGS.parent / name)
    known = shipped(kind)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if name in known:
        return known[name]
    if any(candidate.is_dir() for candidate in candidates):
        raise ConfigError(f"'{name}' is a folder, wanted a YAML file", shipped_list(kind))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    raise ConfigError(
        f"there is no {kind} configuration '{name}', neither as a file nor among the shipped ones",
        f"did you mean {near[0]}?" if near else shipped_list(kind),
    )


def shipped(kind: str) -> dict[str, Path]:
    """The names of the shipped files of a kind."""
    recipes = CONFIGS / "quant"
    if kind == "recipe":
        return {path.stem: path for path in sorted(recipes.glob("*.yaml"))}
    found = sorted(path for path in CONFIGS.rglob("*.yaml") if recipes not in path.parents)
    return {path.stem: path for path in found}


def shipped_list(kind: str) -> str:
    """A hint at what may be given: a file, or some of the shipped names."""
    names = sorted(shipped(kind))
    some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    flag = "--cfg" if kind == "model" else "--recipe"
    return f"{flag} takes a file, or a shipped name: {some or 'none here'}"
