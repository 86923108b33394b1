"""The panel: a result from choices alone."""
