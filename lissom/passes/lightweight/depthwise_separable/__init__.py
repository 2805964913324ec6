"""The pass `depthwise-separable` and how it factors a convolution."""
