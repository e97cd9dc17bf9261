"""Public families of decoders: their settings as ModelConfig, their tensors as canonical ones."""
