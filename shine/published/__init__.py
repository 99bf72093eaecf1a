"""Checkpoints of Moment-DETR, QD-DETR and SHINE as their programs write them."""
