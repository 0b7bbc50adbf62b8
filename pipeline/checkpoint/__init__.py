"""What is on disk: reading any supported model directory, writing ours; knows no transformers."""

from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.stored import State, StoredWeight, TensorEntry
from pipeline.checkpoint.summary import Summary

__all__ = ["Checkpoint", "State", "StoredWeight", "Summary", "TensorEntry"]
