"""Readers of stored formats: T5X, Orbax, transformers (safetensors) and GGUF."""
