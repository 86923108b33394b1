"""Tools to explore features and their images."""
