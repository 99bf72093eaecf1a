"""Ray Data, Train and Tune around `shine`, and the `shine` command."""
