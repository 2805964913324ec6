"""Inspection without changes: tables, diffs, timings and progress."""
