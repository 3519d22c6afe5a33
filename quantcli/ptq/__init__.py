"""Quantizing the layers of a block from data."""
