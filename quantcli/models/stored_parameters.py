"""A Hugging Face model's parameters and the tensors of its checkpoint: renamed, merged by expert, or not stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def computed_tables(model: nn.Module, missing: Iterable[str]) -> dict[str, Tensor]:
    """Values of those of the ``missing`` parameters that a class computes, such as a table of sinusoids.

    Checkpoints need not hold these. Such a parameter is an embedding's, and is initialized to the same values, not all
    one, whatever was there before, and whatever the random numbers.
    """
    initialize = getattr(model, "_init_weights", None)
    found: dict[str, Tensor] = {}
    for name in missing if initialize else ():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, nn.Embedding) or leaf != "weight":
            continue
        tries = []
        for seed in range(2):
            twin = copy.copy(module)
            twin._parameters = {leaf: nn.Parameter(torch.full(tuple(module.weight.shape), float(seed)))}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                initialize(twin)  # type: ignore[misc]
            tries.append(twin.weight.detach().float())
        if torch.equal(*tries) and bool((tries[0] != tries[0].reshape(-1)[0]).any()):
            found[name] = tries[0]
    return found


def parameter_names(model: nn.Module, tensors: Iterable[str]) -> dict[str, str | None]:
    """What a model calls the tensors of a checkpoint; None for one that it merges with others, or splits.

    Architectures change in transformers, and published checkpoints do not: it renames tensors as it loads them. The
    rules are its own.
    """
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in tensors}
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _renamings(model)
    prefix, known = model.base_model_prefix, dict(model.state_dict())
    found: dict[str, str | None] = {}
    for name in tensors:
        renamed, merged = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known:
            plain, _ = rename_source_key(name, [], [], prefix, known)
            renamed, merged = (plain, None) if plain in known else (renamed, merged)
        found[name] = None if merged else renamed
    return found


def _renamings(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The rules by which transformers renames a checkpoint's tensors, and those by which it merges or splits them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if not isinstance(rule, WeightRenaming)]


class MergedExperts:
    """Which tensors of a checkpoint transformers stacks, one for each expert, into a parameter of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[str, Any] = {}
        if hasattr(model, "base_model_prefix"):
            self._prefix, self._known = model.base_model_prefix, dict(model.state_dict())
            self._renamings, self._converters = _renamings(model)

    def place(self, tensor: str) -> tuple[str, int, int, str] | None:
        """The parameter, the expert's number, which of the parts joined by rows it is, and the layer's own name.

        None where the tensor is no expert's, or is put together with others in another way.
        """
        from transformers.core_model_loading import rename_source_key

        if not self._known:
            return None
        plain, _ = rename_source_key(tensor, self._renamings, [], self._prefix, self._known)
        for rule in self._converters:
            target, pattern = rename_source_key(tensor, self._renamings, [rule], self._prefix, self._known)
            if pattern is None:
                continue
            steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
            numbers = [(at, part) for at, part in enumerate(plain.split(".")) if part.isdigit()]
            stacked = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
            if not stacked or len(rule.target_patterns) > 1 or not numbers or target not in self._known:
                return None
            at, number = numbers[-1]
            leaf = "_".join(plain.removesuffix(".weight").split(".")[at + 1 :])
            return target, int(number), rule.source_patterns.index(pattern), leaf or "weight"
        return None

    def parts(self, tensor: str, parameter: str) -> list[str]:
        """What a file calls the parts of one expert that holds them one by one, with ``{}`` for its number.

        ``tensor`` is what a file calls all of them, stacked as the ``parameter``. Empty where the library stacks none.
        """
        for rule in self._converters if self._known else ():
            whole = [pattern.replace("\\.", ".") for pattern in rule.target_patterns]
            if len(whole) != 1 or not tensor.endswith(whole[0]):
                continue
            begin = tensor.removesuffix(whole[0])
            single = [begin + pattern.replace("\\.", ".").replace("*", "{}", 1) for pattern in rule.source_patterns]
            places = [self.place(name.format(0)) for name in single]
            if all(place and place[:3] == (parameter, 0, part) for part, place in enumerate(places)):
                return single
        return []


@dataclass(frozen=True)
class Conversion:
    """How transformers makes parameters of tensors, as by turning or interleaving them: by its own operations.

    ``sources`` are the tensors, with the pattern that each one matches; ``target`` is what the rule calls the result.
    """

    model: nn.Module
    rule: Any
    target: str
    sources: Mapping[str, str]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that come of the sources' values, by name."""
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources.items():
            rule.add_tensor(self.target, name, pattern, tensors[name])
        made = rule.convert(self.target, model=self.model, config=self.model.config)
        return {name: given[0] if isinstance(given, list) else given for name, given in made.items()}


def conversions(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, Conversion]:
    """By a parameter's name, how it is made of a checkpoint's tensors, where that is by more than a new name.

    ``shapes`` are those of the tensors, by name.
    """
    if not hasattr(model, "base_model_prefix"):
        return {}
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _renamings(model)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict(model.state_dict())
    groups: dict[str, dict[str, str]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is not None:
            groups.setdefault(target, {})[name] = pattern
    found: dict[str, Conversion] = {}
    for target, sources in groups.items():
        conversion = Conversion(model, by_pattern[next(iter(sources.values()))], target, sources)
        try:
            made = conversion.run({name: torch.empty(tuple(shapes[name]), device="meta") for name in sources})
        except Exception:
            # An operation that looks at values, or asks for tensors that the checkpoint lacks: it stays unknown.
            continue
        found |= {name: conversion for name, part in made.items() if name in known and part.shape == known[name].shape}
    return found


def use_plain_experts(model: nn.Module) -> None:
    """Let a mixture compute one expert after the other, in its class's own code."""
    model.set_experts_implementation("eager")  # type: ignore[operator]


def use_layers_for_experts(model: nn.Module, method: str | None = None) -> None:
    """Put layers in place of fused experts where transformers does so for a model quantized by a ``method``, or by any.

    The layers are on the meta device.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHES

    for name, module in list(model.named_modules()):
        patch = PATCHES.get(type(module).__name__)
        if patch is not None and (method is None or method in [each.value for each in patch["quantization_methods"]]):
            with torch.device("meta"):
                layers = patch["module_name"](model.config.get_text_config())  # type: ignore[operator,union-attr]
            model.set_submodule(name, layers.eval())


def vocabulary_of(module: Any) -> int:
    """How many ids a model's table of words has, whatever its class, or else its configuration says that there are."""
    try:
        return len(module.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return int(module.config.get_text_config().vocab_size)


def with_layers_for_experts(kind: type, method: str) -> type:
    """A model's class whose experts are layers, where transformers makes them so for a ``method`` of quantization."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)  # type: ignore[misc]
        use_layers_for_experts(self, method)

    # The library's rules for a class hold for those of its own modules.
    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})


def forget_codes(config: Any) -> str | None:
    """Take what a configuration of transformers tells of codes out of it, wherever that is; returns their kind."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})]
    found = [vars(part).pop("quantization_config", None) for part in parts if part is not None]
    return next((section.get("quant_method") for section in found if section), None)
