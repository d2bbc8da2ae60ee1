"""The recipe: YAML, overrides, validation."""
