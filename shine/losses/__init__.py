"""Training losses: pure functions from tensors to a scalar, and the criterion that weighs them."""
