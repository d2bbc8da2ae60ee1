"""Training methods, one paper a file; none imports a sibling."""
