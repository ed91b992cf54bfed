"""One layer a file: a forward, what it keeps, and the backward derived from it by hand."""
