"""Which layers pay for being quantized: KL to the float logits, one layer at a time.

For every layer two models are run on the same images: only this layer quantized (its own damage),
and only this layer left float (what leaving it out would give back; layers hide and amplify each
other, so the two differ). KL(float || model) is the mean over images, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import yaml
from torch import Tensor

from swinq.errors import ConfigError
from swinq.report.schema import Sensitivity, SensitivityRow, Suggestion

Predict = Callable[[], Tensor]  # -> (images, classes) logits of the same images each time
SetQuantized = Callable[[set[str]], None]  # these layers quantized, all others float

NEGLIGIBLE_KL = 1e-3  # nats; under it predictions hardly ever change, and there is nothing to mend
MOST_LAYERS = 0.1  # of the layers; more is another recipe, not an exception
WORTHWHILE = 0.2  # share of the KL that an exclusion must give back to be advised


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Mean over images of KL(softmax(reference) || softmax(other)), nats; logits are (N, K)."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().clamp(min=0).item()


def measure_sensitivity(
    layers: Sequence[str],
    predict: Predict,
    set_quantized: SetQuantized,
    *,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Sensitivity:
    """Sweep over all layers: 2 len(layers) + 2 predictions.

    Args:
        layers: names that `set_quantized` understands.
        predict: runs the model as it is set now, always on the same images.
        set_quantized: switches layers. All of them are quantized again when this returns or fails.
        progress: wraps the layers, to show how far the sweep is.
    """
    everything = set(layers)
    rows = []
    try:
        set_quantized(set())
        reference = predict()

        def kl(quantized: set[str]) -> float:
            set_quantized(quantized)
            return mean_kl(reference, predict())

        total = kl(everything)
        for layer in progress(layers):
            rows.append(SensitivityRow(layer, kl({layer}), kl(everything - {layer})))
    finally:
        set_quantized(everything)
    return Sensitivity(images=len(reference), all_quantized=total, rows=rows)


def suggest_exclusions(
    sensitivity: Sensitivity,
    predict: Predict,
    set_quantized: SetQuantized,
    recipe: str,
    *,
    share: float = 0.5,
) -> Suggestion:
    """The few layers whose exclusion takes a share of the KL away, tried out together.

    Layers join in the order of what each gives back alone; one that adds nothing to those before it
    is put back. It ends when `share` of the KL is gone or a tenth of the layers has joined.

    Args:
        sensitivity: of the same model and images as `predict`.
        predict: as in `measure_sensitivity`.
        set_quantized: as in `measure_sensitivity`.
        recipe: YAML text of the recipe in use, without BASE, which the suggestion adds to.
        share: of the KL that is to go, in (0, 1].

    Raises:
        ConfigError: `recipe` cannot be added to.
    """
    names = {row.layer for row in sensitivity.rows}
    total = sensitivity.all_quantized
    if total < NEGLIGIBLE_KL:
        reason = f"all layers quantized cost {total:.2g} nats, too little to give a layer up for"
        return Suggestion([], total, total, worth_it=False, reason=reason)
    most = max(1, round(MOST_LAYERS * len(names)))
    chosen: list[str] = []
    left = total
    try:
        set_quantized(set())
        reference = predict()
        ranked = sorted(sensitivity.rows, key=lambda row: (row.only_this_float, row.layer))
        for row in ranked[: 2 * most]:
            if left <= (1 - share) * total or len(chosen) == most or row.only_this_float >= total:
                break
            set_quantized(names - {*chosen, row.layer})
            kl = mean_kl(reference, predict())
            if kl < left:
                chosen, left = [*chosen, row.layer], kl
    finally:
        set_quantized(names)
    gone = 1 - left / total
    worth_it = gone >= WORTHWHILE
    what = (
        f"{len(chosen)} of {len(names)} layers left in fp16 give {100 * gone:.0f} % of the KL back"
    )
    reason = what if worth_it else f"no few layers stand out: {what}"
    suggested = recipe_without(recipe, chosen) if worth_it else ""
    return Suggestion(chosen, total, left, worth_it, reason, suggested)


def recipe_without(recipe: str, layers: Sequence[str]) -> str:
    """The recipe with `layers` set to fp16, after its own rules so that they win.

    Raises:
        ConfigError: the recipe is no YAML mapping, its QUANT.LAYERS is no list, or it has a BASE.
    """
    try:
        content = yaml.safe_load(recipe) or {}
        if "BASE" in content:
            raise ConfigError("the recipe to add to has a BASE", "give its resolved text")
        quant = content["QUANT"] = dict(content.get("QUANT") or {})
        rules = [{"PATTERN": layer, "PRECISION": "fp16"} for layer in layers]
        quant["LAYERS"] = [*(quant.get("LAYERS") or []), *rules]
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"the recipe to add to is malformed: {error}") from error
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
