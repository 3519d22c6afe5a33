"""Schemes, tensors, numerics: what every room speaks of."""
