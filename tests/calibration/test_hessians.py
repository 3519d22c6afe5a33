"""Sums of x x^T of layers' inputs: against naive loops, and the windows against onnxruntime's own convolution."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import model, node, normal, prepared, run

from quantcli.calibration.hessians import CollectedHessians, collect_hessians
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.errors import InputError
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.prepare import prepare
from quantcli.onnx.plan.layer_inputs import LayerInput, layer_input
from quantcli.onnx.plan.plan import GraphPlan, NodePlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.planning.recipe import Recipe

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 7, 6), (4, 3, 3, 2), {}),
    ((2, 3, 7, 6), (4, 3, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ((1, 4, 9, 8), (6, 2, 3, 3), {"group": 2, "dilations": [2, 1], "pads": [1, 1, 1, 1]}),
    ((2, 5, 6, 6), (10, 1, 3, 3), {"group": 5, "strides": [2, 2]}),
    ((2, 3, 7, 8), (4, 3, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ((2, 3, 7, 8), (4, 3, 2, 4), {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    ((2, 3, 7, 8), (4, 3, 2, 4), {"auto_pad": "VALID", "strides": [1, 2], "dilations": [2, 1]}),
    ((3, 4, 11), (6, 4, 3), {"pads": [2, 1], "strides": [2]}),
    ((2, 8, 5, 5), (6, 8, 1, 1), {}),
]


def conv(x: np.ndarray, weight: np.ndarray, attributes: dict[str, Any]) -> tuple[onnx.ModelProto, LayerInput]:
    proto = model([node("Conv", ["x", "w"], ["y"], **attributes)], {"x": x.shape}, {"y": None}, {"w": weight})
    graph = ir.from_proto(proto).graph
    tensor = graph.initializers["w"].const_value
    assert tensor is not None
    found = layer_input(graph[0], tensor)
    assert isinstance(found, LayerInput)
    return proto, found


@pytest.mark.parametrize(("shape", "kernel", "attributes"), CONVOLUTIONS)
@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_windows_times_weight_is_the_convolution(
    monkeypatch: pytest.MonkeyPatch, shape: Any, kernel: Any, attributes: Any, elements: int
) -> None:
    monkeypatch.setattr("quantcli.onnx.plan.layer_inputs._WINDOW_ELEMENTS", elements)
    x, weight = normal(*shape), normal(*kernel, seed=1)
    proto, found = conv(x, weight, attributes)
    expected = run(proto, {"x": x})["y"]
    parts = [part.numpy() for part in found.rows(x)]
    rows = np.concatenate(parts, axis=1)
    assert (len(parts) > len(x)) == (elements == 1)
    groups = len(rows)
    assert rows.shape[2] == np.prod(kernel[1:])
    by_group = weight.reshape(groups, kernel[0] // groups, -1)
    places = rows.shape[1] // len(x)
    got = np.einsum("gpk,gok->gop", rows, by_group).reshape(kernel[0], len(x), places)
    np.testing.assert_allclose(np.moveaxis(got, 0, 1).reshape(expected.shape), expected, atol=1e-4)


def naive_gram(x: np.ndarray, kernel: tuple[int, int], group: int, stride: int, pad: int) -> np.ndarray:
    """Every window of every image, one by one."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    per = x.shape[1] // group
    total = np.zeros((group, per * kernel[0] * kernel[1], per * kernel[0] * kernel[1]))
    for image, g in product(padded, range(group)):
        for top in range(0, image.shape[1] - kernel[0] + 1, stride):
            for left in range(0, image.shape[2] - kernel[1] + 1, stride):
                window = image[g * per : (g + 1) * per, top : top + kernel[0], left : left + kernel[1]].reshape(-1)
                total[g] += np.outer(window, window)
    return total


class Collected:
    """A model on data: the plan, and its Hessians."""

    def __init__(self, proto: onnx.ModelProto, folder: Path, arrays: dict[str, np.ndarray], **options: Any) -> None:
        onnx.save(proto, folder / "model.onnx")
        np.savez(folder / "data.npz", **arrays)
        opened = open_onnx(folder / "model.onnx")
        graph = prepare(opened)
        scheme = options.pop("scheme", "int8")
        self.plan: GraphPlan = resolve_graph(Recipe(scheme=scheme, algorithm="gptq"), graph, opened.path)
        self.samples: Samples = load_samples(DataRequest(str(folder / "data.npz")), opened.inputs, folder=None)
        self.folder = folder / "hessians"
        self.calls: list[tuple[int, int]] = []
        self.found: CollectedHessians = collect_hessians(
            graph, self.plan, self.samples, self.folder, progress=lambda *call: self.calls.append(call), **options
        )

    def node(self, name: str) -> NodePlan:
        return next(each for each in self.plan.nodes if each.name == name)

    def values(self, name: str) -> np.ndarray:
        return np.asarray(self.found.of(self.node(name)).values)


@pytest.mark.parametrize(("group", "stride", "pad"), [(1, 1, 1), (2, 2, 0), (4, 1, 1)])
def test_a_convolutions_sum_is_that_of_a_naive_loop(tmp_path: Path, group: int, stride: int, pad: int) -> None:
    x, weight = normal(5, 4, 9, 8), normal(32, 4 // group, 3, 3)
    attributes = {"group": group, "strides": [stride] * 2, "pads": [pad] * 4}
    proto = model([node("Conv", ["x", "w"], ["y"], **attributes)], {"x": ["n", 4, 9, 8]}, {"y": None}, {"w": weight})
    found = Collected(proto, tmp_path, {"x": x}).values("w")
    np.testing.assert_allclose(found, naive_gram(x, (3, 3), group, stride, pad), rtol=1e-4, atol=1e-3)


def attention() -> onnx.ModelProto:
    """Three products of one input, one of what comes of them; ``twice`` is read by two products."""
    nodes = [
        node("MatMul", ["x", "q"], ["a"]), node("MatMul", ["x", "k"], ["b"]), node("Mul", ["a", "b"], ["c"]),
        node("MatMul", ["c", "twice"], ["d"]), node("Erf", ["d"], ["e"]), node("MatMul", ["e", "twice"], ["f"]),
        node("Gemm", ["g", "turned"], ["y"], transA=1, transB=1),
        node("Reshape", ["f", "flat"], ["g"]),
    ]  # fmt: skip
    nodes[-2:] = nodes[:-3:-1]
    held = {
        "q": normal(24, 32, seed=1), "k": normal(24, 32, seed=2), "twice": normal(32, 32, seed=3),
        "turned": normal(40, 7, seed=4), "flat": np.array([7, 32]),
    }  # fmt: skip
    return model(nodes, {"x": [1, 7, 24]}, {"y": None}, held)


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_sums_of_products_and_what_is_shared(tmp_path: Path, chunk_bytes: int) -> None:
    x = normal(6, 7, 24)
    collected = Collected(attention(), tmp_path, {"x": x}, chunk_bytes=chunk_bytes)
    wide = x.astype(np.float64)
    graph = ir.from_proto(attention())
    inner = {}
    for name in ("c", "e", "g"):
        value = next(v for each in graph.graph for v in each.outputs if v.name == name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(value)
    for sample in wide.astype(np.float32):
        for name, values in run(graph, {"x": sample[None]}).items():
            inner.setdefault(name, []).append(values.astype(np.float64))

    def gram(*parts: np.ndarray) -> np.ndarray:
        rows = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
        return rows.T @ rows

    def close(name: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(collected.values(name)[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    close("q", gram(wide))
    close("k", gram(wide))
    close("twice", gram(*inner["c"], *inner["e"]))
    close("turned", gram(*(part.T for part in inner["g"])))
    # x once for two weights, each of the others once.
    assert len(list(collected.folder.glob("*.npy"))) == 4
    chunks = {1: 4, 10_000: 2, 1 << 30: 1}[chunk_bytes]
    assert collected.calls[-1] == (6 * chunks, 6 * chunks)
    assert not any(collected.found.problem(node) for node in collected.plan.nodes)


def test_inputs_that_tell_nothing(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["z", "v"], ["b"]), node("Add", ["a", "b"], ["y"]),
    ]  # fmt: skip
    held = {"w": normal(16, 32), "v": normal(16, 32, seed=1)}
    proto = model(nodes, {"x": ["n", 16], "z": ["n", 16]}, {"y": None}, held)
    x = normal(4, 16)
    x[2, 3] = np.nan
    collected = Collected(proto, tmp_path, {"x": x, "z": np.zeros((4, 16), np.float32)})
    assert collected.found.problem(collected.node("w")) == "its input was not finite in every sample"
    assert collected.found.problem(collected.node("v")) == "its input was zero in every sample"
    other = resolve_graph(Recipe(scheme="int8", algorithm="gptq"), prepared(attention()), Path("other.onnx"))
    assert collected.found.problem(other.nodes[0]) == "its input was not observed"


def test_no_room_for_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match="The disk is full"):
        Collected(attention(), tmp_path, {"x": normal(2, 7, 24)})


@pytest.mark.parametrize(
    ("each", "weight", "says"),
    [
        (node("Gather", ["w", "x"], ["y"]), normal(30, 16), "a lookup multiplies by nothing"),
        (node("Conv", ["x", "w"], ["y"]), normal(4, 2, 3, 3, 3), "a convolution over 3 dimensions"),
        (node("ConvTranspose", ["x", "w"], ["y"]), normal(4, 2, 3, 3), "no weight-only form of ConvTranspose exists"),
        (node("MatMul", ["w", "w"], ["y"]), normal(16, 16), "its input is constant"),
    ],
)
def test_what_is_not_a_product_of_a_weight(each: onnx.NodeProto, weight: np.ndarray, says: str) -> None:
    graph = ir.from_proto(model([each], {"x": None}, {"y": None}, {"w": weight})).graph
    tensor = graph.initializers["w"].const_value
    assert tensor is not None
    assert layer_input(graph[0], tensor) == says
