"""Cached features, and storage on this machine."""
