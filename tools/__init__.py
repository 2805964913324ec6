"""Tools for those who work on Lissom; they are not installed with it."""
