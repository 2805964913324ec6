"""Plans of tensor parallelism for transformers: the rules, the file, and the run on several ranks in fresh processes."""
