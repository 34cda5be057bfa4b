"""Fake quantization: one rounding rule, a quantizer per tensor, and a Swin that carries them."""
