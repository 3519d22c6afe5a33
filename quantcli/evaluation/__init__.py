"""Accuracy: the same data through a reference and its candidates."""
