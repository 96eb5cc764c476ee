"""The destination: laid out beforehand, filled in pieces, read back, and there only when complete."""
