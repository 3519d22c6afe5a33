"""Any MODEL as one thing that takes arrays by name and returns arrays by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantcli.errors import InputError
from quantcli.functions import is_function, load_function
from quantcli.graph.model import Port, is_onnx, onnx_file

if TYPE_CHECKING:
    from torch import nn

#: A sample's arrays by input name, and a model's by output name.
Arrays = dict[str, np.ndarray]

#: Token inputs that follow from the token ids where data does not bring them.
_DERIVED = ("attention_mask", "token_type_ids", "position_ids")
#: What the forward of a plain module calls token ids where it does not say ``_ids``.
_INTEGERS = ("ids", "idx", "tokens")


class Runner(Protocol):
    """A loaded model."""

    inputs: tuple[Port, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass: all outputs by name. ``feeds`` may hold more than the model takes."""


class OnnxRunner:
    """An ONNX file in onnxruntime.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int | None = None, shared: bool = False) -> None:
        from quantcli.sessions import Session

        self.path = path
        self._session = Session(onnx_file(path), threads=threads, shared=shared)
        self.inputs = self._session.inputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass. Raises InputError where the inputs do not fit."""
        fitting = fit(feeds, self.inputs, str(self.path))
        for port in self.inputs:
            _require_shape(fitting[port.name], port, str(self.path))
        return self._session.run(fitting)


class TorchRunner:
    """A torch module; ``name`` is what errors call it."""

    def __init__(self, module: nn.Module, inputs: tuple[Port, ...], name: str, *, hugging_face: bool = False) -> None:
        self.module, self.inputs, self.name, self.hugging_face = module, inputs, name, hugging_face

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass. Raises InputError where the inputs do not fit."""
        import torch

        from quantcli import models

        fitting = fit(feeds, self.inputs, self.name)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fitting.items()}
        with _running(self.name, fitting):
            if self.hugging_face:
                return _named(models.run(self.module, tensors), self.name)
            args, kwargs = models.arguments(self.module, tensors)
            return _named(self.module(*args, **kwargs), self.name)


class ProgramRunner:
    """A program that torch.export saved as ``.pt2``.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.name = str(path)
        if not path.is_file():
            raise InputError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
        try:
            program = torch.export.load(path)
        except Exception as error:  # zip, JSON and schema errors share no base class
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise InputError(
                f"{path} cannot be loaded by torch {torch.__version__}: {reason}",
                "A .pt2 is written by torch.export.save; it may be damaged, or of a newer torch.",
            ) from error
        wanted = program.graph_signature.user_inputs
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        if any(not isinstance(name, str) or name not in nodes for name in wanted):
            raise InputError(f"{path} takes inputs that are not tensors.", "Export it with tensor inputs only.")
        self.inputs = tuple(_program_port(nodes[str(name)]) for name in wanted)
        self._structure = program.call_spec.in_spec
        self.module = program.module()

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass. Raises InputError where the inputs do not fit."""
        import torch
        from torch.utils import _pytree as pytree

        fitting = fit(feeds, self.inputs, self.name)
        flat = [torch.from_numpy(np.ascontiguousarray(fitting[port.name])) for port in self.inputs]
        arguments, keywords = pytree.tree_unflatten(flat, self._structure)
        with _running(self.name, fitting):
            return _named(self.module(*arguments, **keywords), self.name)


def open_runner(
    model: str | Path,
    *,
    threads: int | None = None,
    causal: bool | None = None,
    weights: Path | None = None,
    headed: bool = False,
    decoded: bool = False,
    shared: bool = False,
) -> Runner:
    """Load a model to be run on the CPU.

    Args:
        model: an ONNX file or a folder with model.onnx, a Hugging Face folder, a ``.pt2``, or
            ``package.module:function``, a function that returns a torch module.
        threads: threads within an operator; torch's number is one for the whole process.
        causal: load a Hugging Face folder with (or without) its language-modeling head; by default as its
            config.json says.
        weights: state dict for the function's module.
        headed: load a Hugging Face folder as the class that its config.json names, such as a classifier.
        decoded: turn a Hugging Face folder's codes, if it is quantized, into plain weights.
        shared: leave the cores to other models between runs.

    Raises:
        InputError: the model is missing, damaged, or of a kind that cannot be run.
        MissingExtraError: what runs it is not installed.
    """
    if not is_function(str(model)):
        path = Path(model)
        if is_onnx(path):
            return OnnxRunner(path, threads=threads, shared=shared)
        _set_torch_threads(threads)
        if path.suffix == ".pt2":
            return ProgramRunner(path)
        return _hugging_face(path, causal, headed, decoded)
    _set_torch_threads(threads)
    module = load_module(str(model), weights)
    return TorchRunner(module, signature_ports(module, str(model)), str(model))


def load_module(spec: str, weights: Path | None = None) -> nn.Module:
    """The torch module that ``package.module:function`` returns, in evaluation mode.

    ``weights`` is a state dict (safetensors or torch), read without running any pickle; it must fit exactly.

    Raises:
        InputError: the function fails or returns something else, or the weights do not fit.
    """
    from torch import nn

    from quantcli.checkpoints.folder import open_checkpoint

    function = load_function(spec)
    try:
        module = function()
    except Exception as error:  # the user's code
        raise InputError(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{spec} returned {type(module).__name__}, not a torch module.")
    if weights is not None:
        checkpoint = open_checkpoint(weights)
        try:
            module.load_state_dict({info.name: checkpoint.load(info.name) for info in checkpoint.infos()})
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            raise InputError(f"{weights} does not fit {type(module).__name__} of {spec}: {' '.join(lines)}") from error
    return module.eval()


def fit(feeds: Mapping[str, np.ndarray], inputs: Sequence[Port], name: str) -> Arrays:
    """The arrays that a model takes, in its dtypes.

    A float becomes another float and an integer another integer that holds it; what follows from token ids
    (``attention_mask``, ``token_type_ids``, ``position_ids``) is filled in. Where names differ, inputs go by
    position if there are as many.

    Raises:
        InputError: an input is missing, or of another kind than the model's.
    """
    found = dict(feeds)
    missing = [port for port in inputs if port.name not in found]
    if missing and "input_ids" in found:
        found = derived_inputs(found["input_ids"]) | found
        missing = [port for port in inputs if port.name not in found]
    if missing and len(feeds) == len(inputs):
        found = {port.name: value for port, value in zip(inputs, feeds.values(), strict=True)}
    elif missing:
        wanted = "; ".join(str(port) for port in inputs)
        raise InputError(f"{name} needs inputs that the data lacks. Expected {wanted}; got {', '.join(feeds)}.")
    return {port.name: _cast(found[port.name], port, name) for port in inputs}


def _require_shape(value: np.ndarray, port: Port, name: str) -> None:
    """Raise InputError where a dimension other than the batch is not the one that a model takes."""
    wanted = (port.shape or ())[1:]
    fits = len(value.shape) == len(wanted) + 1 and all(
        dim == size for dim, size in zip(wanted, value.shape[1:], strict=True) if isinstance(dim, int)
    )
    if port.shape and not fits:
        shape = " x ".join(map(str, value.shape)) or "a single value"
        raise InputError(f"{name} takes other inputs than these. Expected {port}; got {shape}.")


def derived_inputs(ids: np.ndarray) -> Arrays:
    """Attention mask, token types and positions of unpadded token ids ``[batch, length]``."""
    positions = np.broadcast_to(np.arange(ids.shape[-1], dtype=ids.dtype), ids.shape)
    return dict(zip(_DERIVED, (np.ones_like(ids), np.zeros_like(ids), positions), strict=True))


def paired(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], name: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Floating-point outputs of two models side by side, float32, by the reference's names.

    Outputs go by name where names agree, else by position where there are as many of both.

    Raises:
        InputError: nothing corresponds, or shapes differ.
    """
    ours, theirs = floats(reference), floats(candidate)
    if not ours:
        raise InputError("The reference returns no floating-point output to compare.")
    common = [key for key in ours if key in theirs]
    if common:
        pairs = {key: (ours[key], theirs[key]) for key in common}
    elif len(ours) == len(theirs):
        pairs = {key: (value, other) for (key, value), other in zip(ours.items(), theirs.values(), strict=True)}
    else:
        raise InputError(
            f"{name} returns {', '.join(theirs) or 'no floating-point output'}, which do not correspond to the "
            f"reference's {', '.join(ours)}.",
            "Models are compared by the names of their outputs, or by position where there are as many.",
        )
    for key, (value, other) in pairs.items():
        if value.shape != other.shape:
            raise InputError(
                f"{name} returns {key} of shape {list(other.shape)}, the reference one of {list(value.shape)}."
            )
    return pairs


def floats(outputs: Mapping[str, np.ndarray]) -> Arrays:
    """The floating-point outputs, in float32 (bfloat16 included)."""
    return {
        name: np.asarray(value, dtype=np.float32) for name, value in outputs.items() if _kind(value.dtype) == "float"
    }


def _cast(value: np.ndarray, port: Port, name: str) -> np.ndarray:
    """An array in a port's dtype, where that keeps its meaning."""
    if value.dtype == port.dtype:
        return value
    kinds = _kind(value.dtype), _kind(port.dtype)
    if kinds[0] != kinds[1] or kinds[0] == "other":
        raise InputError(f"{name} expects {port}; the data has {value.dtype}.")
    if kinds[0] == "integer" and value.size:
        limits = np.iinfo(port.dtype)
        if value.min() < limits.min or value.max() > limits.max:
            raise InputError(f"{name} expects {port}; the data's {value.min()} to {value.max()} do not fit.")
    return value.astype(port.dtype)


def _kind(dtype: np.dtype[Any]) -> str:
    if np.issubdtype(dtype, np.integer):
        return "integer"
    # bfloat16 is a type of ml_dtypes, which numpy does not count among its own.
    return "float" if np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16" else "other"


def hugging_face_ports(path: Path, *, vision: bool = False) -> tuple[Port, ...]:
    """What a Hugging Face folder takes: pixels, or token ids with a mask and, where it has such, token types."""
    from quantcli.checkpoints.folder import load_json

    if vision:
        return (Port("pixel_values", np.dtype(np.float32), ("batch", "channels", "height", "width")),)
    names = ["input_ids", "attention_mask"]
    # Some models without token types take that input all the same and read words in it (GPT-2).
    if load_json(path / "config.json").get("type_vocab_size"):
        names.append("token_type_ids")
    return tuple(Port(each, np.dtype(np.int64), ("batch", "sequence"), each in _DERIVED) for each in names)


def _hugging_face(path: Path, causal: bool | None, headed: bool, decoded: bool) -> TorchRunner:
    from quantcli import models

    causal = models.is_causal(path) if causal is None else causal
    module = models.load_model(path, causal=causal, headed=headed, decoded=decoded)
    taken = inspect.signature(module.forward).parameters
    ports = hugging_face_ports(path, vision="pixel_values" in taken)
    fitting = tuple(port for port in ports if port.name in taken)
    return TorchRunner(module, fitting, str(path), hugging_face=True)


def signature_ports(module: nn.Module, name: str) -> tuple[Port, ...]:
    """Inputs of a module, as the signature of its forward tells: names, and a dtype guessed from them."""
    needed = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            needed.append(parameter.name)
    if not needed:
        raise InputError(f"{name}: the module's forward names no input.", "Give it named parameters.")
    integers = [each for each in needed if each.endswith(("_ids", "_mask")) or each in _INTEGERS]
    return tuple(Port(each, np.dtype(np.int64 if each in integers else np.float32), None) for each in needed)


def _program_port(node: Any) -> Port:
    value = node.meta["val"]
    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return Port(node.name, dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape))


@contextmanager
def _running(name: str, feeds: Arrays) -> Iterator[None]:
    """Inference without gradients; what a module's code raises says what it was run on."""
    import torch

    try:
        with torch.inference_mode():
            yield
    except InputError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(f"{name} cannot be run on {shapes}: {reason}") from error


def _named(found: Any, name: str) -> Arrays:
    """Tensors among what a module returned: by key, or as output_0, output_1 and so on."""
    import torch

    if isinstance(found, torch.Tensor):
        found = [found]
    if isinstance(found, (list, tuple)):
        found = {f"output_{index}": value for index, value in enumerate(found)}
    values = found.items() if isinstance(found, Mapping) else ()
    named = {str(key): _array(value) for key, value in values if isinstance(value, torch.Tensor)}
    if not named:
        raise InputError(f"{name} returns no tensor.")
    return named


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _set_torch_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
