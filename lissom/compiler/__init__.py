"""The program and everything that works on it: types, edits, checks, pipelines, analyses. Nothing here knows a backend or a
single pass."""
