"""Sweep files and their report."""
