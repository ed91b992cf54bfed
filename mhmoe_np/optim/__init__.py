"""What an update of the parameters needs besides their gradient."""
