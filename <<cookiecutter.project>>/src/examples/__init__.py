"""Examples to copy, or to delete."""
