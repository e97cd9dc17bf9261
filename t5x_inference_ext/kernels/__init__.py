"""Pallas kernels for TPUs. Each has a twin in plain JAX, in model/, which is the default."""
