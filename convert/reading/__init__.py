"""Checkpoints of every form, read some rows at a time, or one layer of the model at a time."""
