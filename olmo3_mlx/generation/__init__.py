"""Ids in, ids out: reading a prompt, decoding, choosing tokens. Knows no text."""
