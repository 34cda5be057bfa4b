"""The embedded demo: a micro-Swin, trained by scripts/train_demo.py on real handwritten digits."""
