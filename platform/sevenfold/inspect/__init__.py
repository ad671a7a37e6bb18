"""Inspection of data and of what models predict: losses, attributions, statistics, the ledger."""
