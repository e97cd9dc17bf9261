"""Int8 and int4: rounding of weights, matmuls by them, and int8 keys and values of a KV cache."""
