"""A frame and blocks to columns."""
