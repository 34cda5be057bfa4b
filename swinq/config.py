"""The configuration: files, overrides, and where each value came from; defaults.py has the keys.

The keys of the official Swin files keep their names, so those files load as they are, training
sections included. A value enters by `put` alone, which has it converted and checked (schema.py) and
records its origin.
"""

from __future__ import annotations

import copy
import difflib
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from swinq import config_files, schema
from swinq.defaults import DEFAULTS, RECIPE_SECTIONS
from swinq.errors import ConfigError, ExportError
from swinq.files import write_atomically


class Config(CfgNode):
    """A yacs tree that remembers where each stated value came from.

    Attributes:
        origins: key -> what stated it (a flag, "--opts", a file, "recipe ...", "checkpoint ...").
            A key that nothing stated, and that so has its default, is not there.
        ignored: foreign keys that a file held and that decide nothing here.
    """

    origins: dict[str, str]
    ignored: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["origins"] = {}
        self.__dict__["ignored"] = []


def default_config() -> Config:
    """A new configuration in which nothing is stated."""
    return Config(copy.deepcopy(DEFAULTS))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its dots, and its value."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_DEFAULT_OF = dict(leaves(DEFAULTS))


def put(config: Config, key: str, value: object, origin: str) -> None:
    """Sets one key, frozen or not, and records who said so.

    Args:
        config: changed in place.
        key: with dots, such as "CALIB.PERCENTILE".
        value: of the key's type, or a text that reads as one (as --opts and flags give it).
        origin: what stated it, for messages and `describe`.

    Raises:
        ConfigError: there is no such key, or the value is of another type or out of range.
    """
    if key not in _DEFAULT_OF:
        raise _unknown(key, origin)
    converted = schema.checked(key, value, _DEFAULT_OF[key], origin)
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    dict.__setitem__(node, name, converted)
    config.origins[key] = origin


def merge_file(config: Config, path: Path) -> None:
    """Merges a YAML file, after the files its BASE names.

    Raises:
        ConfigError: the file cannot be read, leaves its own folder by BASE, or holds a bad key.
    """
    path = path.resolve()
    root = (
        config_files.CONFIGS.resolve()
        if path.is_relative_to(config_files.CONFIGS.resolve())
        else path.parent
    )
    _merge_file(config, path, root, ())


def merge_recipe(config: Config, path: Path) -> None:
    """Merges a quantization recipe: a YAML file with QUANT and perhaps CALIB, INT8, QAT."""
    tree = config_files.read(path)
    other = [name for name in tree if name not in RECIPE_SECTIONS]
    if other or "QUANT" not in tree:
        what = f"holds {other[0]}" if other else "has no QUANT section"
        raise ConfigError(
            f"{path} is not a recipe: it {what}",
            f"it has QUANT and perhaps CALIB, INT8, QAT; {config_files.shipped_list('recipe')}",
        )
    origin = f"recipe {path.stem}"
    put(config, "QUANT.NAME", path.stem, origin)
    _merge_tree(config, tree, "", origin)


def merge_pairs(config: Config, pairs: list[str]) -> None:
    """Merges the KEY VALUE pairs of --opts."""
    if len(pairs) % 2:
        raise ConfigError(
            f"--opts has a key without a value: '{pairs[-1]}'",
            "write pairs: --opts CALIB.PERCENTILE 99.9 TAG second",
        )
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        if key == "BASE" or any(under(key, foreign) for foreign in schema.FOREIGN):
            raise ConfigError(f"--opts {key} would decide nothing here", "leave it out")
        for idle, why in schema.IDLE.items():
            if key in _DEFAULT_OF and under(key, idle):
                raise ConfigError(f"--opts {key} {why}", "leave it out")
        put(config, key, text, "--opts")


def is_embedded(data_path: str) -> bool:
    """Whether a data path names data that need no files: "digits", "fake" or "fake:N"."""
    name, colon, count = data_path.partition(":")
    return data_path == "digits" or (name == "fake" and (not colon or count.isdecimal()))


def under(key: str, section: str) -> bool:
    """Whether a key is a section or key itself, or lies below it."""
    return key == section or key.startswith(section + ".")


def describe(config: Config, origins: Mapping[str, str]) -> str:
    """What differs from the defaults, under the name of whatever stated it."""
    changed = {key: value for key, value in leaves(config) if value != _DEFAULT_OF[key]}
    said: dict[str, list[str]] = {}
    for key, value in changed.items():
        said.setdefault(origins.get(key, "set in Python"), []).append(
            f"{key}={schema.shown(value)}"
        )
    lines = [f"configuration: {len(changed)} of {len(_DEFAULT_OF)} values differ from the defaults"]
    for origin, settings in said.items():
        first, rest = f"  {origin}: ", " " * 6
        lines.append(
            textwrap.fill(
                "  ".join(setting.replace(" ", "\0") for setting in settings),
                width=100,
                initial_indent=first,
                subsequent_indent=rest,
                break_long_words=False,
                break_on_hyphens=False,
            ).replace("\0", " ")
        )
    if config.ignored:
        lines.append(f"  not used here: {', '.join(config.ignored)}")
    return "\n".join(lines)


def dump(config: Config) -> str:
    """The whole configuration as YAML that loads back to the same, origins as comments on top."""
    head = [
        f"# {key}: {' '.join(origin.split())}" for key, origin in sorted(config.origins.items())
    ]
    body = yaml.safe_dump(_plain(config), sort_keys=False, default_flow_style=None, width=100)
    return "\n".join([*head, body])


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes `dump` under its final name in one step, so that no reader ever sees half of it."""
    text = dump(config).encode("utf-8", "backslashreplace")
    try:
        write_atomically(path, lambda written: written.write_bytes(text))
    except ExportError as error:
        raise ConfigError(error.problem, f"{error.fix}; --output names the folder") from error


def _merge_file(config: Config, path: Path, root: Path, above: tuple[Path, ...]) -> None:
    if path in above:
        chain = " -> ".join(p.name for p in (*above, path))
        raise ConfigError(f"BASE goes in a circle: {chain}", f"remove BASE from {path}")
    tree = config_files.read(path)
    bases = tree.pop("BASE", None) or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"BASE in {path} is {schema.shown(bases)}, wanted a list of file names",
            "write BASE: ['common.yaml']",
        )
    for base in filter(None, bases):  # the official default is ['']
        below = (path.parent / base).resolve()
        if not below.is_relative_to(root):
            raise ConfigError(
                f"BASE '{base}' in {path} leads out of {root}",
                "keep the file it is based on in the same folder or below",
            )
        _merge_file(config, below, root, (*above, path))
    _merge_tree(config, tree, "", _from_here(path))


def _from_here(path: Path) -> str:
    """A path as short as it can be written without leading dots."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _merge_tree(config: Config, tree: Mapping[Any, Any], prefix: str, origin: str) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in schema.FOREIGN:
            if key not in config.ignored:
                config.ignored.append(key)
        elif key in _SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key} is {schema.shown(value)} ({origin}), but it is a section",
                    f"it holds {', '.join(_children(key))}",
                )
            _merge_tree(config, value, f"{key}.", origin)
        else:
            put(config, key, value, origin)
    if prefix == "DATA." and tree.get("DATASET") == "imagenet22K":
        if "MODEL.NUM_CLASSES" not in config.origins:  # as the official data loader has it
            put(config, "MODEL.NUM_CLASSES", 21841, f"DATA.DATASET in {origin}")


def _unknown(key: str, origin: str) -> ConfigError:
    """The error for an unknown key, with the nearest one by its full name or its last word."""
    if key in _SECTIONS:
        return ConfigError(
            f"{key} ({origin}) is a section, not a value",
            f"set one of {', '.join(f'{key}.{child}' for child in _children(key)[:6])}",
        )
    known = {name.casefold(): name for name in (*_DEFAULT_OF, *_SECTIONS)}
    near = difflib.get_close_matches(key.casefold(), known, n=1, cutoff=0.75)
    if not near:
        lasts = {name.rpartition(".")[2].casefold(): name for name in (*_SECTIONS, *_DEFAULT_OF)}
        last = key.rpartition(".")[2].casefold()
        near = [lasts[m] for m in difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)]
    nearest = known.get(near[0], near[0]) if near else ""
    return ConfigError(
        f"there is no configuration key '{schema.shown(key)}' ({origin})",
        f"did you mean {nearest}?" if nearest else "swinq/main.py --print-config lists every key",
    )


def _children(section: str) -> list[str]:
    node: Any = DEFAULTS
    for name in section.split("."):
        node = node[name]
    return list(node)


def _sections(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{name}"
            yield from _sections(value, f"{prefix}{name}.")


_SECTIONS = frozenset(_sections(DEFAULTS))


def _plain(value: Any) -> Any:
    """Plain dictionaries and lists, as YAML writes them without tags."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
