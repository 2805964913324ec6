"""Inspection of programs and reports: tables, diffs, pictures and progress. Modules here change nothing; timing is in
`measure`."""
