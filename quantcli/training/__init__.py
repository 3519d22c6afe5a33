"""Learning what quantization costs away: scales (tune), or everything (qat)."""
