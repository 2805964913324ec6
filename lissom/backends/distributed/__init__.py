"""Execution on several ranks, one process each: collectives, and how ranks enter and leave a call together."""
