"""Models of this package in other people's evaluation programs."""
