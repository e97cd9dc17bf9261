"""The commands, their flags and their help."""
