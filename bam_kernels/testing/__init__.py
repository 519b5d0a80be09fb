"""Helpers for testing code that launches the kernels of this package."""
