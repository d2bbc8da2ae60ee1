"""The runner of one stage, behind `cm stage`: parameters, progress, signals, tracking."""
