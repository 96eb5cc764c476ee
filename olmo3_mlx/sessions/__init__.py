"""Tokens and caches that can go back to any position, in memory and on disk. Knows no text."""
