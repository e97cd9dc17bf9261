"""Layouts, and what follows from them: meshes, shards, and the bytes that move."""
