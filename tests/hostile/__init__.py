"""Hostile input of each kind, as tables and functions that tests and benchmarks share."""
