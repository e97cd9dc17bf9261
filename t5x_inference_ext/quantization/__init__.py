"""Int8: rounding of weights, the matmul that takes int8 weights, and keys and values of a KV cache."""
