"""A model whose parameters stay in its checkpoint until a part of it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from quantcli import models
from quantcli.checkpoints.folder import Checkpoint
from quantcli.errors import InputError
from quantcli.scheme import TensorInfo

#: Names that checkpoints made before 2019 give to the parameters of a norm.
_OLD_NAMES = {"weight": "gamma", "bias": "beta"}


class Skeleton:
    """A torch module on the meta device, and where in a checkpoint each of its parameters is.

    Buffers that no checkpoint holds, such as rotary frequencies, are real from the start.
    """

    def __init__(self, module: nn.Module, checkpoint: Checkpoint) -> None:
        """Match parameters with tensors. Raises InputError where a parameter is not in the checkpoint."""
        self.module, self.checkpoint = module, checkpoint
        self._infos = _match(module, {info.name: info for info in checkpoint.infos()})

    def info(self, parameter: str) -> TensorInfo:
        """The tensor of the checkpoint that a parameter is."""
        return self._infos[parameter]

    def parameters(self, path: str = "") -> dict[str, TensorInfo]:
        """Parameters (and stored buffers) of a submodule by their full names."""
        start = f"{path}." if path else ""
        return {name: info for name, info in self._infos.items() if name.startswith(start)}

    def load(self, path: str) -> nn.Module:
        """A submodule with its weights in float32."""
        for name, info in self.parameters(path).items():
            self.set(name, self.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape))
        return self.module.get_submodule(path)

    def load_except(self, paths: tuple[str, ...]) -> None:
        """Everything but some submodules, weights in float32."""
        for name, info in self._infos.items():
            if not name.startswith(tuple(f"{path}." for path in paths)):
                self.set(name, self.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape))

    def set(self, name: str, values: Tensor) -> None:
        """Give a parameter its values, as float32."""
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = values
        else:
            module._parameters[leaf] = nn.Parameter(values.float(), requires_grad=False)

    def drop(self, path: str = "") -> None:
        """Let go of a submodule's weights (of all with the empty path)."""
        for name in self.parameters(path):
            owner, _, leaf = name.rpartition(".")
            module = self.module.get_submodule(owner)
            found = module._parameters.get(leaf)
            if found is not None:
                module._parameters[leaf] = nn.Parameter(found.to("meta"), requires_grad=False)


def open_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """The model of a Hugging Face folder, as the class that its config.json names.

    Raises:
        InputError: there is no config.json, transformers does not know the model, or parameters are missing.
        MissingExtraError: transformers is not installed.
    """
    if checkpoint.folder is None:
        raise InputError(
            f"{checkpoint.path} is a bare file, which cannot be run, and calibration has to run the model.",
            hint="Name the Hugging Face folder around it, or use an algorithm without data, such as mse.",
        )
    with _parameters_on_meta():
        module = models.build_model(models.require_folder(checkpoint.folder))
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()
    return Skeleton(module.eval(), checkpoint)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built meanwhile have no memory for their parameters, and real buffers."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _match(module: nn.Module, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensor of every parameter: under its own name, with or without the base model's prefix, or a tied one's."""
    prefix: Any = getattr(module, "base_model_prefix", "") or ""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    twins: dict[int, list[str]] = {}
    for name, parameter in tensors.items():
        twins.setdefault(id(parameter), []).append(name)
    found: dict[str, TensorInfo] = {}
    missing = []
    for name, parameter in tensors.items():
        names = (spelling for twin in [name, *twins[id(parameter)]] for spelling in _spellings(twin, str(prefix)))
        info = next((infos[each] for each in names if each in infos), None)
        if info is None:
            missing.append(name)
        elif tuple(parameter.shape) != info.shape:
            raise InputError(f"{info.name} has the shape {list(info.shape)}; config.json says {list(parameter.shape)}.")
        else:
            found[name] = info
    needed = [name for name in missing if not any(part in name for part in models.HARMLESS_WHEN_MISSING)]
    if needed:
        raise InputError(
            f"{len(needed)} weights of {type(module).__name__} are not in the checkpoint under their names: "
            f"{', '.join(needed[:3])}. (transformers fuses the experts of a mixture as it loads them.)",
            hint="Use an algorithm without data, such as mse.",
        )
    buffers = dict(module.named_buffers())
    return found | {name: infos[name] for name in buffers if name in infos}


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """What a checkpoint may call a parameter."""
    stems = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    for stem in stems:
        yield stem
        owner, _, leaf = stem.rpartition(".")
        if leaf in _OLD_NAMES:
            yield f"{owner}.{_OLD_NAMES[leaf]}"
