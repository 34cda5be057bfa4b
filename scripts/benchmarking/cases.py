"""Which models, forms and batches are measured: tables, and the tasks that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swinq.errors import ConfigError

BATCHES = (1, 8, 16, 32, 64)
FEW_BATCHES = (1, 32)


@dataclass(frozen=True)
class Model:
    """One model by its names.

    Attributes:
        name: in swinq and in results. title: in tables. timm: what timm calls it.
    """

    name: str
    title: str
    timm: str
    img_size: int

    @property
    def version(self) -> int:
        """1 or 2."""
        return 2 if self.name.startswith("swinv2") else 1


MODELS = {
    model.name: model
    for model in (
        Model("swin_tiny_patch4_window7_224", "Swin-T w7 224", "swin_tiny_patch4_window7_224", 224),
        Model(
            "swin_small_patch4_window7_224", "Swin-S w7 224", "swin_small_patch4_window7_224", 224
        ),
        Model("swin_base_patch4_window7_224", "Swin-B w7 224", "swin_base_patch4_window7_224", 224),
        Model(
            "swin_large_patch4_window7_224", "Swin-L w7 224", "swin_large_patch4_window7_224", 224
        ),
        Model("swinv2_tiny_patch4_window8_256", "SwinV2-T w8 256", "swinv2_tiny_window8_256", 256),
        Model(
            "swinv2_small_patch4_window8_256", "SwinV2-S w8 256", "swinv2_small_window8_256", 256
        ),
        Model("swinv2_base_patch4_window8_256", "SwinV2-B w8 256", "swinv2_base_window8_256", 256),
        Model(
            "swinv2_tiny_patch4_window16_256", "SwinV2-T w16 256", "swinv2_tiny_window16_256", 256
        ),
        Model(
            "swinv2_base_patch4_window16_256", "SwinV2-B w16 256", "swinv2_base_window16_256", 256
        ),
        Model(
            "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
            "SwinV2-L w16 256",
            "swinv2_large_window12to16_192to256",
            256,
        ),
        Model(
            "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
            "SwinV2-B w24 384",
            "swinv2_base_window12to24_192to384",
            384,
        ),
    )
}
FIRST = next(iter(MODELS))  # measured at every batch, and by every form


@dataclass(frozen=True)
class Form:
    """One way to run a model.

    Attributes:
        title: in tables. ours: on libswinq, otherwise timm's model on PyTorch.
        compiled: half a minute of compilation for every batch, so a process for each.
        apart: seconds of compilation, so a process for each model.
        usual: measured without being asked for; the others for `FIRST` alone, or by name.
        versions: of Swin that have it.
    """

    title: str
    ours: bool = False
    compiled: bool = False
    apart: bool = False
    usual: bool = True
    versions: tuple[int, ...] = (1, 2)


FORMS = {
    "eager": Form("eager FP16"),
    "graph": Form("CUDA graph of eager FP16"),
    "trace": Form("jit.trace FP16", apart=True),
    "compile": Form("torch.compile FP16", compiled=True),
    "compile-sdpa": Form(
        "torch.compile FP16, fused attention", compiled=True, usual=False, versions=(1,)
    ),
    "torchao": Form("torchao INT8 dynamic, torch.compile", compiled=True),
    "torchao-static": Form("torchao INT8 static, torch.compile", compiled=True, usual=False),
    "torchao-tuned": Form("torchao INT8 dynamic, tuned Triton GEMMs", compiled=True, usual=False),
    "swinq-fp16": Form("swinq FP16", ours=True),
    "swinq-int8-1": Form("swinq INT8 mode 1", ours=True),
    "swinq-int8-2": Form("swinq INT8 mode 2", ours=True),
    "swinq-fp16-stream": Form("swinq FP16 without a CUDA graph", ours=True),
    "swinq-int8-1-stream": Form("swinq INT8 mode 1 without a CUDA graph", ours=True),
    "swinq-int8-2-stream": Form("swinq INT8 mode 2 without a CUDA graph", ours=True),
}
PEERS = tuple(name for name, form in FORMS.items() if not form.ours)
OURS = tuple(name for name, form in FORMS.items() if form.ours)
STREAM = "-stream"  # ends the names of our forms that run without a CUDA graph
TUNED = "torchao-tuned"  # minutes of compilation: by name only


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    model: str
    forms: tuple[str, ...]
    batches: tuple[int, ...]

    def rows(self) -> list[tuple[str, int, str]]:
        """Keys of the results: model, batch, form."""
        return [(self.model, batch, form) for batch in self.batches for form in self.forms]


def find_models(names: Iterable[str]) -> list[Model]:
    """Models by name.

    Raises:
        ConfigError: one that is not in the table.
    """
    found = []
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"'{name}' is not measured here", f"use {', '.join(MODELS)}")
        found.append(MODELS[name])
    return found


def wanted_batches(model: Model, name: str, asked: Sequence[int], by_name: bool) -> tuple[int, ...]:
    """Batches of a form: those asked for, or the usual ones.

    Args:
        asked: batches of the command line; empty: the usual ones.
        by_name: whether the command line names the form.
    """
    form = FORMS[name]
    if model.version not in form.versions or (name == TUNED and not by_name):
        return ()
    if not (form.usual or by_name or model.name == FIRST):
        return ()
    if asked:
        return tuple(asked)
    graphed = form.ours and not name.endswith(STREAM)
    every = graphed or (form.usual and model.name == FIRST)
    return BATCHES if every else FEW_BATCHES


def tasks(
    models: Sequence[Model],
    peers: Sequence[str] | None,
    ours: Sequence[str] | None,
    batches: Sequence[int] = (),
    have: Iterable[tuple[str, int, str]] = (),
) -> list[Task]:
    """Everything to do, a process each.

    Args:
        peers, ours: names of forms; None: all of them, the unusual ones for `FIRST` alone.
        batches: for every model and form; empty: the usual ones.
        have: rows that need not be measured again.
    """
    done = set(have)
    quick: list[Task] = []
    compiled: list[Task] = []
    for model in models:
        grouped: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for names, every in ((ours, OURS), (peers, PEERS)):
            for name in every if names is None else names:
                left = tuple(
                    batch
                    for batch in wanted_batches(model, name, batches, names is not None)
                    if (model.name, batch, name) not in done
                )
                if FORMS[name].compiled:
                    compiled += [Task(model.name, (name,), (batch,)) for batch in left]
                elif left:
                    group = name if FORMS[name].apart else "ours" if FORMS[name].ours else "peers"
                    grouped.setdefault((group, left), []).append(name)
        quick += [Task(model.name, tuple(g), left) for (_, left), g in grouped.items()]
    return quick + compiled
