"""Models of other implementations, in and out: their configuration, tensor names and files."""
