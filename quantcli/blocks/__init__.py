"""Block by block: a model's layers are quantized in the order of its forward pass, each block from real inputs."""
