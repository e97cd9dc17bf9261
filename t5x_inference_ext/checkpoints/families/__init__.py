"""Families of public decoders: their settings as a ModelConfig, their tensors as canonical ones."""
