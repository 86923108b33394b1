"""Features that were computed before."""
