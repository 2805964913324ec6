"""The command line `lissom`: one module per command, and the options that commands share. No other room imports it."""
