"""What becomes of each node of an ONNX graph."""
