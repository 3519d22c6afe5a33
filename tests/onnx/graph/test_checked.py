"""What onnx-ir takes at a file's word: found by fuzzing, and refused with the name of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from support.graphs import model, node

from quantcli.errors import InputError
from quantcli.onnx.graph.model import constants, open_onnx

HONEST = [
    (TensorProto.FLOAT, "float_data", [1.0, 2.0, 3.0]),
    (TensorProto.DOUBLE, "double_data", [1.0, 2.0, 3.0]),
    (TensorProto.INT64, "int64_data", [1, 2, 3]),
    (TensorProto.UINT32, "uint64_data", [1, 2, 3]),
    (TensorProto.FLOAT16, "int32_data", [1, 2, 3]),
    (TensorProto.BOOL, "int32_data", [1, 0, 1]),
    (TensorProto.INT4, "int32_data", [0x21, 3]),
    (TensorProto.UINT2, "int32_data", [0b111001]),
    (TensorProto.COMPLEX64, "float_data", [1.0, 0.0, 2.0, 0.0, 3.0, 0.0]),
]
#: Lists of numbers of another type, and such as are too short or too long.
FORGED = [
    (TensorProto.FLOAT, "int32_data", [1, 2, 3], "is FLOAT, and keeps its values in int32_data"),
    (TensorProto.FLOAT, "int64_data", [1, 2, 3], "is FLOAT, and keeps its values in int64_data"),
    (TensorProto.INT8, "float_data", [1.0, 2.0, 3.0], "is INT8, and keeps its values in float_data"),
    (TensorProto.FLOAT, "float_data", [1.0, 2.0], "has 2 numbers in place of 3"),
    (TensorProto.INT4, "int32_data", [1, 2, 3], "has 3 numbers in place of 2"),
]


def saved(folder: Path, dtype: int, field: str, numbers: list[float], *, as_node: bool) -> Path:
    """A graph with one constant of three values, among its initializers or in a node."""
    tensor = TensorProto(name="c", data_type=dtype, dims=[3])
    getattr(tensor, field).extend(numbers)
    nodes = [node("Identity", ["x"], ["y"])]
    proto = model(nodes + ([node("Constant", [], ["c"], value=tensor)] if as_node else []), {"x": [3]}, {"y": [3]})
    if not as_node:
        proto.graph.initializer.append(tensor)
    (folder / "forged.onnx").write_bytes(proto.SerializeToString())
    return folder / "forged.onnx"


@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "node"])
@pytest.mark.parametrize(("dtype", "field", "numbers"), HONEST)
def test_lists_of_numbers_that_their_type_has(
    tmp_path: Path, dtype: int, field: str, numbers: list[float], as_node: bool
) -> None:
    opened = open_onnx(saved(tmp_path, dtype, field, numbers, as_node=as_node))
    assert all(tensor.numpy().size == 3 for tensor in constants(opened.ir))


@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "node"])
@pytest.mark.parametrize(("dtype", "field", "numbers", "said"), FORGED)
def test_lists_of_numbers_that_mean_nothing(
    tmp_path: Path, dtype: int, field: str, numbers: list[float], said: str, as_node: bool
) -> None:
    with pytest.raises(InputError, match=rf"forged.onnx is not a readable ONNX model: the constant 'c' {said}"):
        open_onnx(saved(tmp_path, dtype, field, numbers, as_node=as_node))


@pytest.mark.parametrize("location", [b"model\xff.bin", b"model\0.bin"])
def test_a_place_of_weights_that_is_no_name_of_a_file(tmp_path: Path, location: bytes) -> None:
    proto = model([node("Identity", ["x"], ["y"])], {"x": [3]}, {"y": [3]})
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "c")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model_.bin")
    proto.graph.initializer.append(tensor)
    content = proto.SerializeToString()
    (tmp_path / "forged.onnx").write_bytes(content.replace(b"model_.bin", location))
    with pytest.raises(InputError, match=r"forged.onnx keeps c in .*, which is no name of a file"):
        open_onnx(tmp_path / "forged.onnx")


@pytest.mark.parametrize("same", [True, False])
def test_a_constant_that_is_there_twice(tmp_path: Path, same: bool) -> None:
    """onnxruntime takes the first, and says that it took the last."""
    proto = model([node("Add", ["x", "c"], ["y"])], {"x": [3]}, {"y": [3]}, {"c": np.float32([1, 2, 3])})
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2, 3 if same else 4]), "c"))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    if same:
        assert len(list(constants(open_onnx(tmp_path / "m.onnx").ir))) == 1
    else:
        with pytest.raises(InputError, match=r"m\.onnx is not a readable ONNX model: the constant 'c' is there twice"):
            open_onnx(tmp_path / "m.onnx")
