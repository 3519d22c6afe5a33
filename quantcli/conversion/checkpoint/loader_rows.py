"""Which rows of a checkpoint's tensors transformers joins into one or splits as it loads them, and what that forbids.

Runs in a process apart. The library's own operations are carried out, on numbers of rows in place of values, so that
whatever only moves whole rows is found, by whatever operation.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any


def rearranged(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What `RearrangedCheckpoint` takes: by the library's name each tensor that is made of rows of stored ones.

    Args:
        model: the library's model, on the meta device.
        shapes: of the checkpoint's tensors, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict(model.state_dict())

    def loaded(name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return renamed

    groups: dict[str, dict[str, str]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = loaded(name)
        if pattern is not None and target in known and shapes[name]:
            groups.setdefault(target, {})[name] = pattern
    found: dict[str, dict[str, Any]] = {}
    for target, patterns in groups.items():
        sources = {name: shapes[name] for name in patterns}
        made = _numbered(model, by_pattern[next(iter(patterns.values()))], target, patterns, sources)
        inner = {tuple(shape[1:]) for shape in sources.values()}
        fits = {name: name in known and {tuple(known[name].shape[1:])} == inner for name in made}
        # Stored by its new name, a tensor has to be loaded as it is.
        if all(fits.values()) and all(len(known[name]) == len(made[name]) for name in made):
            starts = [0, *accumulate(shape[0] for shape in sources.values())]
            if all(loaded(name) == (name, None) for name in made):
                found |= {name: {"sources": list(sources), "runs": _runs(rows, starts)} for name, rows in made.items()}
    return found


def rules_against_codes(model: Any, coded: Sequence[str]) -> list[str]:
    """What the library would split as it loads, and for that does not load this class with codes of compressed-tensors.

    Its quantizer gives every rule the names of codes and scales, and fails where one name would become several; whether
    the model has a layer that the rule means does not matter.

    Args:
        model: the library's model, on the meta device.
        coded: the library's names of the weights that become codes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    quantizer: Any = CompressedTensorsHfQuantizer
    asked: Any = SimpleNamespace(
        pre_quantized=True,
        serialized_names=quantizer.serialized_names,
        get_load_operations=lambda: quantizer.get_load_operations(asked),
        get_weight_conversions=list,
    )
    loaded = SimpleNamespace(named_parameters=lambda: [(f"{name}_scale", None) for name in coded])
    found = []
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter):
            try:
                quantizer.update_weight_conversions(asked, [rule], loaded)
            except ValueError:
                found += rule.source_patterns
    return found


def _numbered(
    model: Any, rule: Any, target: str, patterns: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The rows of each tensor that a rule makes, all sources' rows counted through; empty where it makes no rows."""
    import torch

    rule, begin = copy.deepcopy(rule), 0
    for name, shape in shapes.items():
        rows = torch.arange(begin, begin + shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        rule.add_tensor(target, name, patterns[name], rows)
        begin += shape[0]
    dimensions = {len(shape) for shape in shapes.values()}
    try:
        made = rule.convert(target, model=model, config=model.config)
    except Exception:
        # An operation that asks for whole tensors, or for some that the checkpoint lacks: it makes no rows of these.
        return {}
    found = {}
    for name, given in made.items():
        rows = given[0] if isinstance(given, list) else given
        if {rows.ndim} != dimensions or rows.numel() != len(rows):
            return {}
        found[name] = rows.flatten().tolist()
    return found


def _runs(rows: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Rows as runs of equal steps: the number of the source, its first row, the step, and how many there are.

    ``starts`` are the numbers of the sources' first rows, and of the row behind the last.
    """
    runs: list[tuple[int, int, int, int]] = []
    at = 0
    while at < len(rows):
        source = bisect_right(starts, rows[at]) - 1
        step = rows[at + 1] - rows[at] if at + 1 < len(rows) else 1
        count = 1
        while step > 0 and at + count < len(rows) and rows[at + count] == rows[at] + step * count < starts[source + 1]:
            count += 1
        runs.append((source, rows[at] - starts[source], step if count > 1 else 1, count))
        at += count
    return runs
