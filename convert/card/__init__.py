"""The loss of a conversion: measured, judged and written down in the result."""
