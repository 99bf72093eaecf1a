"""Measurements of speed, and the plain implementation that they compare with."""
