"""Converting to an ONNX graph."""
