"""Images in, numbers out: no IPython, no widgets."""
