"""Public checkpoints: files of other code read into this package's models, and its models written for other code."""
