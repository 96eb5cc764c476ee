"""Keys and values of tokens already seen, and attention over them. Knows no model."""
