"""What a layer, a model and a run cost, before anything is trained."""
