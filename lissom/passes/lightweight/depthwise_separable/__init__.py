"""The pass `depthwise-separable` and its factorization of convolutions."""
