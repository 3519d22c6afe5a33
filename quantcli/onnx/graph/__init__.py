"""ONNX graphs as they are: read, simplified, upgraded, saved."""
