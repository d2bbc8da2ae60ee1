"""The subcommands of `cm`, one module per group; each `add_parsers` declares its subcommands."""
