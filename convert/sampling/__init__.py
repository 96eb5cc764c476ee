"""Text that a checkpoint writes itself, to be calibrated on: sampled from the original, rows at a time."""
