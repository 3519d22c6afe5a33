"""ONNX graphs: opening, preparing, placing quantization, proving what became of it."""
