"""The selfcheck command: tests whether this package computes correctly on the local devices."""
