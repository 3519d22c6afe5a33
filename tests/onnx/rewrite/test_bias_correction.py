"""Bias correction: what quantized weights shift, a bias takes back; checked on data in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from support.graphs import model, node, normal

from quantcli.calibration.observers import Observer
from quantcli.core.scheme import PRESETS
from quantcli.onnx.graph.values import array
from quantcli.onnx.rewrite.bias_correction import output_shift, subtract_from_bias
from quantcli.onnx.weights.integer import integer_weight


def convolved(x: np.ndarray, weight: np.ndarray, group: int) -> np.ndarray:
    """A convolution without padding, float64."""
    windows = sliding_window_view(x.astype(np.float64), weight.shape[2:], axis=(2, 3))
    per, outputs = weight.shape[1], weight.shape[0] // group
    parts = [
        np.einsum("nihwkl,oikl->nohw", windows[:, g * per : (g + 1) * per], weight[g * outputs : (g + 1) * outputs])
        for g in range(group)
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(("shape", "group"), [((6, 4, 1, 1), 1), ((6, 2, 3, 3), 2), ((4, 1, 3, 3), 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_mean_of_a_convolutions_output_is_kept(shape: tuple[int, ...], group: int, with_bias: bool) -> None:
    weight, bias = normal(*shape, seed=1) ** 3, normal(shape[0], seed=2)
    # One value per channel and sample everywhere: then a kernel's every position sees the same mean.
    x = np.broadcast_to(normal(8, shape[1] * group, 1, 1, seed=3) + 2, (8, shape[1] * group, 6, 6)).astype(np.float32)
    held = {"w": weight, **({"b": bias} if with_bias else {})}
    proto = model([node("Conv", ["x", *held], ["y"], group=group)], {"x": None}, {"y": None}, held)
    graph = ir.from_proto(proto).graph
    conv = graph[0]
    found = integer_weight(graph, conv, PRESETS["int8"].weights, "rtn")
    shift = output_shift(conv, found, x.mean((0, 2, 3), dtype=np.float64))
    assert shift is not None
    codes = array(found.codes)
    assert codes is not None
    restored = codes * found.scales.astype(np.float64).reshape(-1, 1, 1, 1)
    expected = (convolved(x, restored, group) - convolved(x, weight.astype(np.float64), group)).mean((0, 2, 3))
    np.testing.assert_allclose(shift, expected, rtol=1e-6, atol=1e-9)
    assert np.abs(expected).max() > 1e-4, "a test without any shift proves nothing"
    subtract_from_bias(graph, conv, shift)
    corrected = array(conv.inputs[2])
    np.testing.assert_allclose(corrected, (bias if with_bias else 0) - expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trans", [0, 1])
def test_the_mean_of_a_gemms_output_is_kept(trans: int) -> None:
    weight = normal(16, 5, seed=1) ** 3
    held = {"w": weight.T.copy() if trans else weight}
    proto = model([node("Gemm", ["x", "w"], ["y"], transB=trans)], {"x": None}, {"y": None}, held)
    graph = ir.from_proto(proto).graph
    found = integer_weight(graph, graph[0], PRESETS["int8"].weights, "rtn")
    codes, mean = array(found.codes), normal(16, seed=4) + 1
    assert codes is not None
    restored = (codes.T if trans else codes) * found.scales.astype(np.float64)
    shift = output_shift(graph[0], found, mean)
    np.testing.assert_allclose(shift, mean.astype(np.float64) @ (restored - weight), rtol=1e-6)


def test_channels_that_do_not_fit_are_not_corrected() -> None:
    proto = model([node("Conv", ["x", "w"], ["y"])], {"x": None}, {"y": None}, {"w": normal(4, 3, 1, 1)})
    graph = ir.from_proto(proto).graph
    found = integer_weight(graph, graph[0], PRESETS["int8"].weights, "rtn")
    assert output_shift(graph[0], found, np.zeros(4)) is None
    assert output_shift(graph[0], found, np.array([0, np.nan, 0])) is None


def test_a_shared_bias_is_corrected_for_one_reader_only() -> None:
    held = {"w": normal(4, 3, 1, 1), "b": normal(4, seed=1)}
    nodes = [node("Conv", ["x", "w", "b"], ["y"]), node("Conv", ["x", "w", "b"], ["z"])]
    graph = ir.from_proto(model(nodes, {"x": None}, {"y": None, "z": None}, held)).graph
    subtract_from_bias(graph, graph[0], np.ones(4))
    np.testing.assert_allclose(array(graph[0].inputs[2]), held["b"] - 1, rtol=1e-6)
    np.testing.assert_array_equal(array(graph[1].inputs[2]), held["b"])


@pytest.mark.parametrize("shape", [(12, 5, 4, 3), (12, 7, 20), (12, 20)])
def test_channel_means_are_those_of_the_data_for_any_split(shape: tuple[int, ...]) -> None:
    values = normal(*shape, seed=6) * 10 + 3
    whole, split = Observer(), Observer()
    whole.update(values)
    for start, stop in ((0, 1), (1, 6), (6, 12)):
        split.update(values[start:stop])
    axes = (0, 2, 3) if values.ndim == 4 else tuple(range(values.ndim - 1))
    mean = whole.result().channel_mean
    assert mean is not None
    np.testing.assert_allclose(mean, values.mean(axes, dtype=np.float64), rtol=1e-5, atol=1e-6)
    split_mean = split.result().channel_mean
    assert split_mean is not None and mean.tobytes() == split_mean.tobytes()
