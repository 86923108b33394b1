"""Look at features and at the images they are of."""
