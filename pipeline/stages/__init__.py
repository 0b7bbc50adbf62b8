"""What a run does: dequantize, requantize, shard, validate; one file each."""
