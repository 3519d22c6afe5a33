"""Running ONNX models: the only importer of onnxruntime."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.models import custom_operators
from quantcli.models.narrow import is_narrow, packed, unpacked
from quantcli.onnx.graph.external import LARGE_BYTES
from quantcli.system.files import require_utf8
from quantcli.system.parallel import usable_cores
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import numpy as np

    from quantcli.onnx.graph.save import Lean

#: onnxruntime's log level that lets nothing through: what fails is raised as well, and reported by us.
_SILENT = 4

#: onnxruntime's names of dtypes that ml_dtypes calls otherwise.
_NARROW = {
    "float8e4m3fn": "float8_e4m3fn", "float8e4m3fnuz": "float8_e4m3fnuz", "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz", "float8e8m0": "float8_e8m0fnu", "float4e2m1": "float4_e2m1fn",
}  # fmt: skip


#: What to do about operators that onnxruntime does not know, or not with these types, by a part of its message.
_HINTS = {
    "is not a registered": "If it is a custom operator, name the library that has it: --custom-ops FILE.so.",
    "NOT_IMPLEMENTED": "It has no such kernel on the CPU for these types. Export the model in float32 or float16.",
}


def onnxruntime() -> Any:
    """The module, set to be silent."""
    import onnxruntime as ort

    ort.set_default_logger_severity(_SILENT)
    return ort


def require_loadable(library: Path) -> None:
    """Raise InputError where onnxruntime cannot load a library of custom operators."""
    try:
        onnxruntime().SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(
            f"{library} cannot be loaded as a library of custom operators: {first_line(error)}.",
            "It must be built for this system, and have a function RegisterCustomOps.",
        ) from error


class Session:
    """A model loaded into onnxruntime on the CPU.

    Args:
        model: a file, or a serialized model (below 2 GB, without external data).
        threads: threads within an operator; by default the usable cores.
        optimize: False runs the graph as it is written, so that every value of it can be asked for.
        shared: threads rest as soon as a run ends; otherwise they spin for a while, waiting for the next one, and
            take cores from whatever else is measured.
        dump: file that the runtime's own optimized graph is written to; large weights go into one beside it.
        name: what errors call the model, where its file is not the user's own.
        weights: constants that the model says to be elsewhere, by name.
        folder: where a serialized model has its external data, which is read where it is.
        prepack: False leaves weights as they are; laid out anew for its kernels they are a second copy of all of them.

    Raises:
        InputError: onnxruntime cannot load the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        optimize: bool = True,
        shared: bool = False,
        dump: Path | None = None,
        name: str | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
        folder: Path | None = None,
        prepack: bool = True,
    ) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = _SILENT
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        if shared:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if dump is not None:
            options.optimized_model_filepath = str(dump)
            # In one file with its weights the graph would be held twice more, and could be no larger than 2 GB.
            beside = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{beside}_file_name", f"{dump.name}.data")
            options.add_session_config_entry(f"{beside}_min_size_in_bytes", str(LARGE_BYTES))
        for library in custom_operators.registered():
            options.register_custom_ops_library(str(library))
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if weights:
            # The runtime does not keep them alive.
            self._weights = [ort.OrtValue.ortvalue_from_numpy(values) for values in weights.values()]
            options.add_external_initializers(list(weights), self._weights)
        if isinstance(model, Path):
            require_utf8(model)
        name = name or (str(model) if isinstance(model, Path) else "The model")
        try:
            self._session = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError(
                f"{name} cannot be loaded by onnxruntime {ort.__version__}: {_reason(error, model, name)}.",
                next((hint for part, hint in _HINTS.items() if part in str(error)), None),
            ) from error
        self.name = name
        self.inputs = tuple(_port(each) for each in self._session.get_inputs())
        self.outputs = tuple(_port(each) for each in self._session.get_outputs())
        self._narrow = any(is_narrow(port.dtype) for port in (*self.inputs, *self.outputs))

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """One forward pass: outputs by name, all of them unless some are named.

        Raises:
            InputError: the runtime refuses the inputs.
        """
        names = list(outputs) if outputs is not None else [each.name for each in self.outputs]
        try:
            values = self._run_narrow(names, feeds) if self._narrow else self._session.run(names, dict(feeds))
        except Exception as error:
            raise InputError(f"onnxruntime could not run the model: {first_line(error)}.") from error
        return dict(zip(names, values, strict=True))

    def runs(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> Iterator[tuple[dict[str, np.ndarray], float | None]]:
        """Forward passes, one at a time: outputs, and the seconds that they took; None where loading is among them.

        Raises:
            InputError: the runtime refuses the inputs.
        """
        for each in feeds:
            started = time.perf_counter()
            outputs = self.run(each)
            yield outputs, time.perf_counter() - started

    def _run_narrow(self, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """One forward pass of a model with inputs or outputs of types that numpy lacks."""
        import ctypes

        import numpy as np

        values = onnxruntime().OrtValue
        types = {port.name: port.dtype for port in self.outputs}
        given = {name: np.asarray(array) for name, array in feeds.items()}
        # The runtime does not copy what it is given.
        laid_out = {name: packed(array) if is_narrow(array.dtype) else array for name, array in given.items()}
        fed = {
            name: values.ortvalue_from_numpy_with_onnx_type(laid_out[name], _element_type(array.dtype))
            if is_narrow(array.dtype)
            else values.ortvalue_from_numpy(array)
            for name, array in given.items()
        }
        found = []
        for name, value in zip(names, self._session.run_with_ort_values(names, fed), strict=True):
            dtype = types.get(name)
            if not value.is_tensor() or dtype is None or not is_narrow(dtype):
                found.append(value.numpy())
                continue
            content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
            found.append(unpacked(content, dtype, value.shape()))
        return found

    def bind(self, state: Mapping[str, np.ndarray], outputs: Mapping[str, str]) -> Binding:
        """Runs that keep a state where it lies: inputs ``state``, each written over by the output that it names."""
        return Binding(self._session, state, outputs)


class Binding:
    """Runs of a session whose state stays in one place. Use `Session.bind`."""

    def __init__(self, session: Any, state: Mapping[str, np.ndarray], outputs: Mapping[str, str]) -> None:
        self._session, self._binding = session, session.io_binding()
        self._arrays = dict(state)  # the runtime does not keep them alive
        for name, values in self._arrays.items():
            place = onnxruntime().OrtValue.ortvalue_from_numpy(values)
            self._binding.bind_ortvalue_input(name, place)
            self._binding.bind_ortvalue_output(outputs[name], place)

    def run(self, feeds: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """One forward pass; the one output that is no state. Raises InputError where the runtime refuses the inputs."""
        self._feeds = dict(feeds)
        for name, values in self._feeds.items():
            self._binding.bind_cpu_input(name, values)
        self._binding.bind_output(output)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise InputError(f"onnxruntime could not run the model: {first_line(error)}.") from error
        # Outputs come in the order in which they were bound first.
        found: np.ndarray = self._binding.get_outputs()[-1].numpy()
        return found


def session_of(path: Path, **options: Any) -> Session:
    """A session of a user's file.

    The runtime does not find shapes and axes that a model keeps in a file beside it: then of the same graph with its
    small constants inside.

    Args:
        path: the file.
        options: those of `Session`.

    Raises:
        InputError: onnxruntime cannot load the model.
    """
    from quantcli.onnx.graph.model import open_onnx
    from quantcli.onnx.graph.save import lean

    try:
        return Session(path, **options)
    except InputError:
        model = open_onnx(path)
        if len(model.files) == 1:
            raise
        return session_of_lean(lean(model.ir), **{"name": str(path)} | options)


def session_of_lean(model: Lean, **options: Any) -> Session:
    """A session of a graph whose large weights stay where they are; ``options`` are those of `Session`.

    Raises:
        InputError: onnxruntime cannot load the model.
    """
    weights = {name: tensor.numpy() for name, tensor in model.weights.items()}
    return Session(model.proto.SerializeToString(), weights=weights, folder=model.folder, **options)


def _reason(error: Exception, model: Path | bytes, name: str) -> str:
    """What the runtime says, with the user's name of a model in place of its file's."""
    reason = first_line(error)
    return reason.replace(str(model), name) if isinstance(model, Path) else reason


def _element_type(dtype: np.dtype[Any]) -> int:
    """ONNX's number of a type of elements."""
    import onnx_ir as ir

    return int(ir.DataType.from_numpy(dtype))


def _port(node: Any) -> Port:
    import ml_dtypes
    import numpy as np

    tensor = re.search(r"tensor\((\w+)\)", node.type)
    if tensor is None or "map(" in node.type:
        return Port(node.name, np.dtype(object), None, kind=node.type)
    names = {"float": "float32", "double": "float64", "string": "object"}
    kind = tensor[1]
    # numpy itself knows no number format of less than two bytes for floats, or one for integers.
    known = getattr(ml_dtypes, _NARROW.get(kind, kind), None)
    dtype = np.dtype(known if known is not None else names.get(kind, kind))
    if tensor[0] != node.type:
        return Port(node.name, dtype, None, kind=node.type)
    return Port(node.name, dtype, tuple(node.shape) if node.shape is not None else None)
