"""Opens a checkpoint of any container: raw tensors by name, and what else the file says.

Known containers: `.pth` zips of torch.save (bare, or wrapped as {"model": ...}), safetensors, and a
folder of the Hugging Face hub. The container is told by the file's first bytes, never by its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from swinq.errors import CheckpointError
from swinq.models.pickle_reader import Inert, StoredTensor, TorchFile

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
INT8_FORMAT = "swinq-int8"
MAX_JSON_BYTES = 16 << 20
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "model_ema", "state_dict_ema")
_WANTED = "wanted a .pth or .safetensors file of a Swin Transformer"
_COPY_AGAIN = "copy or download the file again and compare its size and sha256 with the source"

# first bytes -> (what it is, what to do); the legacy formats are pickles outside of a zip
_LEGACY = (
    "a .pth of the format that torch wrote before 1.6",
    "convert it where you trust it: torch.save(torch.load(old, weights_only=True), new)",
)
_HTML = (
    "a web page, not a checkpoint",
    "the download returned an error or a login page; fetch the file itself",
)
_FOREIGN: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", _LEGACY),
    (b"\x80", ("a bare pickle", _LEGACY[1])),
    (b"<", _HTML),
    (
        b"version https://git-lfs",
        ("a Git LFS pointer, not the file", "run git lfs pull in the folder it came from"),
    ),
    (b"\x1f\x8b", ("gzip-compressed", "unpack it first: gunzip")),
    (b"\x89HDF", ("an HDF5 file", "export its state dict to .safetensors")),
    (b"\x08\x07\x12", ("an ONNX file", "pass the checkpoint that it was exported from")),
)


@dataclass
class Contents:
    """What a checkpoint file holds, before its names are understood."""

    path: Path
    tensors: dict[str, Tensor]  # raw names and dtypes, on the CPU
    training_config: dict[Any, Any] = field(default_factory=dict)  # yacs tree of a training run
    hub_config: dict[str, Any] = field(default_factory=dict)  # config.json beside the file
    model_names: list[tuple[str, str]] = field(default_factory=list)  # (where it stands, text)
    classes: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors
    notes: list[str] = field(default_factory=list)


def open_contents(path: Path) -> Contents:
    """Read a checkpoint file, or the one checkpoint in a folder.

    Raises:
        CheckpointError: names the path, what was wanted, and the fix.
    """
    path = _file_in(path) if path.is_dir() else path
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror})", "check the path and its permissions")
    if size == 0:
        _refuse(path, "is empty", _COPY_AGAIN)
    if head.startswith(b"PK"):
        contents = _from_torch_file(path)
    elif _is_safetensors(head, size):
        contents = _from_safetensors(path)
    else:
        _refuse_foreign(path, head)
    _read_hub_config(contents)
    contents.model_names += [("file name", path.name), ("folder name", path.absolute().parent.name)]
    return contents


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith(".index.json") for name in names):
        _refuse(folder, "holds a checkpoint in several shards", "merge them into one .safetensors")
    _refuse(
        folder,
        f"is a folder without {' or '.join(FOLDER_FILES)}; it holds {names[:4]}",
        "pass the checkpoint file itself",
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    header = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= header <= 100_000_000


def _refuse_foreign(path: Path, head: bytes) -> NoReturn:
    start = head.lstrip()
    for magic, (kind, fix) in _FOREIGN:
        if start.startswith(magic):
            _refuse(path, f"is {kind}; {_WANTED}", fix)
    if b"\0" not in head[:32] and path.name.endswith(".tar"):
        _refuse(path, f"is {_LEGACY[0]}; {_WANTED}", _LEGACY[1])
    _refuse(path, f"is no known checkpoint format; {_WANTED}", _COPY_AGAIN)


def _from_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") == INT8_FORMAT:
                _refuse(
                    path,
                    "is an exported INT8 model; wanted a float checkpoint",
                    "run it with --eval, which recognises it; calibrate, train and export "
                    "start from the float checkpoint",
                )
            # cloned: the file may be replaced while the tensors live
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        _refuse(path, f"is a damaged safetensors file: {str(error)[:200]}", _COPY_AGAIN)
    return Contents(path, tensors, classes=_classes(metadata), metadata=metadata)


def _classes(metadata: dict[str, str]) -> list[str] | None:
    try:
        classes = json.loads(metadata.get("classes", "null"))
    except ValueError:
        return None
    return _strings(classes)


def _strings(values: Any) -> list[str] | None:
    if isinstance(values, list | tuple) and values and all(isinstance(v, str) for v in values):
        return list(values)
    return None


def _from_torch_file(path: Path) -> Contents:
    with TorchFile(path) as file:
        tree = file.tree
        stored = _state_dict(path, tree)
        contents = Contents(path, {name: file.load(tensor) for name, tensor in stored.items()})
    if stored is not tree:
        contents.classes = _strings(tree.get("classes"))
        if isinstance(tree.get("config"), dict):
            contents.training_config = tree["config"]
        if isinstance(tree.get("arch"), str):  # timm's training script
            contents.model_names.append(("stored name", tree["arch"]))
        for score in ("top1", "top5", "max_accuracy"):
            if isinstance(tree.get(score), float):
                contents.notes.append(f"{score} stored in the file: {tree[score]:.2f}")
    return contents


def _state_dict(path: Path, tree: Any) -> dict[str, StoredTensor]:
    """The model's tensors, however deep they are wrapped."""
    for _ in range(3):
        if not isinstance(tree, dict) or (isinstance(tree, Inert) and not tree):
            break
        tensors = {
            name: value
            for name, value in tree.items()
            if isinstance(name, str) and isinstance(value, StoredTensor)
        }
        if any("." in name for name in tensors):
            return tensors
        tree = next((tree[key] for key in _WRAPPERS if isinstance(tree.get(key), dict)), tree)
    if isinstance(tree, Inert):
        _refuse(
            path,
            f"holds a pickled object of class {tree.origin}, which is never executed",
            "save its parameters: torch.save(model.state_dict(), 'model.pth')",
        )
    keys = list(tree)[:4] if isinstance(tree, dict) else type(tree).__name__
    _refuse(
        path,
        f"holds no state dict; its top level is {keys}",
        "save {'model': model.state_dict()} or the state dict itself",
    )


def _read_hub_config(contents: Contents) -> None:
    """Take windows, classes or the model's name from config.json of a hub folder."""
    path = contents.path.parent / "config.json"
    if contents.path.name not in FOLDER_FILES or not path.is_file():
        return
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} at the top level")
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, f"is no model configuration ({error})", "download the folder again")
    contents.hub_config = config
    if isinstance(config.get("architecture"), str):  # timm
        contents.model_names.append(("config.json", config["architecture"]))
    labels = config.get("id2label")
    if contents.classes is None and isinstance(labels, dict) and "LABEL_0" not in labels.values():
        try:
            contents.classes = _strings([labels[key] for key in sorted(labels, key=int)])
        except ValueError:
            contents.notes.append("config.json: the keys of id2label are no numbers; ignored")


def _refuse(path: Path, problem: str, fix: str) -> NoReturn:
    raise CheckpointError(f"{path} {problem}", fix)
