"""Conformance vectors: inputs with the results and gradients that a right implementation gets."""
