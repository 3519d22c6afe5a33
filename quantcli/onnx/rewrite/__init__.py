"""Rewriting nodes into quantized ones, one form a file."""
