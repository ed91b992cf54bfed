"""Measurements of this package beside its peers."""
