"""Trains models with Ray Train, and computes token caches."""
