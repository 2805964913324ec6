"""Measure a model on Lissom and on other engines, each in a process of its own, and Lissom's programs against the roofline."""
