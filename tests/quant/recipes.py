"""The two committed recipes as specs."""

from pathlib import Path
from typing import Any

import yaml

from swinq.quant.spec import QuantSpec

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "quant"


def recipe(name: str, **changes: Any) -> QuantSpec:
    """`configs/quant/{name}.yaml` with sections of its QUANT node replaced."""
    node = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["QUANT"]
    return QuantSpec.from_config({"ALLOW_DEAD": [], "LAYERS": [], **node, **changes})
