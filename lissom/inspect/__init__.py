"""Reading only: tables, diffs, timings and progress for people."""
