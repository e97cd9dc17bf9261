"""Adapters of frozen models: LoRA, (IA)^3 and soft prompts, read into canonical tensors."""
