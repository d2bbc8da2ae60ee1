"""A run's clone, git and DVC."""
