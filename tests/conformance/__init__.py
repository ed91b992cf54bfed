"""Conformance vectors: what they cover, that they hold, and ports that are checked with them."""
