"""Any MODEL as one thing that takes arrays by name and returns arrays by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantcli.core.ports import Arrays, Port, without_cache
from quantcli.errors import InputError
from quantcli.models.decoder import LOGITS, Decoder, TorchDecoder, cached_decoder, empty_cache, sized_cache
from quantcli.models.inputs import computed_in, decoder_inputs, fit, hugging_face_ports, require_shape, signature_ports
from quantcli.models.outputs import named
from quantcli.models.program_file import load_program
from quantcli.onnx.graph.model import is_onnx, onnx_file
from quantcli.system.text import first_line
from quantcli.system.user_functions import is_function, load_function

if TYPE_CHECKING:
    from torch import nn


#: What a `GeneratingRunner` calls its output.
GENERATED = "tokens"


class Runner(Protocol):
    """A loaded model."""

    inputs: tuple[Port, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass: all outputs by name. ``feeds`` may hold more than the model takes."""


class OnnxRunner:
    """An ONNX file in onnxruntime; a decoder reads whole texts, from an empty cache.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int | None = None, shared: bool = False) -> None:
        from quantcli.models.session import session_of

        self.path = path
        self._session = session_of(onnx_file(path), threads=threads, shared=shared)
        self.inputs = without_cache(self._session.inputs)
        self._cache = sized_cache(self._session.inputs, onnx_file(path))

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass. Raises InputError where the inputs do not fit."""
        fitting = fit(feeds, self.inputs, str(self.path))
        for port in self.inputs:
            require_shape(fitting[port.name], port, str(self.path))
        if not self._cache:
            return self._session.run(fitting)
        batch = len(next(iter(fitting.values())))
        return self._session.run(fitting | empty_cache(self._cache, batch), [LOGITS])

    def decoder(self, room: int) -> Decoder | None:
        """The model, to read a text of so many tokens at the most bit by bit; None where it has no cache."""
        return cached_decoder(self._session, onnx_file(self.path), room) if self._cache else None


class TorchRunner:
    """A torch module; ``name`` is what errors call it."""

    def __init__(self, module: nn.Module, inputs: tuple[Port, ...], name: str, *, hugging_face: bool = False) -> None:
        self.module, self.inputs, self.name, self.hugging_face = module, inputs, name, hugging_face

    def fitting(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays that the module is given, a decoder's ids among them. Raises InputError where they do not fit."""
        from quantcli.models.hugging_face import decoder_start

        start = decoder_start(self.module) if self.hugging_face else None
        found = fit(feeds, self.inputs, self.name)
        return found if start is None else found | decoder_inputs(found, start)

    def decoder(self) -> Decoder | None:
        """The model, to read a text bit by bit; None where it has no cache."""
        caches = "past_key_values" in inspect.signature(self.module.forward).parameters
        return TorchDecoder(self.module) if self.hugging_face and caches else None

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """One forward pass. Raises InputError where the inputs do not fit."""
        import torch

        from quantcli.models import hugging_face

        fitting = self.fitting(feeds)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fitting.items()}
        with _running(self.name, fitting):
            if self.hugging_face:
                return named(hugging_face.run(self.module, tensors), self.name)
            args, kwargs = hugging_face.arguments(self.module, tensors)
            return named(self.module(*args, **kwargs), self.name)


class GeneratingRunner(TorchRunner):
    """An encoder-decoder that is run until it has said all it has to say of its input, the likeliest token each time.

    Its output is ``tokens``, int64 ``[batch, tokens]``. What its decoder read in training is not looked at.
    """

    _ready = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Everything that the model says. Raises InputError where the inputs do not fit."""
        import torch

        from quantcli.models import hugging_face

        if not self._ready:
            # Some libraries unpack weights as a layer first computes, and generating looks at them before.
            super().run(feeds)
            self._ready = True
        asked = {name: value for name, value in feeds.items() if not name.startswith("decoder_")}
        fitting = fit(asked, [port for port in self.inputs if not port.name.startswith("decoder_")], self.name)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fitting.items()}
        with _running(self.name, fitting), hugging_face.quiet():
            tokens = self.module.generate(**tensors, do_sample=False, num_beams=1)  # type: ignore[operator]
        return {GENERATED: np.asarray(tokens)}


class ProgramRunner:
    """A program that torch.export saved as ``.pt2``.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        program = load_program(path)
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
            return named(self.module(*arguments, **keywords), self.name)


def open_runner(
    model: str | Path,
    *,
    threads: int | None = None,
    causal: bool | None = None,
    weights: Path | None = None,
    headed: bool = False,
    decoded: bool = False,
    shared: bool = False,
    generates: bool = False,
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
        generates: of an encoder-decoder, run it token by token: see `GeneratingRunner`.

    Raises:
        InputError: the model is missing, damaged, or of a kind that cannot be run.
        MissingExtraError: what runs it is not installed.
    """
    if not is_function(str(model)):
        path = Path(model)
        if is_onnx(path):
            return OnnxRunner(path, threads=threads, shared=shared)
        from quantcli.models import hugging_face

        set_torch_threads(threads)
        if path.suffix == ".pt2":
            return ProgramRunner(path)
        return _hugging_face(hugging_face.loadable_folder(path), causal, headed, decoded, generates)
    set_torch_threads(threads)
    module = load_module(str(model), weights)
    return TorchRunner(module, signature_ports(module, str(model), computed_in(module)), str(model))


def load_module(spec: str, weights: Path | None = None) -> nn.Module:
    """The torch module that ``package.module:function`` returns, in evaluation mode.

    ``weights`` is a state dict (safetensors or torch), read without running any pickle; it must fit exactly.

    Raises:
        InputError: the function fails or returns something else, or the weights do not fit.
    """
    from torch import nn

    from quantcli.checkpoint.checkpoint import open_checkpoint

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


def _hugging_face(path: Path, causal: bool | None, headed: bool, decoded: bool, generates: bool) -> TorchRunner:
    from quantcli.models import hugging_face

    causal = hugging_face.is_causal(path) if causal is None else causal
    module = hugging_face.load_model(path, causal=causal, headed=headed, decoded=decoded)
    taken = inspect.signature(module.forward).parameters
    ports = hugging_face_ports(path)
    fitting = tuple(port for port in ports if port.name in taken)
    says = generates and hugging_face.decoder_start(module) is not None and hasattr(module, "generate")
    return (GeneratingRunner if says else TorchRunner)(module, fitting, str(path), hugging_face=True)


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
        reason = first_line(error)
        raise InputError(f"{name} cannot be run on {shapes}: {reason}") from error


def set_torch_threads(threads: int | None) -> None:
    """Set the number of threads within an operator, one for the whole process; None leaves it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
