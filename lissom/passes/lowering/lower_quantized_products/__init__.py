"""The pass `lower-quantized-products`, its quantized activations, and the products that it lowers to."""
