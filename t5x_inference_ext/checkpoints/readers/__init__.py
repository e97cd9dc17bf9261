"""Readers of the formats in which T5X and Orbax store checkpoints."""
