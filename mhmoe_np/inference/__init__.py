"""What a trained model is for: scores and text."""
