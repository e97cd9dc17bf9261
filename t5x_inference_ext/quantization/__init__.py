"""Int8: rounding of weights, matmuls by int8 weights, and int8 keys and values of a KV cache."""
