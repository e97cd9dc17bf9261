"""Simulation of a service: the real scheduler in virtual time, with a clock instead of programs."""
