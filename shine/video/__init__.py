"""From video to the clips of a feature file."""
