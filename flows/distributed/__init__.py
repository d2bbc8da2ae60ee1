"""Devices of this machine, and the processes that share a stage."""
