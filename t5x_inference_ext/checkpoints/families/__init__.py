"""Public families of decoders: from their settings and names to ModelConfig and canonical tensors."""
