"""`python -m lissom` is the command line."""

from lissom.cli.main import main

main()
