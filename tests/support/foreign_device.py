"""A device that is not the CPU on a machine that has no other: what is made on one does not mix with the other.

torch lets a backend be written in Python. Tensors of this one, ``foreign``, hold a tensor in main memory and compute
with it, but as on a GPU each operation wants all of its tensors on one device (scalars may be anywhere), and numpy sees
none of them. It is registered for the whole process, and for good: `main` converts a small model on both.

    PYTHONPATH=.:tests python -m support.foreign_device FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "foreign"
#: Chains of algorithms that look at data, with few steps where they train: scheme and steps.
CHAINS: dict[str, tuple[Any, list[Any]]] = {
    "awq gptq": ("int4", ["awq", "gptq"]),
    "nf4 gptq": ("nf4", ["gptq"]),
    "smoothquant gptq": ("int8-static", ["smoothquant", "gptq"]),
    "smoothquant": ("int8-dynamic", ["smoothquant"]),
    "autoround": ("int4", [{"autoround": {"iterations": 3}}]),
    "gptq tune": ("int4", ["gptq", "tune"]),
    "gptq qat": ("int8-static", ["gptq", {"qat": {"steps": 3}}]),
}


class ForeignTensor(Tensor):
    """A tensor of the device; ``held`` is what it computes with."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> ForeignTensor:
        wrapped: ForeignTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        wrapped.held = held
        return wrapped

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is Tensor.numpy:
            raise TypeError("a tensor of another device cannot be converted to numpy; copy it to the CPU first")
        if function == Tensor.data.__set__:  # type: ignore[attr-defined]
            target, values = args
            if not isinstance(values, ForeignTensor) or not isinstance(target, ForeignTensor):
                raise TypeError("data of one device is assigned to a tensor of another")
            target.held = values.held
            return None
        if function == Tensor.tolist:
            return args[0].held.tolist()
        if function == Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))  # torch cannot make a tensor of numbers on such a device
        # Not the inherited one, which would make a tensor of this class of every result.
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(operator, args, dict(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ForeignTensor({self.held})"


def register() -> None:
    """Let torch know the device."""

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operator, *args, **kwargs: _compute(operator, args, kwargs), "PrivateUse1")
    _LIBRARIES.append(library)


#: What is registered lives as long as these.
_LIBRARIES: list[Any] = []

#: Operators that take tensors of both devices: copies from one to the other.
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")


def _compute(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator in main memory, and what it returns on the device that it belongs to."""
    given, _ = tree_flatten((args, kwargs))
    tensors = [each for each in given if isinstance(each, Tensor)]
    name = operator._schema.name
    if name not in _COPIES:
        _require_one_device(name, tensors)
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        foreign = torch.device(device).type == NAME
    else:
        foreign = any(isinstance(each, ForeignTensor) for each in tensors)
    result = operator(*tree_map(_held, args), **tree_map(_held, kwargs))
    returned = _written(operator, args, kwargs)
    if returned is not None:
        return returned
    flat, shape = tree_flatten(result)
    wrap = [ForeignTensor(each) if foreign and isinstance(each, Tensor) else each for each in flat]
    return tree_unflatten(wrap, shape)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, ForeignTensor) else value


def _written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The arguments that an operator writes to and returns; None where it returns others."""
    schema = operator._schema
    written = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs.get(argument.name))
    if not written or not schema.returns or schema.returns[0].alias_info is None:
        return None
    return written[0] if len(schema.returns) == 1 else tuple(written)


def _require_one_device(name: str, tensors: Sequence[Tensor]) -> None:
    foreign = [each for each in tensors if isinstance(each, ForeignTensor)]
    near = [each for each in tensors if not isinstance(each, ForeignTensor)]
    if foreign and any(each.ndim for each in near) and not name.startswith("aten::index"):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found two, {NAME} and cpu")


def main(root: Path) -> None:
    """Convert by every chain on the CPU and on the device, and print which shares of the codes are equal, as JSON."""
    from quantcli.system import devices

    devices._DEVICES = ("cpu", NAME)
    devices.has_bfloat16 = lambda _: False  # before it is imported elsewhere
    import transformers as tf
    from safetensors.torch import load_file

    from quantcli import convert
    from quantcli.conversion.checkpoint import transformers_check
    from quantcli.conversion.checkpoint.proof import Skipped
    from quantcli.planning.recipe import Recipe

    register()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers_check._reason_to_skip = lambda *_: Skipped("left out by a test")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, initializer_range=0.15)).save_pretrained(root / "model")
    np.savez(root / "data.npz", input_ids=np.random.default_rng(0).integers(0, 64, (8, 16)))
    equal: dict[str, Any] = {}
    for name, (scheme, steps) in CHAINS.items():
        recipe = Recipe(scheme=scheme, steps=steps, **({"group_size": 16} if scheme == "int4" else {}))
        made = []
        for device in ("cpu", NAME):
            output = root / f"{name} {device}"
            try:
                convert(root / "model", output, recipe=recipe, data=root / "data.npz", device=device, allow_larger=True)
            except Exception as error:  # whatever it is, it is what is looked for
                equal[name] = f"on {device} {type(error).__name__}: {error}"
                break
            made.append(load_file(output / "model.safetensors"))
        else:
            pairs = [(values, made[1][key]) for key, values in made[0].items() if not values.is_floating_point()]
            equal[name] = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    print(json.dumps(equal))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
