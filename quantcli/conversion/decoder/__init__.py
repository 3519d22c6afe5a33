"""Checkpoints of language models to decoders with a key-value cache: quantized once, packed, proven."""
