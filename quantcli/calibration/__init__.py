"""What activations of an ONNX graph are like: ranges, histograms, Hessians."""
