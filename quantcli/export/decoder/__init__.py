"""Language models that generate, as ONNX graphs with a key-value cache."""
