"""Prefect for the flow: the embedded server, GPU slots, recovery, artifacts."""
