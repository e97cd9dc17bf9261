"""Int8: rounding of weights, matmuls by int8 weights, and keys and values of a KV cache."""
