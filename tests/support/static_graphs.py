"""Small ONNX graphs for static quantization, converted and run; and a naive convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from quantcli.models.kernels import Proof, prove
from quantcli.models.session import Session
from quantcli.onnx.graph.opset import upgrade
from quantcli.onnx.graph.save import save_graph
from quantcli.onnx.plan.evidence import Evidence
from quantcli.onnx.plan.judge import needed_opset
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.onnx.rewrite.transform import transform
from quantcli.planning.recipe import validate
from support.graphs import model, node, normal, prepared, run


class Ranges:
    """Ranges of a graph's values on one batch."""

    def __init__(self, graph: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
        from quantcli.onnx.plan.plan import observed_tensors

        proto = ir.to_proto(graph)
        known = {each.name for each in proto.graph.output}
        names = observed_tensors(graph)
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known | feeds.keys())
        self.values = {**feeds, **run(proto, feeds)}
        self.names = names

    def range(self, name: str) -> tuple[float, float]:
        assert name in self.names, f"{name} would not have been observed"
        values = self.values[name]
        return min(0.0, float(values.min())), max(0.0, float(values.max()))

    def sqnr_db(self, name: str, low: float, high: float, levels: int = 256) -> float | None:
        return None

    def channel_mean(self, name: str) -> np.ndarray | None:
        return None


class Converted:
    """A model quantized statically, what the runtime makes of it, and both outputs."""

    def __init__(self, proto: onnx.ModelProto, tmp_path: Path, feeds: Mapping[str, np.ndarray] | None = None,
                 scheme: str = "int8-static", **recipe: Any) -> None:  # fmt: skip
        inputs = [each.name for each in proto.graph.input]
        shapes = [[d.dim_value or 3 for d in each.type.tensor_type.shape.dim] for each in proto.graph.input]
        drawn = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(zip(inputs, shapes, strict=True))}
        feeds = feeds or drawn
        self.feeds, self.proto = feeds, proto
        graph = prepared(proto)
        wishes = validate({"scheme": scheme, **recipe}, "test")
        plan = resolve_graph(wishes, graph, Path("model.onnx"))
        graph = upgrade(graph, needed_opset(plan))
        self.plan: GraphPlan = resolve_graph(wishes, graph, Path("model.onnx"))
        self.ranges = Ranges(graph, feeds)
        self.outcomes = transform(graph, self.plan, Evidence(self.ranges))
        self.graph, self.path = graph, tmp_path / "converted.onnx"
        save_graph(graph, self.path)
        onnx.checker.check_model(self.path)
        self.proof: Proof = prove(self.path)
        self.before = run(proto, feeds)
        self.after = Session(self.path, threads=1).run(feeds)
        assert self.before.keys() == self.after.keys()

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels, domains aside, without the pairs, and without what turns images to the layout of the kernels."""
        layout = ("QuantizeLinear", "DequantizeLinear", "Transpose")
        return {name.removeprefix("Nhwc"): n for name, n in self.proof.kernels.items() if name not in layout}

    @property
    def pairs(self) -> tuple[int, int]:
        """QuantizeLinear and DequantizeLinear that are left."""
        return self.proof.kernels.get("QuantizeLinear", 0), self.proof.kernels.get("DequantizeLinear", 0)

    def sqnr_db(self, name: str = "y") -> float:
        wide = self.before[name].astype(np.float64)
        return float(10 * np.log10(np.square(wide).sum() / np.square(wide - self.after[name]).sum()))


def conv(x: str, w: str, y: str, *rest: str, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [x, w, *rest], [y], **({"pads": [1, 1, 1, 1]} | attributes))


IMAGE = {"x": ["n", 8, 10, 10]}
W, B = normal(8, 8, 3, 3, seed=1, scale=0.2), normal(8, seed=2, scale=0.3)


def net(
    nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("y",), inputs: Any = None, **constants: Any
) -> onnx.ModelProto:
    """Weights w, w2, w3, w4 of 3 x 3 convolutions of 8 channels and a bias b, as far as they are used."""
    known = {"w": W, "b": B, **{f"w{n}": normal(8, 8, 3, 3, seed=n, scale=0.2) for n in (2, 3, 4)}, **constants}
    used = {name for each in nodes for name in each.input}
    held = {name: values for name, values in known.items() if name in used}
    return model(nodes, inputs or IMAGE, dict.fromkeys(outputs), held)


def naive_conv(x: np.ndarray, w: np.ndarray, group: int) -> np.ndarray:
    """Float64 convolution, 3 x 3, padded by one."""
    n, _, height, width = x.shape
    out = np.zeros((n, w.shape[0], height, width))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    each_in, each_out = w.shape[1], w.shape[0] // group
    for o in range(w.shape[0]):
        first = o // each_out * each_in
        for i in range(each_in):
            for dy in range(3):
                for dx in range(3):
                    out[:, o] += w[o, i, dy, dx] * padded[:, first + i, dy : dy + height, dx : dx + width]
    return out
