"""What models return, as arrays; and whether these are class scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from quantcli.core.ports import Arrays, dtype_family, is_table_of_maps, tensors_of
from quantcli.errors import InputError


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


def floats(outputs: Mapping[str, Any]) -> Arrays:
    """The floating-point outputs, in float32 (bfloat16 included).

    A sequence gives one for each of its tensors, with its number in the name; maps with the same keys are a table.
    """
    found: Arrays = {}
    for name, given in outputs.items():
        value = np.array([list(each.values()) for each in given]) if is_table_of_maps(given) else given
        for number, tensor in enumerate(tensors_of(value)):
            if dtype_family(tensor.dtype) == "float":
                key = name if isinstance(value, np.ndarray) else f"{name}[{number}]"
                found[key] = np.asarray(tensor, dtype=np.float32)
    return found


def logits_of(outputs: Arrays, name: str, places: str, hint: str) -> np.ndarray:
    """Logits ``[1, places, vocabulary]``, float32: the output of that name, or the only one. Raises InputError."""
    found = floats(outputs)
    logits = found.get("logits", next(iter(found.values())) if len(found) == 1 else None)
    if logits is None or logits.ndim != 3:
        raise InputError(f"{name} returns no logits [batch, {places}, vocabulary]: {shapes(outputs)}.", hint)
    return logits


def named(returned: Any, name: str) -> Arrays:
    """Tensors among what a module returned: by key, or as output_0, output_1 and so on."""
    if isinstance(returned, torch.Tensor):
        returned = [returned]
    if isinstance(returned, (list, tuple)):
        returned = {f"output_{index}": value for index, value in enumerate(returned)}
    values = returned.items() if isinstance(returned, Mapping) else ()
    named = {str(key): _array(value) for key, value in values if isinstance(value, torch.Tensor)}
    if not named:
        raise InputError(f"{name} returns no tensor.")
    return named


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


_NOT_CLASSES = ("embed", "hidden", "pool", "feature")


def class_scores(outputs: Arrays, name: str) -> np.ndarray:
    """One score per class ``[classes]`` of a sample: the output ``logits``, or the first with one row per sample.

    Raises:
        InputError: there is no such output.
    """
    candidates = floats(outputs)
    for value in (candidates.get("logits"), *candidates.values()):
        if value is not None and value.shape[:1] == (1,) and value.size == max(value.shape) > 1:
            return value.reshape(-1)
    raise InputError(
        f"{name} returns no scores of classes [1, classes]: {shapes(outputs)}.",
        "Use another --task, such as fidelity.",
    )


def is_classes(name: str, values: np.ndarray) -> bool:
    """Whether an output ``[samples, ..., classes]`` holds scores of classes, by its name and its values."""
    if values.ndim < 2 or values.shape[-1] < 2:
        return False
    if name == "logits" or is_distribution(values):
        return True
    return values.ndim == 2 and not any(part in name.lower() for part in _NOT_CLASSES)


def is_distribution(values: np.ndarray | torch.Tensor) -> bool:
    """Whether every row ``[..., classes]`` holds probabilities that sum to one, rather than logits."""
    rows = torch.as_tensor(values).detach()
    return bool((rows >= 0).all()) and bool(((rows.double().sum(-1) - 1).abs() < 1e-2).all())


def shapes(outputs: Arrays) -> str:
    """Names and shapes of outputs, for messages."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
