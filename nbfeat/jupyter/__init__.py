"""The notebook interface: magics, completion, progress and panel."""
