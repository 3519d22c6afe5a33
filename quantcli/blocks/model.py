"""What is run block by block: a model whose weights stay in the checkpoint, and what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from quantcli.blocks.skeleton import Skeleton, open_skeleton, parameters_on_meta
from quantcli.blocks.structure import BlockList
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.ports import Port
from quantcli.errors import InputError
from quantcli.models.inputs import hugging_face_ports, signature_ports
from quantcli.models.runner import load_module
from quantcli.system.text import listed
from quantcli.system.user_functions import load_function


@dataclass(frozen=True)
class SequentialModel:
    """A model and its inputs; ``folder`` is where its tokenizer and preprocessing are looked for."""

    skeleton: Skeleton
    ports: tuple[Port, ...]
    folder: Path | None

    def requires(self, name: str) -> bool:
        """Whether the model is always given an input of this name."""
        return any(port.name == name and not port.optional for port in self.ports)

    def require_own_weights(self, blocks: Sequence[BlockList], quantized: Collection[str]) -> None:
        """Raise InputError where a layer of a block that gets codes shares its weight with another layer.

        ``quantized`` are names of tensors. Codes that suit one place need not suit the other.
        """
        inside = tuple(f"{path}." if path else "" for block_list in blocks for path in block_list.blocks)
        for names in self.skeleton.shared:
            if self.skeleton.info(names[0]).name in quantized and any(name.startswith(inside) for name in names):
                raise InputError(
                    f"{listed(names)} are one weight in {type(self.skeleton.module).__name__}, and the inputs of "
                    "several layers are not looked at together.",
                    hint=f"--skip {names[0]}, or use an algorithm without data, such as mse.",
                )


def hugging_face(checkpoint: Checkpoint) -> SequentialModel:
    """The model of a Hugging Face folder. Raises as `open_skeleton`."""
    skeleton = open_skeleton(checkpoint)
    assert checkpoint.folder is not None
    taken = inspect.signature(skeleton.module.forward).parameters
    ports = tuple(port for port in hugging_face_ports(checkpoint.folder) if port.name in taken)
    return SequentialModel(skeleton, ports, checkpoint.folder)


def plain_module(spec: str, checkpoint: Checkpoint) -> SequentialModel:
    """The module that ``package.module:function`` returns, with the weights of a checkpoint.

    Raises:
        InputError: the function fails or returns something else, or the weights do not fit exactly.
    """
    load_function(spec)  # what it makes when it is imported stays real
    with parameters_on_meta():
        module = load_module(spec)
    _require_fit(module, checkpoint, spec)
    return SequentialModel(Skeleton(module, checkpoint), signature_ports(module, spec), checkpoint.folder)


def _require_fit(module: nn.Module, checkpoint: Checkpoint, spec: str) -> None:
    """Raise InputError, with names, where weights and module do not fit; of tied parameters one may be missing."""
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    stored = {info.name: info for info in checkpoint.infos()}
    present = {id(tensor) for name, tensor in state.items() if name in stored}
    missing = [name for name, tensor in state.items() if id(tensor) not in present]
    unknown = [name for name in stored if name not in state]
    shapes = [
        f"{name} is {list(info.shape)} and {list(state[name].shape)} in the module"
        for name, info in stored.items()
        if name in state and info.shape != tuple(state[name].shape)
    ]
    problems = [f"it lacks {listed(missing)}"] if missing else []
    problems += [f"the module has no {listed(unknown)}"] if unknown else []
    problems += [listed(shapes)] if shapes else []
    if problems:
        raise InputError(
            f"{checkpoint.path} does not fit {type(module).__name__} of {spec}: {'; '.join(problems)}.",
            hint="Save it with the state_dict() of this very module.",
        )
