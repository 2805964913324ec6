"""Training of a program's weights: losses by the form of an output, batches, and the loop; used by the passes that recover."""
