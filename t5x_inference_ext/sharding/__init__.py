"""Layouts, and their consequences: meshes, shards, and the bytes that move."""
