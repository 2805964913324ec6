"""Which dimensions of a program's tensors share their indices, and which indices contribute nothing."""
