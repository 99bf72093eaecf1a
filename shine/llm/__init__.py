"""Asking language models: requests, answers that are paid for once, limits that hold for all."""
