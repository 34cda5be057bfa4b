"""Where the demo's trained weights lie in this installation; configs/demo.yaml describes them."""

from pathlib import Path

CHECKPOINT = Path(__file__).resolve().with_name("micro_swin_digits.safetensors")
