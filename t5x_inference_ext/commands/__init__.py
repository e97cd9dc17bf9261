"""The commands: their flags, help and entry points."""
