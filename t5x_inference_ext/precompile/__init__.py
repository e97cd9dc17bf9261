"""The TPU compiler on any machine: does a model fit a slice, how long does a phase take?"""
