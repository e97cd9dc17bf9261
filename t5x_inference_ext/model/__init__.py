"""The model on a mesh: weights, layers, cache, and the passes over them."""
