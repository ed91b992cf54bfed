"""Checkpoint directories: whole state in, whole state out."""
