"""Another implementation's trace beside ours: what differs first, and which mistake explains it."""
