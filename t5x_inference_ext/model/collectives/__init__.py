"""Collectives inside shard_map: plain, looped around a ring, and gathers of weights."""
