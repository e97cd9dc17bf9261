"""Collectives inside shard_map: single calls, loops around a ring, and gathers of weights."""
