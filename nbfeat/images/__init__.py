"""A cell of the image column: RGB pixels, or the reason why not."""
