"""The transformer in a graph: its attentions, feed-forwards, layers, masks and weight matrices."""
