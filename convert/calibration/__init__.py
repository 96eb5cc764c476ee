"""Quantizing so that a text is read as the original reads it."""
