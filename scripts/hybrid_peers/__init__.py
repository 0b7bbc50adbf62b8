"""What else runs such a model, beside ours: made in environments of their own, timed in turns."""
