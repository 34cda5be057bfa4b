"""Calibration: observers collect, methods search, calibrate runs the model and sets the ranges."""
