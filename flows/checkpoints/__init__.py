"""Checkpoints of trainings in flight, in a folder or in a bucket."""
