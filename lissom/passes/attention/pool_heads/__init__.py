"""The pass `pool-heads` and the pooling of a group of heads."""
