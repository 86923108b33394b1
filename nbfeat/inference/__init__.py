"""Run networks: from pixels to feature vectors."""
