"""What the subcommands do, once their arguments are parsed: `run(args)` of each module returns an exit code."""
