"""Runs, models and the registry in MLflow."""
