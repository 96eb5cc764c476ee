"""What weights, caches and a pass take, and what the machine has. All in bytes."""
