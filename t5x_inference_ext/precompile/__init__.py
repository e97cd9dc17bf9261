"""The TPU compiler on any machine: does a model fit a slice, and how long does a phase take?"""
