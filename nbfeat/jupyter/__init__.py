"""The notebook's face: magics, completion, live progress."""
