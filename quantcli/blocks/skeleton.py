"""A model whose parameters stay in its checkpoint until a part of it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantcli.blocks.experts import take_experts_apart
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.split_experts import SplitExperts
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError
from quantcli.models import hugging_face, stored_parameters

_Found = TypeVar("_Found")
#: Elements of a tensor that are read at a time.
_READ_ELEMENTS = 1 << 20


class Skeleton:
    """A torch module on the meta device, and where in a checkpoint each of its parameters is.

    Buffers that no checkpoint holds, such as rotary frequencies, are real from the start.
    """

    def __init__(self, module: nn.Module, checkpoint: Checkpoint) -> None:
        """Match parameters with tensors. Raises InputError where a parameter is not in the checkpoint.

        Fused experts become one linear layer for each of the checkpoint's tensors.
        """
        self.module, self.checkpoint = module, checkpoint
        self._infos, self._buffers, computed, self._made = _match(module, checkpoint.infos())
        for name, values in computed.items():
            self.set(name, values)
        self.shared = _shared(module)

    def parameters(self, path: str = "") -> dict[str, TensorInfo]:
        """The tensor of the checkpoint that each parameter of a submodule is, by the parameter's full name."""
        return _inside(self._infos, path)

    def load(self, path: str) -> nn.Module:
        """A submodule with its weights in float32."""
        for name in (*self.parameters(path), *_inside(self._made, path)):
            self.set(name, self.read(name))
        self.load_buffers(path)
        return self.module.get_submodule(path)

    def load_buffers(self, path: str = "") -> None:
        """Give the buffers of a submodule that are stored, such as running means, their values."""
        for name, info in _inside(self._buffers, path).items():
            self.set(name, self._read(info))

    @contextmanager
    def loading_others(self, paths: Collection[str]) -> Iterator[None]:
        """Meanwhile what is outside some submodules is loaded piece by piece, as it is first called.

        So what is never called, such as an output head behind the last block that is asked for, is never read.
        """
        inside, loaded = tuple(f"{path}." for path in paths), set[str]()
        with ExitStack() as stack:
            stack.callback(self.drop)
            self.load_buffers()
            stack.enter_context(self.reading_others(paths))
            for name, module in self.module.named_modules():
                if not f"{name}.".startswith(inside):
                    hook = partial(self._load_own, name, loaded)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def reading_others(self, paths: Collection[str]) -> Iterator[None]:
        """Meanwhile a parameter outside some submodules is read when something is first computed with it.

        So code may use the parameters of modules that it does not call: another's weight, or one of a child.
        """
        inside = tuple(f"{path}." for path in paths)
        outside = [name for name in (*self._infos, *self._made) if not name.startswith(inside)]
        with _Reading(self, outside) as reading:
            yield
        for name in reading.names:
            self._drop_one(name)

    def _load_own(self, path: str, loaded: set[str], module: nn.Module, _: Any) -> None:
        """The hook before a module's calls: before the first, load the parameters that are its own."""
        if path in loaded:
            return
        loaded.add(path)
        start = f"{path}." if path else ""
        # This module of torch reads its child's weight without calling it.
        depth = 1 if isinstance(module, nn.MultiheadAttention) else 0
        for name, info in (self.parameters(path) | _inside(self._buffers, path)).items():
            if name.removeprefix(start).count(".") <= depth:
                self.set(name, self._read(info))
        for name in _inside(self._made, path):
            if name.removeprefix(start).count(".") <= depth:
                self.set(name, self.read(name))

    def _read(self, info: TensorInfo) -> Tensor:
        """A whole tensor; one of floating point as float32, without a copy of it in its own dtype beside it."""
        if not info.is_float:
            return self.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape)
        values = torch.empty(info.rows, info.columns)
        step = max(1, _READ_ELEMENTS // max(1, info.columns))
        for start in range(0, info.rows, step):
            rows = values[start : start + step]
            rows.copy_(self.checkpoint.read_rows(info, start, start + len(rows)).reshape(rows.shape))
        return values.reshape(info.shape)

    def info(self, parameter: str) -> TensorInfo:
        """The tensor of the checkpoint that a parameter is, by the parameter's full name."""
        return self._infos[parameter]

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
        for name in (*self.parameters(path), *_inside(self._made, path)):
            self._drop_one(name)

    def _drop_one(self, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        meta = module.get_parameter(leaf).to("meta")
        module._parameters[leaf] = nn.Parameter(meta, requires_grad=False)

    def read(self, name: str) -> Tensor:
        """The values of a parameter, by its full name."""
        if name not in self._made:
            return self._read(self._infos[name])
        made = self._made[name]
        return made.run({info.name: self._read(info) for info in self.checkpoint.infos() if info.name in made.sources})[
            name
        ]


class _Reading(TorchFunctionMode):
    """Puts values in the place of parameters on the meta device, as something is computed with them."""

    def __init__(self, skeleton: Skeleton, infos: Collection[str]) -> None:
        super().__init__()
        self._skeleton = skeleton
        # Held, so that no other object comes to have the identity of one of them.
        self._meta: dict[int, tuple[Tensor, str]] = {}
        for name, parameter in skeleton.module.named_parameters(remove_duplicate=False):
            if parameter.is_meta and name in infos:
                self._meta[id(parameter)] = parameter, name
        self._values: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Parameters that were read."""
        return list(self._values)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return function(*map(self._real, args), **{key: self._real(value) for key, value in (kwargs or {}).items()})

    def _real(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            return type(value)(map(self._real, value)) if type(value) in (list, tuple) else value
        if not isinstance(value, nn.Parameter) or id(value) not in self._meta:
            return value
        name = self._meta[id(value)][1]
        if name not in self._values:
            self._skeleton.set(name, self._skeleton.read(name))
            owner, _, leaf = name.rpartition(".")
            self._values[name] = self._skeleton.module.get_submodule(owner).get_parameter(leaf)
        return self._values[name]


def _inside(infos: Mapping[str, _Found], path: str) -> dict[str, _Found]:
    start = f"{path}." if path else ""
    return {name: info for name, info in infos.items() if name.startswith(start)}


def open_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """The model of a Hugging Face folder, as the class that its config.json names.

    Raises:
        InputError: there is no config.json, transformers does not know the model, or parameters are missing.
        MissingExtraError: transformers is not installed.
    """
    if checkpoint.folder is None:
        raise InputError(
            f"{checkpoint.path} is a bare file, which cannot be run, and calibration has to run the model.",
            hint="Name the Hugging Face folder around it, or package.module:function with --weights, or use an "
            "algorithm without data, such as mse.",
        )
    with parameters_on_meta():
        module = hugging_face.build_model(hugging_face.require_folder(checkpoint.folder))
    if isinstance(checkpoint, SplitExperts):
        stored_parameters.use_layers_for_experts(module)
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()
    return Skeleton(module.eval(), checkpoint)


#: Held while a method of torch's class is another one: two threads would leave each other's in its place.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built meanwhile have no memory for their parameters, and real buffers.

    accelerate's ``init_empty_weights(include_buffers=False)`` makes a new parameter of one that is registered again, so
    that tied weights of a user's module are tied no more; and such a module is calibrated without accelerate.
    """
    with _ONE_AT_A_TIME:
        original = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            original(module, name, parameter)
            # One that is there already is tied to another module's.
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def _match(
    module: nn.Module, infos: Collection[TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], dict[str, Tensor], dict[str, stored_parameters.Conversion]]:
    """The tensor of each parameter, its own or that of one it is tied to, and of each buffer that is stored.

    Then values of parameters that are not stored, since the class computes them; and how others are made of tensors.
    """
    apart = take_experts_apart(module, infos)
    left = [info.name for info in infos if info.name not in apart]
    names: dict[str, str | None] = {**stored_parameters.parameter_names(module, left), **apart}
    by_name = {name: info for info in infos if (name := names[info.name]) is not None}
    tensors = dict(module.named_parameters(remove_duplicate=False))
    twins: dict[int, TensorInfo] = {id(tensors[name]): info for name, info in by_name.items() if name in tensors}
    matched: dict[str, TensorInfo] = {}
    missing = []
    for name, parameter in tensors.items():
        info = by_name.get(name) or twins.get(id(parameter))
        if info is None:
            missing.append(name)
        elif tuple(parameter.shape) != info.shape:
            raise InputError(f"{info.name} has the shape {list(info.shape)}; config.json says {list(parameter.shape)}.")
        else:
            matched[name] = info
    computed = stored_parameters.computed_tables(module, missing)
    missing = [name for name in missing if name not in computed]
    shapes = {info.name: info.shape for info in infos if info.name not in apart} if missing else {}
    made = {name: how for name, how in stored_parameters.conversions(module, shapes).items() if name in missing}
    missing = [name for name in missing if name not in made]
    _require(module, missing, [tensor for tensor, parameter in names.items() if parameter is None])
    buffers = {name: by_name[name] for name, _ in module.named_buffers() if name in by_name}
    return matched, buffers, computed, made


def _shared(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, as often as there are such."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def _require(module: nn.Module, missing: Collection[str], merged: Sequence[str]) -> None:
    """Raise InputError where parameters are missing without which the model's outputs would be random."""
    needed = [name for name in missing if not any(part in name for part in hugging_face.HARMLESS_WHEN_MISSING)]
    if not needed:
        return
    if merged:
        raise InputError(
            f"{type(module).__name__} holds weights in another form than the checkpoint: {len(merged)} tensors, such "
            f"as {merged[0]}, are merged or split when transformers loads them ({needed[0]}), as fused experts are. "
            "Algorithms that need data cannot tell such layers apart.",
            hint="Use an algorithm without data: --algorithm mse (or rtn), without --data.",
        )
    raise InputError(
        f"The checkpoint lacks {len(needed)} weights of {type(module).__name__}: {', '.join(needed[:3])}.",
        hint="Repair the model, or use an algorithm without data, such as mse.",
    )
