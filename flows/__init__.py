"""The pipeline around `cm_core`: recipes, stages, Prefect flows, MLflow tracking, DVC workspaces, the command `cm`."""
