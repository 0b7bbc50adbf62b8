"""What the command line offers: one short function a verb, no logic."""
