"""The `nvlm` command: its arguments in `cli`, then one command a file."""
