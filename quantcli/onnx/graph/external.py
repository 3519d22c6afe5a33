"""Weights in files beside an ONNX file: found and checked when it is opened, and taken in when it is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir


#: Constants up to this size may be shapes or axes, whose values tell the shapes of others.
SMALL_BYTES = 4096

#: Weights from this size on stay in their files when a model is run, written or read back.
LARGE_BYTES = 1 << 20


def external_files(model: ir.Model) -> list[Path]:
    """The files that hold tensors of a model, each once."""
    import onnx_ir as ir

    return sorted({Path(tensor.path) for tensor, _ in _tensors(model) if isinstance(tensor, ir.ExternalTensor)})


def find_external(model: ir.Model, path: Path) -> None:
    """Let every external tensor of a model that was read from ``path`` name its file in full.

    Raises:
        InputError: a file is missing, too short, or outside the model's folder. Links are followed: a cache of
            downloads links to the model and to its data, which lie in one other folder.
    """
    import onnx_ir as ir

    from quantcli.onnx.graph.mapped import MappedTensor

    folders = {path.parent.resolve(), path.resolve().parent}
    for tensor, put in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        name = tensor.name or "a constant"
        # What is no UTF-8 comes as bytes, and no file's name holds a zero.
        if not isinstance(tensor.location, str) or "\0" in tensor.location:
            raise InputError(f"{path} keeps {name} in {tensor.location!r}, which is no name of a file.")
        file = path.parent / tensor.location
        real = file.resolve()
        climbs = Path(tensor.location).is_absolute() or ".." in Path(tensor.location).parts
        if climbs or not any(real.is_relative_to(folder) for folder in folders):
            raise InputError(f"{path} keeps {name} in {tensor.location}, outside its own folder.")
        if not real.is_file():
            raise InputError(
                f"{path} keeps its weights in {tensor.location}, which is missing.", f"Put it into {path.parent}."
            )
        needed = (tensor.offset or 0) + tensor.nbytes
        if real.stat().st_size < needed:
            raise InputError(f"{file} is truncated: {name} ends at byte {needed}, the file has {real.stat().st_size}.")
        # onnx-ir would refuse links, which were judged here.
        put(
            MappedTensor(
                real, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
                doc_string=tensor.doc_string, metadata_props=tensor.metadata_props,
            )
        )  # fmt: skip


def take_in(model: ir.Model, limit: int | None = None, *, leave: Collection[object] = ()) -> None:
    """Make external tensors, those of at most ``limit`` bytes, a part of the model itself; read when they are used.

    Those in ``leave`` stay external.
    """
    import onnx_ir as ir

    for tensor, put in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor) or any(tensor is each for each in leave):
            continue
        if limit is None or tensor.nbytes <= limit:
            read = partial(_itself, tensor)
            put(ir.LazyTensor(read, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name))


class Scratch:
    """A file that a model's large constants are moved into while it is being made, so that memory holds one at a time.

    Args:
        path: the file, which must outlive the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, model: ir.Model) -> None:
        """Move the constants that are new since the last time."""
        import onnx_ir as ir

        from quantcli.onnx.graph.mapped import MappedTensor

        for value in (value for graph in model.graphs() for value in graph.initializers.values()):
            tensor = value.const_value
            if not isinstance(tensor, ir.Tensor) or tensor.nbytes < LARGE_BYTES:
                continue
            with self.path.open("ab") as stream:
                offset = stream.tell()
                tensor.tofile(stream)
            value.const_value = MappedTensor(
                self.path.resolve(), offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "", doc_string=tensor.doc_string, metadata_props=tensor.metadata_props,
            )  # fmt: skip


def elsewhere(tensor: ir.TensorProtocol, where: str = "elsewhere", offset: int = 0) -> ir.ExternalTensor:
    """Stands for a constant that is kept outside of a model for a while: its dtype and shape, without values."""
    import onnx_ir as ir

    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(where, offset, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")


def _itself(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor


def _tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    """Every tensor of a model, those in bodies, functions and attributes included, with what replaces it."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if value.const_value is not None:
                yield value.const_value, partial(setattr, value, "const_value")
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph_or_function in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph_or_function):
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor(), partial(_set_attribute, node, name)


def _set_attribute(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    import onnx_ir as ir

    node.attributes[name] = ir.AttrTensor(name, tensor)
