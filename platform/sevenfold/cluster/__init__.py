"""Connecting to Ray, and what a Ray cluster and its hardware can hold."""
