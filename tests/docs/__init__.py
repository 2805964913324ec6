"""The documentation runs, and says what is so."""
