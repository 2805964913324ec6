"""The program and everything that works on it: types, edits, checks, passes, pipelines, analyses."""
