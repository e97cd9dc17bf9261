"""Conversion of checkpoints: plan, read, round, write, read back, publish (docs/convert.md)."""
