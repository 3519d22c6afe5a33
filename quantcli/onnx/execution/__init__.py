"""Running an ONNX graph in torch, with gradients."""
