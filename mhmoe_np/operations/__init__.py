"""The closed table of operations and the backends that implement it."""
