"""What a user sets: the model, the run, and named presets of both; all strict."""
