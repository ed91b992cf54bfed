"""Test-only PyTorch oracle of the model, written from the specification alone."""
