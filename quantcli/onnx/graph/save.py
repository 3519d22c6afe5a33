"""Writing an ONNX file (one where that is possible, weights in a second one where it is not), and reading it back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import VerificationError
from quantcli.onnx.graph.external import LARGE_BYTES, elsewhere, external_files, take_in
from quantcli.onnx.graph.model import constants, open_onnx, write_types
from quantcli.onnx.graph.opset import needed_ir_version, spell_for_runtime
from quantcli.onnx.graph.wire import write_model

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

#: A protobuf message ends at 2 GB; weights above this go into a file beside it.
SINGLE_FILE_LIMIT_BYTES = 1_500_000_000


def save_graph(model: ir.Model, path: Path, data: str | None = None) -> list[Path]:
    """Write a model, and a file beside it where its weights are too many for one, by default ``NAME.data``.

    Tensors are written one by one; equal models give equal bytes. Operators are spelled as onnxruntime knows them.
    Returns the files.
    """
    import onnx_ir as ir

    _for_runtime(model)
    large = sum(tensor.nbytes for tensor in constants(model)) > SINGLE_FILE_LIMIT_BYTES
    beside = (data or f"{path.name}.data") if large else None
    if not large:
        # What stays as it was may lie in a file of the model's own.
        take_in(model)
    if beside:
        ir.save(model, path, external_data=beside, max_workers=1)
        return [path, path.with_name(beside)]
    proto, weights = _apart(model)
    write_model(proto, weights, path)
    return [path]


def _apart(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A model as protobuf without the bytes of its large weights, and these; it is left as it is."""
    import onnx_ir as ir

    lean, weights = model.clone(), {}
    for name, value in lean.graph.initializers.items():
        tensor = value.const_value
        # Tensors that were read with the model hold a message of their own, and are written as that one is.
        if tensor is None or isinstance(tensor, ir.TensorProtoTensor | ir.StringTensor) or tensor.nbytes < LARGE_BYTES:
            continue
        weights[name] = tensor
        value.const_value = _unfilled(tensor)
    proto = ir.to_proto(lean)
    write_types(lean, proto)
    for each in proto.graph.initializer:
        if each.name in weights:
            each.ClearField("external_data")
            each.ClearField("data_location")
    return proto, weights


def _unfilled(tensor: ir.TensorProtocol, where: str | Path = "elsewhere", offset: int = 0) -> ir.ExternalTensor:
    """A tensor without its values, which lie in a file ``where``."""
    stand_in = elsewhere(tensor, str(where), offset)
    stand_in.doc_string = tensor.doc_string
    stand_in.metadata_props.update(tensor.metadata_props)
    return stand_in


@dataclass(frozen=True)
class Lean:
    """A model as protobuf without its large weights.

    Attributes:
        proto: the model; weights that lie in files are external data there.
        weights: the other large ones, by name: they have to be given beside it.
        folder: what external data is relative to; None where there is none.
    """

    proto: onnx.ModelProto
    weights: dict[str, ir.TensorProtocol]
    folder: Path | None


def lean(model: ir.Model) -> Lean:
    """What `Session` takes a model in: nothing is written, read or copied, and the model is left as it is.

    Weights stay in their files where these have one folder: the runtime copies what it is given otherwise.
    """
    import onnx_ir as ir

    copy = model.clone()
    _for_runtime(copy)
    folder, weights, stay = _folder(copy), {}, []
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= LARGE_BYTES or tensor.dtype.numpy().kind not in "fiub":
            continue
        if folder is not None and isinstance(tensor, ir.ExternalTensor):
            where = Path(tensor.path).relative_to(folder)
            value.const_value = _unfilled(tensor, where, tensor.offset or 0)
            stay.append(value.const_value)
            continue
        weights[name] = tensor
        value.const_value = elsewhere(tensor)
        stay.append(value.const_value)
    take_in(copy, leave=stay)
    return Lean(ir.to_proto(copy), weights, folder)


def _folder(model: ir.Model) -> Path | None:
    """The folder of a model's external data; None where there are several, or none."""
    folders = {file.parent for file in external_files(model)}
    return folders.pop() if len(folders) == 1 else None


def _for_runtime(model: ir.Model) -> None:
    """Say what operators and constants need, in place."""
    spell_for_runtime(model)
    model.ir_version = max(model.ir_version or 0, needed_ir_version(model.opset_imports.get("", 1)))


def add_metadata(path: Path, key: str, value: str) -> None:
    """Give a written model one more entry of metadata; it must have none of this key.

    Entries of a message may follow it in any number, so that nothing is written anew.
    """
    import onnx

    entry = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=key, value=value)])
    with path.open("ab") as stream:
        stream.write(entry.SerializeToString())


def checksums(model: ir.Model) -> dict[str, int]:
    """CRC-32 of every constant's dtype, shape and bytes, by name; tensors are read one by one.

    Constants of different bodies that have one name are summed up together.
    """
    sums: dict[str, int] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is not None:
                head = f"{tensor.dtype.name} {tuple(tensor.shape.numpy())}"
                sums[name] = zlib.crc32(_content(tensor), zlib.crc32(head.encode(), sums.get(name, 0)))
    return sums


def _content(tensor: ir.TensorProtocol) -> bytes:
    """A tensor's bytes; strings with their lengths, since they have no bytes of one size."""
    import onnx_ir as ir

    if not isinstance(tensor, ir.StringTensor):
        return tensor.tobytes()
    return b"".join(len(text).to_bytes(8, "little") + text for text in tensor.string_data())


def read_back(graph: ir.Model, target: Path) -> dict[str, Any]:
    """Reopen what was written, and compare every tensor. Raises VerificationError."""
    meant, stored = checksums(graph), checksums(open_onnx(target, mapped=True).ir)
    if meant != stored:
        wrong = sorted(name for name in meant.keys() | stored.keys() if meant.get(name) != stored.get(name))
        raise VerificationError(
            f"{wrong[0]} was read back otherwise than it was written.",
            "The disk may be failing; if it happens again elsewhere, please report it.",
        )
    return {"tensors": len(stored), "codes": "equal"}
