"""Servers, deployments and garbage collection."""
