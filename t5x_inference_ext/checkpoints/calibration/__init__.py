"""Calibration: rounding of a model's matrices by GPTQ, for the activations of a text."""
