"""The commands of `shine`, one module for each group."""
