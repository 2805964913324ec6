"""Which units of a model matter least, and what the rest makes up for."""
