"""Retrieval and composition metrics: pure functions on arrays."""
