"""Text to ids and back, messages to a prompt, stop strings. Knows no model."""
