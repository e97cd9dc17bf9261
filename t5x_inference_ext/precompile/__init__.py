"""The TPU compiler on an ordinary machine: does a model fit a slice, and how long would each phase take there."""
