"""Compilation for TPUs without a TPU: whether a model fits a slice, and the estimated time."""
