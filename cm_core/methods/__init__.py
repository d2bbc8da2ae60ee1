"""Training methods, one paper per file; none imports a sibling."""
