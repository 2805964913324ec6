"""Partitions a program with placements for several ranks: shards weights, and inserts collectives."""
