"""Networks with a layer that fixed ranges ruin, though it computes nothing unusual."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from support.graphs import model, node, normal

#: Channels, and rows and columns of images.
WIDTH, SIDE = 16, 12


def convolutions(count: int, *, fragile: int | None = None, outlier: float = 60.0) -> onnx.ModelProto:
    """So many convolutions with ReLU, and a head: x ``[n, 3, 12, 12]`` -> y ``[n, 10]``, scores of classes.

    The ``fragile`` one has channels, just over half of them, whose values are ``outlier`` times as large, which the
    next layer takes back: the function stays, and 256 levels over the whole range leave few for the other channels.
    """
    nodes, held, x = [], {}, "x"
    for number in range(count):
        name, inputs = f"conv{number}", 3 if number == 0 else WIDTH
        held[f"{name}.weight"] = normal(WIDTH, inputs, 3, 3, seed=number, scale=(2 / (9 * inputs)) ** 0.5)
        held[f"{name}.bias"] = normal(WIDTH, seed=100 + number, scale=0.05)
        nodes += [
            node("Conv", [x, f"{name}.weight", f"{name}.bias"], [f"c{number}"], name=name, pads=[1, 1, 1, 1]),
            node("Relu", [f"c{number}"], [f"r{number}"]),
        ]
        x = f"r{number}"
    nodes += [
        node("GlobalAveragePool", [x], ["p"]), node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "head.weight", "head.bias"], ["logits"], name="head", transB=1),
    ]  # fmt: skip
    held |= {"head.weight": normal(10, WIDTH, seed=7), "head.bias": normal(10, seed=8, scale=0.1)}
    if fragile is not None:
        many = slice(0, WIDTH // 2 + 1)
        held[f"conv{fragile}.weight"][many] *= outlier
        held[f"conv{fragile}.bias"][many] *= outlier
        held[f"conv{fragile + 1}.weight"][:, many] /= outlier
    return model(nodes, {"x": ["n", 3, SIDE, SIDE]}, {"logits": ["n", 10]}, held)


def products(count: int, *, fragile: int | None = None, outlier: float = 60.0) -> onnx.ModelProto:
    """So many matrix products with ReLU between them: x ``[n, 48]`` -> logits ``[n, 48]``, as for convolutions."""
    size = 48
    held = {f"product{n}.weight": normal(size, size, seed=n, scale=(2 / size) ** 0.5) for n in range(count)}
    nodes, x = [], "x"
    for number in range(count):
        last = number == count - 1
        y = "logits" if last else f"m{number}"
        nodes.append(node("MatMul", [x, f"product{number}.weight"], [y], name=f"product{number}"))
        if not last:
            nodes.append(node("Relu", [y], [f"r{number}"]))
            x = f"r{number}"
    if fragile is not None:
        many = slice(0, size // 2 + 1)
        held[f"product{fragile}.weight"][:, many] *= outlier
        held[f"product{fragile + 1}.weight"][many] /= outlier
    return model(nodes, {"x": ["n", size]}, {"logits": ["n", size]}, held)


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    """The model as a file."""
    onnx.save(proto, path)
    return path


def samples(proto: onnx.ModelProto, path: Path, count: int, seed: int = 0) -> Path:
    """Normal values for the model's input as ``.npz``."""
    shape = [dimension.dim_value for dimension in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    np.savez(path, x=normal(count, *shape, seed=seed))
    return path
