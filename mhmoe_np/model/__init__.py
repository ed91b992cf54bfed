"""The language model: its parameters, its forward and backward, and decoding with a cache."""
