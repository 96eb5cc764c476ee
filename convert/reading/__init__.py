"""Checkpoints of every form, read some rows or one layer of the model at a time, and texts."""
