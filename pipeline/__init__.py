"""Requantise huge mixture-of-experts checkpoints and run them hybrid on ordinary hardware."""

__version__ = "0.1.0"
