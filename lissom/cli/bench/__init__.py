"""Benchmarks for `lissom bench`: Lissom and other engines, each in its own process, and Lissom's programs against the
roofline."""
