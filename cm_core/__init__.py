"""Consistency models: noise, preconditioning, methods, samplers, training loop. Needs torch, numpy and pydantic."""
