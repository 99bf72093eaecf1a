"""Annotations, features, text, batches, and the planted world."""
