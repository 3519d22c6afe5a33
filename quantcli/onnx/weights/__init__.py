"""Codes of an ONNX graph's weights."""
