"""Layouts, meshes, shards, and the bytes that collectives send."""
