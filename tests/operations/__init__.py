"""Tests of the operations table: backend against backend, definition, derivative and promise."""
