"""What a conversion cost: measured, judged and written down in the result."""
