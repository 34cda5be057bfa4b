"""The INT8 checkpoint: what is in it, how it is written, how it is read and when it is refused."""
