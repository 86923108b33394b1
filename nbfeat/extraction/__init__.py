"""From a frame and feature blocks to feature columns."""
