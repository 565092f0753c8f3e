"""Level 0: the LLaMA family in Flax NNX, its sharding and its decoding. Nothing here imports the data."""
