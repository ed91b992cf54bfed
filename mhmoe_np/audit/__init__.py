"""Checking the mathematics: every gradient, every tensor, every stored weight."""
