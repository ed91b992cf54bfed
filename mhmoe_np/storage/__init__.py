"""Bytes on disk, whole or absent: files and tensors. Knows no model."""
