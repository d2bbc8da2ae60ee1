"""The subcommands of `cm`, a group a file. Each `add_parsers` declares what its functions answer to."""
