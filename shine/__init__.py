"""Compositional temporal grounding: models, losses, negatives, data and metrics, without Ray."""
