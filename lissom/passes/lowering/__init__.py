"""Exact passes that make programs faster on a machine, each kept where it is measured to be."""
