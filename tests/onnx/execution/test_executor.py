"""Graphs as torch functions: every operator as onnxruntime computes it, gradients as torch's own, nothing kept."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import real_models
from support.graphs import model, node, normal, opened, run
from torch import Tensor

from quantcli.core.numerics import decibels
from quantcli.errors import InputError
from quantcli.export.export import export_to_onnx
from quantcli.models.session import Session
from quantcli.onnx.execution.elementwise import HOST_INPUTS, OPERATORS, to_torch
from quantcli.onnx.execution.executor import TorchGraph
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.graph.prepare import prepare

Array = np.ndarray | None


def single(op: str, inputs: Sequence[Array], outputs: int = 1, opset: int = 18, **attributes: Any) -> onnx.ModelProto:
    """A graph of one node, fed by inputs a, b, c... and with outputs y0, y1..."""
    given = {name: values for name, values in zip("abcdefg", inputs, strict=False) if values is not None}
    names = ["" if values is None else name for name, values in zip("abcdefg", inputs, strict=False)]
    made = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [node(op, names, made, **attributes)],
        op,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
            for name, values in given.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in made],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def fed(inputs: Sequence[Array]) -> dict[str, np.ndarray]:
    return {name: values for name, values in zip("abcdefg", inputs, strict=False) if values is not None}


def in_torch(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = TorchGraph(ir.from_proto(proto)).run({name: torch.from_numpy(each) for name, each in feeds.items()})
    return {name: each.numpy() for name, each in outputs.items()}


def case(op: str, *inputs: Array, **options: Any) -> Any:
    """One use of an operator; options are the attributes, ``outputs`` and ``opset``."""
    return pytest.param(op, inputs, options, id=op)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def scalar(value: Any, dtype: Any = np.int64) -> np.ndarray:
    return np.array(value, dtype=dtype)


def bools(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def whole(*shape: int, low: int = -20, high: int = 20, dtype: Any = np.int64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def distinct(*shape: int) -> np.ndarray:
    """No two equal, so that the place of the greatest is one only."""
    return np.random.default_rng(1).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)


X = normal(2, 3, 4)
Y = normal(3, 1, seed=1)
POSITIVE = np.abs(X) + 0.5
IMAGE = normal(2, 4, 7, 9)
ROWS = normal(2, 4, 11)
VOLUME = normal(1, 2, 5, 6, 4)

POINTWISE = [
    *(
        case(op, X, opset=20)
        for op in [
            "Abs",
            "Asinh",
            "Atan",
            "Ceil",
            "Celu",
            "Cos",
            "Cosh",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "IsInf",
            "IsNaN",
            "LeakyRelu",
            "Mish",
            "Neg",
            "Relu",
            "Selu",
            "Sigmoid",
            "Sign",
            "Sin",
            "Sinh",
            "Size",
            "Softplus",
            "Softsign",
            "Tan",
            "Tanh",
            "ThresholdedRelu",
        ]
    ),
    *(case(op, POSITIVE) for op in ("Log", "Sqrt", "Reciprocal")),
    *(case(op, X / 5) for op in ("Acos", "Asin", "Atanh")),
    case("Acosh", POSITIVE + 1),
    case("Round", floats(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.6)),
    case("Abs", whole(5)),
    case("Neg", whole(5, dtype=np.int32)),
    case("Relu", whole(5, dtype=np.int32)),
    *(case(op, X, Y) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "LessOrEqual", "Greater")),
    *(case(op, whole(3, 4), whole(4, low=1, seed=1)) for op in ("Add", "Sub", "Mul", "Max", "Min", "Mod", "Equal")),
    *(case("Div", whole(9, dtype=dtype), whole(9, low=1, dtype=dtype, seed=2)) for dtype in (np.int32, np.int64)),
    case("Mod", whole(9), ints(3)),
    case("Mod", whole(9), ints(-3)),
    case("Mod", whole(9), ints(-3), fmod=1),
    case("Mod", X, floats(0.7), fmod=1),
    case("GreaterOrEqual", whole(9), ints(1)),
    case("Equal", bools(9), bools(9, seed=1)),
    *(case(op, bools(3, 4), bools(4, seed=1)) for op in ("And", "Or", "Xor")),
    case("Not", bools(5)),
    *(case(op, whole(3, 4), whole(4, seed=1)) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    case("BitwiseNot", whole(5)),
    case("Pow", POSITIVE, Y),
    case("Pow", X, floats(2)),
    case("Pow", X, scalar(3)),
    case("Pow", whole(5), ints(2)),
    case("Pow", whole(5, low=0), floats(0.5)),
    case("PRelu", X, Y),
    case("PRelu", X, floats(0.2)),
    *(case(op, X, Y, normal(4, seed=2)) for op in ("Sum", "Mean", "Max", "Min")),
    case("Sum", X),
    case("Max", X),
    case("Clip", X, scalar(-0.5, np.float32), scalar(0.5, np.float32)),
    case("Clip", X, None, scalar(0.5, np.float32)),
    case("Clip", X, scalar(-0.5, np.float32)),
    case("Clip", X),
    case("Clip", X, scalar(1, X.dtype), scalar(-1, X.dtype)),
    case("Clip", whole(9), scalar(-3), scalar(5), opset=13),
    case("Celu", X, alpha=0.3),
    case("Elu", X, alpha=0.3),
    case("Selu", X, alpha=0.4, gamma=2.0),
    case("LeakyRelu", X, alpha=0.3),
    case("ThresholdedRelu", X, alpha=0.3),
    case("HardSigmoid", X, alpha=0.3, beta=0.2),
    case("Gelu", X, approximate="tanh", opset=20),
    case("Swish", X, opset=24),
    case("Swish", X, alpha=0.4, opset=24),
    case("IsInf", floats(1, np.inf, -np.inf, np.nan)),
    case("IsNaN", floats(1, np.inf, -np.inf, np.nan)),
    case("IsInf", floats(1, np.inf, -np.inf), detect_negative=0),
    case("IsInf", floats(1, np.inf, -np.inf), detect_positive=0),
    case("Where", bools(3, 4), X, Y),
    case("Where", bools(2, 1, 4), whole(3, 1), whole(4, seed=1)),
    case("Dropout", X, outputs=2),
    case("Dropout", X, scalar(0.3, np.float32), scalar(False, bool)),
]

LAYER = [
    case("Conv", ROWS, normal(6, 4, 3), normal(6), pads=[1, 1]),
    case("Conv", ROWS, normal(6, 2, 3), group=2, pads=[2, 0]),
    case("Conv", IMAGE, normal(6, 4, 3, 3)),
    case("Conv", IMAGE, normal(6, 4, 3, 2), strides=[2, 1], pads=[1, 0, 2, 3]),
    case(
        "Conv", IMAGE, normal(8, 1, 3, 3), normal(8), group=4, dilations=[2, 3], pads=[2, 3, 2, 3], kernel_shape=[3, 3]
    ),
    *(
        case("Conv", IMAGE, normal(6, 4, 4, 3), strides=[2, 3], auto_pad=mode)
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET")
    ),
    case("Conv", VOLUME, normal(3, 2, 3, 2, 3), normal(3), pads=[1, 0, 1, 0, 1, 2], strides=[2, 1, 1]),
    case("ConvTranspose", ROWS, normal(4, 3, 3), normal(3), strides=[2]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), normal(6), group=2, strides=[2, 3], pads=[1, 0, 0, 2]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), strides=[2, 3], output_padding=[1, 2], dilations=[1, 2]),
    case(
        "ConvTranspose", IMAGE, normal(4, 3, 3, 3), normal(3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), strides=[2, 2], output_shape=[14, 18]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), normal(3), strides=[2, 2], output_shape=[13, 20]),
    *(
        case("ConvTranspose", IMAGE, normal(4, 3, 4, 3), strides=[2, 3], auto_pad=mode)
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("ConvTranspose", VOLUME, normal(2, 3, 2, 2, 2), strides=[2, 2, 2]),
    case("Gemm", normal(3, 4), normal(4, 5)),
    case("Gemm", normal(3, 4), normal(4, 5), normal(5), alpha=0.5, beta=2.0),
    case("Gemm", normal(4, 3), normal(5, 4), normal(3, 1), transA=1, transB=1),
    case("Gemm", X[0], X[1], transB=1, alpha=3.0),
    case("Gemm", normal(3, 4), normal(4, 5), scalar(2, np.float32)),
    case("MatMul", X, normal(4, 5)),
    case("MatMul", normal(4), normal(2, 4, 5)),
    case("MatMul", normal(4), normal(4)),
    case("MatMul", normal(2, 1, 3, 4), normal(3, 4, 2)),
    case("MaxPool", ROWS, kernel_shape=[3], strides=[2]),
    case("MaxPool", VOLUME, kernel_shape=[2, 3, 2]),
    case("MaxPool", IMAGE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 2, 1]),
    case("MaxPool", IMAGE, kernel_shape=[3, 2], strides=[2, 3], dilations=[2, 1], pads=[1, 1, 1, 1], ceil_mode=1),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1),
    case("MaxPool", IMAGE[..., :5, :5], kernel_shape=[2, 2], strides=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1),
    *(
        case("MaxPool", IMAGE, kernel_shape=[3, 4], strides=[2, 2], auto_pad=f"SAME_{side}")
        for side in ("UPPER", "LOWER")
    ),
    case("MaxPool", whole(1, 2, 5, 5, low=-9, high=-1, dtype=np.int8), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("AveragePool", ROWS, kernel_shape=[3], strides=[2]),
    case("AveragePool", VOLUME, kernel_shape=[2, 3, 2]),
    *(
        case(
            "AveragePool",
            IMAGE,
            kernel_shape=[3, 2],
            strides=[2, 2],
            pads=[1, 0, 2, 1],
            count_include_pad=count,
            ceil_mode=up,
        )
        for count in (0, 1)
        for up in (0, 1)
    ),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1, opset=19),
    case("AveragePool", IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    *(
        case(
            "AveragePool", IMAGE, kernel_shape=[3, 4], strides=[2, 2], auto_pad=f"SAME_{side}", count_include_pad=count
        )
        for side in ("UPPER", "LOWER")
        for count in (0, 1)
    ),
    *(case(op, values) for op in ("GlobalAveragePool", "GlobalMaxPool") for values in (ROWS, IMAGE, VOLUME)),
    case("LayerNormalization", X, normal(4), normal(4, seed=1)),
    case("LayerNormalization", X, normal(4), epsilon=0.1),
    case("LayerNormalization", X, normal(3, 4), normal(3, 4), axis=1, outputs=3),
    case("LayerNormalization", X, normal(4), axis=-2),
    case("LayerNormalization", X, normal(4), outputs=3, axis=-1),
    case("RMSNormalization", X, normal(4), opset=23),
    case("RMSNormalization", X, normal(3, 4), axis=1, epsilon=0.1, opset=23),
    case("GroupNormalization", IMAGE, normal(2), normal(2, seed=1), num_groups=2, epsilon=1e-2),
    case("GroupNormalization", IMAGE, normal(4), normal(4, seed=1), num_groups=2, opset=21),
    case("InstanceNormalization", IMAGE, normal(4), normal(4, seed=1), epsilon=1e-2),
    case("BatchNormalization", IMAGE, *(np.abs(normal(4, seed=i)) for i in range(4)), epsilon=1e-2),
    case("BatchNormalization", X[:, :, 0], *(np.abs(normal(3, seed=i)) for i in range(4)), opset=11),
    case("LpNormalization", X),
    case("LpNormalization", X, axis=1, p=1),
    case("LpNormalization", X * 0, axis=0),
    *(
        case(op, X, opset=opset, **attributes)
        for op in ("Softmax", "LogSoftmax")
        for opset in (11, 18)
        for attributes in ({}, {"axis": 0}, {"axis": -1}, {"axis": -2})
    ),
    case("Attention", *(normal(2, 3, n, 8, seed=i) for i, n in enumerate((4, 6, 6))), opset=23),
    case("Attention", *(normal(2, 3, 4, 8, seed=i) for i in range(3)), opset=23, is_causal=1, scale=0.3),
    case("Attention", *(normal(2, 3, 4, 8, seed=i) for i in range(3)), opset=23, softcap=0.5),
    case("Attention", *(normal(2, 3, 4, 8, seed=i) for i in range(3)), normal(4, 4), opset=23, softcap=0.5),
    case("Attention", *(normal(2, 3, 4, 8, seed=i) for i in range(3)), bools(4, 4) | np.eye(4, dtype=bool), opset=23),
    case(
        "Attention",
        normal(2, 4, 16),
        normal(2, 5, 8),
        normal(2, 5, 8, seed=2),
        normal(4, 5),
        opset=23,
        q_num_heads=4,
        kv_num_heads=2,
    ),
    case(
        "Attention",
        normal(1, 4, 3, 8),
        *(normal(1, 2, 3, 8, seed=i) for i in (1, 2)),
        None,
        *(normal(1, 2, 2, 8, seed=i) for i in (3, 4)),
        opset=23,
        outputs=3,
        is_causal=1,
    ),
    *(
        case(
            "Resize",
            IMAGE[:, :2],
            None,
            floats(1, 1, *scales),
            mode=mode,
            coordinate_transformation_mode=place,
            **rounding,
        )
        for mode, roundings in (
            ("linear", [{}]),
            (
                "nearest",
                [{"nearest_mode": f"{name}"} for name in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")],
            ),
        )
        for place in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
        for rounding in roundings
        for scales in ((2, 2), (0.6, 1.7))
    ),
    *(
        case("Resize", IMAGE, None, None, ints(2, 4, 9, 5), mode=mode, opset=opset)
        for mode in ("nearest", "linear")
        for opset in (13, 18)
    ),
    case("Resize", normal(1, 1, 10, 3), None, floats(1, 1, 0.7, 1)),
    case(
        "Resize",
        IMAGE,
        floats(),
        floats(1, 1, 2, 3),
        opset=11,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    case(
        "Resize",
        IMAGE,
        None,
        None,
        ints(1, 9),
        axes=[2, 3],
        mode="linear",
        coordinate_transformation_mode="pytorch_half_pixel",
    ),
    case(
        "Resize",
        IMAGE,
        None,
        floats(2, 1.5),
        axes=[2, 3],
        mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric",
        opset=19,
    ),
    *(
        case("Resize", IMAGE, None, None, ints(14, 12), axes=[2, 3], keep_aspect_ratio_policy=policy)
        for policy in ("not_larger", "not_smaller", "stretch")
    ),
]

REDUCED = [
    *(
        case(f"Reduce{op}", POSITIVE, None if axes is None else ints(*axes), **options)
        for op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
        for axes, options in (
            (None, {}),
            ((1,), {}),
            ((0, -1), {"keepdims": 0}),
            ((), {"keepdims": 0}),
            ((), {"noop_with_empty_axes": 1}),
            ((2, 0, 1), {"keepdims": 0}),
        )
    ),
    *(case(f"Reduce{op}", X, axes=[0, -1], keepdims=0, opset=11) for op in ("Mean", "Sum", "Max", "L2", "Prod")),
    *(
        case(f"Reduce{op}", whole(3, 4, dtype=np.int32), ints(1))
        for op in ("Sum", "Max", "Mean", "Prod", "L1", "SumSquare")
    ),
    case("ReduceMax", bools(3, 4), ints(1), opset=20),
    case("ReduceSum", scalar(3, np.float32)),
    *(
        case(op, values, **options)
        for op in ("ArgMax", "ArgMin")
        for values in (distinct(2, 3, 4), whole(3, 4, low=0, high=2))
        for options in ({}, {"axis": 1, "keepdims": 0}, {"axis": -1, "select_last_index": 1})
    ),
    case("TopK", distinct(2, 3, 4), ints(2), outputs=2),
    case("TopK", distinct(2, 3, 4), ints(3), axis=1, largest=0, outputs=2),
    case("TopK", whole(30, low=0, high=3), ints(20), outputs=2),
    case("TopK", whole(30, low=0, high=3), ints(20), outputs=2, largest=0),
    case("CumSum", X, scalar(1)),
    case("CumSum", X, scalar(-1), exclusive=1),
    case("CumSum", X, scalar(0), reverse=1),
    case("CumSum", whole(5, dtype=np.int32), scalar(0), reverse=1, exclusive=1),
    case("Einsum", X, normal(2, 4, 5), equation="bij, bjk -> bik"),
    case("Einsum", X, equation="...i->..."),
    case("Einsum", X, X, equation="bij,bij->b"),
]

SHAPED = [
    case("Reshape", X, ints(6, -1)),
    case("Reshape", X, ints(0, -1)),
    case("Reshape", X, ints(4, 0, 2)),
    case("Reshape", X[:1, :1, :1], ints()),
    case("Reshape", X[:0], ints(3, 0), allowzero=1),
    case("Reshape", X[:, :0], ints(3, 0, 4), allowzero=1),
    *(case("Flatten", X, **options) for options in ({}, {"axis": 0}, {"axis": 2}, {"axis": 3}, {"axis": -1})),
    case("Transpose", X),
    case("Transpose", X, perm=[1, 2, 0]),
    case("Squeeze", X[:, :1, None]),
    case("Squeeze", X[:, :1, None], ints(1)),
    case("Squeeze", X[:, :1, None], ints(-2, 1)),
    case("Squeeze", X[:, :1, None], axes=[1], opset=11),
    case("Unsqueeze", X, axes=[0, -1], opset=11),
    case("Unsqueeze", X, ints(0)),
    case("Unsqueeze", X, ints(-1, 1)),
    case("Unsqueeze", X, ints(4, 0)),
    case("Concat", X, X[:1], axis=0),
    case("Concat", X, X[..., :1], X, axis=-1),
    case("Split", X, outputs=2, axis=2, num_outputs=2),
    case("Split", normal(7), outputs=3, num_outputs=3),
    case("Split", X, ints(1, 3), outputs=2, axis=-1),
    case("Split", X, outputs=2, axis=2, split=[1, 3], opset=11),
    case("Split", X, outputs=2, opset=13),
    case("Slice", X, ints(1), ints(3)),
    case("Slice", X, ints(-2, 1), ints(99, -1), ints(-1, 1)),
    case("Slice", X, ints(0, -1), ints(99, -99), ints(0, 2), ints(1, -1)),
    case("Slice", X, ints(-1), ints(np.iinfo(np.int64).min), ints(2), ints(-2)),
    case("Slice", X, ints(3), ints(0), ints(2), ints(-2)),
    case("Slice", X, ints(3), ints(1), ints(2)),
    case("Slice", X, ints(-99), ints(3), ints(2), ints(2)),
    case("Slice", X, ints(1), ints(2), ints(2), ints(5)),
    case("Slice", whole(5), ints(1), ints(3)),
    case("Gather", X, ints(2, 0, -1), axis=1),
    case("Gather", X, scalar(-1), axis=2),
    case("Gather", X, whole(2, 2, low=0, high=2, dtype=np.int32)),
    case("Gather", ints(3, 4, 5), scalar(1)),
    case("Gather", X, whole(0, 2, dtype=np.int32)),
    case("GatherElements", X, whole(2, 3, 2, low=-4, high=4), axis=2),
    case("GatherElements", X, whole(1, 3, 4, low=0, high=2)),
    case("GatherND", X, ints([0, 1], [1, -1])),
    case("GatherND", X, ints([[0, 1, 3]], [[1, 2, 0]])),
    case("GatherND", X, ints([1], [2]), batch_dims=1),
    case("GatherND", X, ints([[[1], [3]]] * 3, [[[0], [2]]] * 3), batch_dims=2),
    *(
        case("ScatterND", X, ints([0, 1], [1, -1], *extra), normal(2 + len(extra), 4, seed=2), reduction=reduction)
        for reduction, extra in (
            ("none", []),
            ("add", [[0, 1]]),
            ("mul", [[0, 1]]),
            ("max", [[0, 1]]),
            ("min", [[0, 1]]),
        )
    ),
    case("ScatterND", X, ints([[0, 1, 3]], [[1, 2, 0]]), normal(2, 1)),
    case("ScatterND", whole(5), ints([3], [0]), ints(7, 8), opset=11),
    *(
        case("ScatterElements", X, ints([[0, -1], [1, 3]]), normal(1, 2, 2, seed=2), axis=2, reduction=reduction)
        for reduction in ("none", "add", "mul", "max", "min")
    ),
    case("ScatterElements", X, ints([[1, 0, 0, 1]]), normal(1, 1, 4, seed=2), opset=11),
    case("Tile", X, ints(1, 2, 3)),
    case("Expand", Y, ints(2, 1, 4)),
    case("Expand", X, ints(1, 1)),
    case("Expand", Y, ints(0, 1, 1)),
    *(
        case("Pad", X, ints(0, 1, 2, 0, 2, 1), *values, mode=mode)
        for mode in ("constant", "reflect", "edge")
        for values in ((), (scalar(0.5, np.float32),))
    ),
    case("Pad", X, ints(0, -1, 2, -1, 0, -2)),
    case("Pad", X, ints(0, -1, 2, 0, 0, -2), mode="edge"),
    case("Pad", X, ints(1, 2), scalar(7, X.dtype), ints(-1)),
    case("Pad", whole(3, 4), ints(1, 1, 0, 2), scalar(-7)),
    case("Pad", bools(3, 4), ints(1, 1, 0, 2), opset=13),
    case("Pad", X, ints(4, 1, 2, 3), None, ints(1, 2), mode="wrap", opset=19),
    *(case("DepthToSpace", normal(2, 8, 3, 4), blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    case("SpaceToDepth", normal(2, 3, 4, 6), blocksize=2),
    case("OneHot", ints(0, 2, -1, 9), scalar(4), floats(-1, 5)),
    case("OneHot", whole(2, 3, low=0, high=4), ints(4), floats(0, 1), axis=1),
    case("OneHot", whole(2, 3, low=0, high=4), ints(4), ints(0, 1), axis=-2),
    *(case("Trilu", X, **{"upper": upper}) for upper in (0, 1)),
    case("Trilu", X, scalar(-1), upper=0),
    case("Trilu", bools(4, 4), scalar(1)),
    case("NonZero", whole(3, 4, low=0, high=2)),
    case("Shape", X),
    case("Shape", X, start=1, end=-1),
    case("Shape", X, start=-2),
    case("ConstantOfShape", ints(2, 3)),
    case("ConstantOfShape", ints()),
    case("ConstantOfShape", ints(2, 0), value=numpy_helper.from_array(ints(7))),
    case("Range", scalar(0), scalar(7), scalar(2)),
    case("Range", scalar(7), scalar(-2), scalar(-2)),
    case("Range", scalar(3), scalar(1), scalar(1)),
    case("Range", scalar(0.5, np.float32), scalar(3, np.float32), scalar(0.4, np.float32)),
    *(
        case("Cast", values, to=to)
        for values in (X * 3, whole(9))
        for to in (TensorProto.INT32, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.FLOAT16)
    ),
    case("Cast", bools(5), to=TensorProto.FLOAT),
    case("Cast", POSITIVE * 9, to=TensorProto.UINT8),
    case("CastLike", X, ints(1), opset=19),
    case("Constant", value_float=0.5),
    case("Constant", value_ints=[1, 2]),
    case("Constant", value=numpy_helper.from_array(X)),
]

ALL = POINTWISE + LAYER + REDUCED + SHAPED


@pytest.mark.parametrize(("op", "inputs", "options"), ALL)
def test_operators_compute_what_the_runtime_computes(op: str, inputs: list[Array], options: dict[str, Any]) -> None:
    proto, feeds = single(op, inputs, **options), fed(inputs)
    expected, got = run(proto, feeds), in_torch(proto, feeds)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        assert (got[name].dtype, got[name].shape) == (values.dtype, values.shape)
        np.testing.assert_allclose(got[name], values, rtol=2e-5, atol=2e-6)


def test_every_operator_is_tested() -> None:
    assert {each.values[0] for each in ALL} == OPERATORS.keys()


def test_space_to_depth_is_the_way_back() -> None:
    """Which the runtime has for one of the two orders only."""
    back = in_torch(single("DepthToSpace", [normal(2, 8, 3, 4)], blocksize=2, mode="CRD"), {"a": normal(2, 8, 3, 4)})
    there = in_torch(single("SpaceToDepth", [back["y0"]], blocksize=2, mode="CRD"), {"a": back["y0"]})
    np.testing.assert_array_equal(there["y0"], normal(2, 8, 3, 4))


def differentiable(op: str, inputs: Sequence[Array], outputs: int = 1, **_: Any) -> bool:
    """Whether a difference quotient is to be had: not at jumps, of the power of negative numbers, or in float32."""
    jumps = op in ("Round", "Cast", "CastLike") or (op == "LpNormalization" and not np.any(inputs[0]))
    narrow = op == "LayerNormalization" and outputs > 1
    first = inputs[0] if inputs else None
    return first is not None and first.dtype == np.float32 and first.size > 0 and not jumps and not narrow


@pytest.mark.parametrize(
    ("op", "inputs", "options"), [each for each in ALL if differentiable(*each.values[:2], **each.values[2])]
)
def test_gradients_are_those_of_difference_quotients(op: str, inputs: list[Array], options: dict[str, Any]) -> None:
    graph = TorchGraph(ir.from_proto(single(op, inputs, **options)))
    held = {name: torch.from_numpy(np.array(values)) for name, values in fed(inputs).items()}
    # The exponent's gradient is none where the base is negative.
    numbers = (*HOST_INPUTS.get(op, ()), *([1] if op == "Pow" else []))
    names = [
        name for i, name in enumerate("abcdefg") if name in held and held[name].is_floating_point() and i not in numbers
    ]
    held |= {name: held[name].double().requires_grad_() for name in names}

    def outputs(*changed: Tensor) -> tuple[Tensor, ...]:
        found = graph.run({**held, **dict(zip(names, changed, strict=True))}).values()
        return tuple(each for each in found if each.requires_grad)

    given = [held[name] for name in names]
    smooth = op not in ("Shape", "Size", "IsNaN", "IsInf", "ArgMax", "ArgMin", "Less", "LessOrEqual", "Greater")
    assert bool(outputs(*given)) == smooth
    if smooth:
        assert torch.autograd.gradcheck(outputs, given, fast_mode=True)


@pytest.mark.parametrize(
    ("op", "inputs", "options"),
    [
        case("Resize", IMAGE, None, floats(1, 1, 2, 2), mode="cubic"),
        case("Resize", IMAGE, None, floats(1, 1, 0.5, 0.5), mode="linear", antialias=1),
        case("Resize", IMAGE, floats(0, 0, 0, 0, 1, 1, 1, 1), floats(1, 1, 2, 2),
            coordinate_transformation_mode="tf_crop_and_resize"),
        case("Resize", IMAGE),
        case("AveragePool", IMAGE, kernel_shape=[2, 2], dilations=[2, 2], opset=19),
        case("MaxPool", IMAGE, kernel_shape=[2, 2], outputs=2),
        case("MaxPool", normal(1, 1, 3, 3, 3, 3), kernel_shape=[2, 2, 2, 2]),
        case("BatchNormalization", IMAGE, *[normal(4)] * 4, training_mode=1),
        case("Dropout", X, scalar(0.5, np.float32), scalar(True, bool)),
        case("Attention", *[normal(2, 3, 4, 8)] * 3, opset=26, right_window_size=0),
        case("Cast", X, to=TensorProto.STRING),
        case("Constant", value_string="text"),
        case("Pad", X, ints(0, 0, 0, 0, 0, 1), mode="other"),
        case("Add", whole(3, low=0, dtype=np.uint16), whole(3, low=0, dtype=np.uint16)),
    ],
)  # fmt: skip
def test_what_torch_does_not_compute_is_refused(op: str, inputs: list[Array], options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"no torch form of {op} with .* \(node y0\)"):
        in_torch(single(op, inputs, **options), fed(inputs))


@pytest.mark.parametrize(("op", "domain"), [("Foo", ""), ("Relu", "com.microsoft"), ("Loop", "")])
def test_an_unknown_operator_is_named(op: str, domain: str) -> None:
    nodes = [node("Relu", ["x"], ["h"]), node(op, ["h"], ["y"], name="culprit", domain=domain)]
    graph = opened(model(nodes, {"x": [2]}, {"y": None}, domains={"com.microsoft": 1})).ir
    with pytest.raises(InputError, match=rf"no torch form of {f'{domain}.{op}'.lstrip('.')} \(node culprit\)"):
        TorchGraph(graph)
    replaceable = TorchGraph(graph, replaceable=["y"])
    feeds = {"x": torch.tensor([-1.0, 2.0])}
    assert replaceable.run(feeds, replaced={"y": lambda inputs: [inputs[0] * 3]})["y"].tolist() == [0, 6]
    with pytest.raises(InputError, match="culprit"):
        replaceable.run(feeds)


def test_a_missing_input_is_named() -> None:
    graph = opened(model([node("Add", ["x", "z"], ["y"])], {"x": [2], "z": [2]}, {"y": None})).ir
    with pytest.raises(InputError, match="input z is missing"):
        TorchGraph(graph).run({"x": torch.zeros(2)})


def test_values_and_replacements_stand_in() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Clip", ["h", "", "top"], ["c"]),
        node("Split", ["c"], ["s", "t"], axis=1),
        node("Add", ["s", "t"], ["y"]),
    ]
    constants = {"w": normal(4, 6), "top": scalar(0.5, np.float32)}
    graph = TorchGraph(opened(model(nodes, {"x": [3, 4]}, {"y": None, "w": None}, constants, opset=13)).ir)
    x, w = torch.from_numpy(normal(3, 4, seed=1)), torch.from_numpy(normal(4, 6, seed=2)).requires_grad_()
    outputs = graph.run({"x": x}, values={"w": w})
    assert outputs["w"] is w
    expected = (x @ w).clamp(max=0.5)
    torch.testing.assert_close(outputs["y"], expected[:, :3] + expected[:, 3:])
    outputs["y"].sum().backward()
    assert w.grad is not None and bool(w.grad.any())
    seen = []

    def clip(inputs: Sequence[Tensor | None]) -> list[Tensor]:
        data, low, high = inputs
        assert (low, len(inputs), inputs[:2]) == (None, 3, [data, None]) and data is not None and high is not None
        seen.append(high.item())
        return [data * 2]

    def split(inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        (data,) = inputs
        assert data is not None
        return data[:, :3], data[:, 3:] * 0

    doubled = graph.run({"x": x}, replaced={"c": clip, "s": split})["y"]
    torch.testing.assert_close(doubled, (x @ torch.from_numpy(constants["w"]) * 2)[:, :3])
    assert seen == [0.5]


def test_a_first_run_without_gradients_does_not_spoil_the_next() -> None:
    nodes, constants = [node("Mul", ["x", "w"], ["y"])], {"w": normal(3)}
    graph = TorchGraph(opened(model(nodes, {"x": [3]}, {"y": None}, constants)).ir)
    x = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        graph.run({"x": x})
    graph.run({"x": x})["y"].sum().backward()
    assert x.grad is not None and x.grad.tolist() == constants["w"].tolist()


def test_constants_lie_where_they_are_needed() -> None:
    """Numbers with a fraction where the graph runs, sizes where the processor reads them."""
    nodes = [node("Resize", ["x", "", "scales"], ["h"]), node("Mul", ["h", "w"], ["y"])]
    constants = {"scales": floats(1, 1, 2, 2), "w": normal(1)}
    graph = TorchGraph(opened(model(nodes, {"x": [1, 1, 2, 2]}, {"y": None}, constants)).ir, torch.device("meta"))
    seen = []

    def note(inputs: Sequence[Tensor | None]) -> list[Tensor]:
        tensors = [each for each in inputs if each is not None]
        seen.append([each.device.type for each in tensors])
        return tensors[:1]

    graph.run({"x": torch.zeros(1, 1, 2, 2)}, replaced={"h": note, "y": note})
    assert seen == [["meta", "cpu"], ["meta", "meta"]]


@pytest.mark.parametrize(("dtype", "spread"), [(ir.DataType.INT4, torch.int8), (ir.DataType.UINT4, torch.uint8)])
def test_constants_are_converted_once_and_only_if_somebody_asks(
    dtype: ir.DataType, spread: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["y"]),
    ]
    constants = {"q": np.zeros((3, 2), np.int8), "s": scalar(0.5, np.float32), "b": normal(2)}
    graph = opened(model(nodes, {"x": [1, 3]}, {"y": None}, constants)).ir
    codes = graph.graph.initializers["q"]
    codes.const_value = ir.tensor(
        np.arange(6, dtype=np.uint8).reshape(3, 2).astype(dtype.numpy()), dtype=dtype, name="q"
    )
    converted = []
    monkeypatch.setattr(
        "quantcli.onnx.execution.executor.to_torch",
        lambda values: converted.append(values.dtype.name) or to_torch(values),
    )
    runs, weight = TorchGraph(graph, replaceable=["w"]), torch.ones(3, 2)
    for _ in range(2):
        runs.run({"x": torch.ones(1, 3)}, replaced={"w": lambda inputs: [weight]})
        assert converted == ["float32"]
    asked = runs.run({"x": torch.ones(1, 3)}, replaced={"w": lambda inputs: [inputs[0].float() * inputs[1]]})["y"]
    torch.testing.assert_close(asked, torch.tensor([[3.0, 4.5]]) + torch.from_numpy(constants["b"]))
    assert converted == ["float32", dtype.name.lower(), "float32"]
    assert to_torch(codes.const_value.numpy()).dtype == spread


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"])
def test_narrow_constants_keep_their_type(dtype: str) -> None:
    values = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else getattr(ml_dtypes, dtype, dtype))
    tensor = to_torch(values)
    assert tensor.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(tensor.float().numpy(), values.astype(np.float32))


def test_values_are_dropped_after_their_last_reader() -> None:
    """At any time, of ten values in a row and what nobody reads, only the one that is read and the one that is made."""
    nodes = [node("Split", [f"h{i}"], [f"h{i + 1}", f"unread{i}"], axis=0) for i in range(10)]
    nodes.append(node("Add", ["h10", "h3"], ["y"]))
    graph = TorchGraph(opened(model(nodes, {"h0": [1024]}, {"y": None}, opset=13)).ir)
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def halve(inputs: Sequence[Tensor | None]) -> list[Tensor]:
        alive.append({i for i, each in enumerate(made) if each() is not None})
        (data,) = inputs
        assert data is not None
        outputs = [data * 2, data * 3]
        made.extend(map(weakref.ref, outputs))
        return outputs

    replaced = {f"h{i + 1}": halve for i in range(10)}
    with torch.no_grad():
        assert graph.run({"h0": torch.ones(4)}, replaced=replaced)["y"].tolist() == [1032] * 4
    # h3, the fifth tensor, is read once more at the end.
    assert alive == [set(), *({2 * i} | ({4} if i > 2 else set()) for i in range(9))]


NETS = """
import torch
from torch import nn

class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.first(image))), 3, 2, 1)
        return self.head(nn.functional.hardswish(self.other(self.second(x)) + x[:, :, 1:-1, 1:-1]).mean((2, 3)))

def varied(build):
    torch.manual_seed(0)
    net = build()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net

def cnn():
    net = varied(Cnn)
    net(3 * torch.randn(16, 3, 20, 20))
    return net.eval()
cnn.example_inputs = (torch.zeros(2, 3, 20, 20),)

def encoder():
    return varied(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval())
encoder.example_inputs = (torch.zeros(2, 6, 32),)
"""


def folded(net: torch.nn.Module) -> list[Tensor]:
    """Parameters, and weights and biases of convolutions with the batch norm behind them in them."""
    found = [*net.parameters()]
    for layer, follower in (("first", "norm"), ("second", "other")):
        if hasattr(net, layer):
            conv, norm = getattr(net, layer), getattr(net, follower)
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            bias = 0 if conv.bias is None else conv.bias
            found += [conv.weight * factor[:, None, None, None], (bias - norm.running_mean) * factor + norm.bias]
    return found


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_gradients_reach_the_weights_as_in_the_module(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{code}.py").write_text(NETS)
    graph = prepare(open_onnx(export_to_onnx(f"{code}:{name}", tmp_path).path))
    net = getattr(import_module(code), name)()
    forms = folded(net)
    values = {}
    for key, value in graph.graph.initializers.items():
        held = to_torch(value.const_value.numpy())
        for form in (*forms, *(each.T for each in forms if each.ndim == 2)):
            if held.shape == form.shape and torch.allclose(held, form, rtol=1e-5, atol=1e-7):
                values[key] = form
    x = torch.randn(3, *next(iter(getattr(import_module(code), name).example_inputs)).shape[1:])
    (got,) = TorchGraph(graph).run({graph.graph.inputs[0].name: x}, values=values).values()
    expected = net(x)
    torch.testing.assert_close(got, expected)
    factors = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * factors).sum(), list(net.parameters())) for y in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


OCR = find_spec("rapidocr_onnxruntime")


@pytest.mark.skipif(OCR is None, reason="rapidocr-onnxruntime is not installed")
@pytest.mark.parametrize(
    ("kind", "shape"), [("detector", (1, 3, 96, 128)), ("recognizer", (2, 3, 48, 160)), ("classifier", (3, 3, 48, 192))]
)
def test_real_models_compute_what_the_runtime_computes(kind: str, shape: tuple[int, ...]) -> None:
    graph, feeds = prepare(open_onnx(real_models.ocr_model(kind))), {"x": normal(*shape)}
    last = graph.graph.outputs[0].producer()
    if last is not None and last.op_type == "Sigmoid":
        # Which leaves nothing of a picture without text.
        graph.graph.outputs[0] = last.inputs[0]
    with torch.no_grad():
        (got,) = TorchGraph(graph).run({"x": torch.from_numpy(feeds["x"])}).values()
        # Tensors without data: no value is waited for, and none lies on another device.
        (empty,) = TorchGraph(graph, torch.device("meta")).run({"x": torch.empty(shape, device="meta")}).values()
    (expected,) = run(graph, feeds).values()
    assert empty.shape == got.shape == expected.shape
    assert (decibels(float(np.sum(expected**2)), float(np.sum((expected - got.numpy()) ** 2))) or 999) > 60


def test_an_encoder_runs_where_values_cannot_be_read(models: Path, tmp_path: Path) -> None:
    path = export_to_onnx(models / "bert", tmp_path).path
    graph, rng = prepare(open_onnx(path)), np.random.default_rng(0)
    mask = np.ones((2, 9), np.int64)
    mask[1, 5:] = 0
    feeds = {"input_ids": rng.integers(0, 96, (2, 9)), "attention_mask": mask, "token_type_ids": mask * 0}
    feeds = {port.name: feeds[port.name] for port in open_onnx(path).inputs}
    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    with torch.no_grad():
        (got,) = TorchGraph(graph).run(tensors).values()
        (empty,) = TorchGraph(graph, torch.device("meta")).run(tensors).values()
    (expected,) = Session(path, threads=1).run(feeds).values()
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert empty.shape == got.shape
