"""Everything about a Ray cluster: where it is, what it has, what fits on it."""
