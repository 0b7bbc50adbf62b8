"""A layer at full size beside a peer, on one machine in one run."""
