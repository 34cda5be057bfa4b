"""The integer model: reads an INT8 checkpoint and computes on codes. No quantizer is imported."""
