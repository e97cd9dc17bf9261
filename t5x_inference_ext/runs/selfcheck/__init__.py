"""The selfcheck command: whether this package computes on these devices what it should."""
