"""Whether a model of transformers runs in a dtype, asked on the meta device.

Runs in a process apart. Most of that device's kernels do not look at dtypes, so they are compared here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from quantcli.conversion.checkpoint.made_up_inputs import candidates
from quantcli.models.hugging_face import disable_caches

#: Products, whose operands the processor's kernels want in one dtype.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear")
#: Norms: with a narrow input the processor's kernels take wide weights, with a wide one no narrow weights.
_NORMS = ("native_layer_norm", "native_group_norm")


class _MixedError(RuntimeError):
    """An operation is given operands of several dtypes. No TypeError, which transformers takes for its own."""

    def __init__(self) -> None:
        super().__init__("operands of several dtypes")


def mixes_dtypes(model: Any, *, keeps_buffers: bool = False) -> bool:
    """Whether a forward pass of a model on the meta device fails because of dtypes, with caches or without.

    ``keeps_buffers``: the loader keeps buffers in the dtype that they were made in, so that a model which gives one
    another dtype as it runs goes on with the first. The model's configuration builds no caches after this.
    """
    if _mixes(model, keeps_buffers=keeps_buffers):
        return True
    disable_caches(model.config)
    return _mixes(model, keeps_buffers=keeps_buffers)


def _mixes(model: Any, *, keeps_buffers: bool) -> bool:
    import torch

    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    with torch.no_grad(), torch.device("meta"), _compared_dtypes():
        for inputs in candidates(model, "meta"):
            try:
                model(**inputs)
            except _MixedError:
                return True
            except Exception as error:
                # What fails for another reason, such as values that this device has none of, tells nothing.
                if re.search(r"dtype|scalar type", str(error)):
                    return True
                continue
            changed = any(buffers.get(name, buffer.dtype) != buffer.dtype for name, buffer in model.named_buffers())
            return keeps_buffers and changed
    return False


def _compared_dtypes() -> Any:
    """Meanwhile operands that the processor's kernels would not take together raise an error."""
    from torch import Tensor, float32
    from torch.utils._python_dispatch import TorchDispatchMode

    class Comparing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            operands = [each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()]
            mixed = len(set(operands)) > 1
            if mixed and (name in _PRODUCTS or (name in _NORMS and operands[0] == float32)):
                raise _MixedError
            return function(*args, **(kwargs or {}))

    return Comparing()  # type: ignore[no-untyped-call]


def scales_kept_wide(model: Any, weights: Collection[str]) -> bool:
    """Whether a class keeps in float32 what only the scales of some weights are called like."""
    plan = model._get_dtype_plan(model.dtype)
    return any(is_kept_wide(plan, f"{name}_scale") and not is_kept_wide(plan, name) for name in weights)


def is_kept_wide(plan: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor stays float32 by transformers' dtype plan, whose patterns match anywhere in a name."""
    from torch import float32

    patterns = (key.replace("*", r"\w+") for key, dtype in plan.items() if dtype == float32)
    return any(re.search(pattern, name) for pattern in patterns)
