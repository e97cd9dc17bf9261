"""Collectives inside shard_map: single calls (ops), loops around a ring (looped), gathers of weights (weight_gather)."""
