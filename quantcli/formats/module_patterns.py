"""Regular expressions that name modules inside a ``quantization_config``."""

from __future__ import annotations

import re
from collections.abc import Iterable


def module_patterns(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    r"""A short list of regular expressions that fully match ``names`` and nothing else of ``everything``.

    A loading class may add a prefix to a checkpoint's module names or drop the first part
    (``model.layers.0`` in a causal model is ``layers.0`` in its base model), so a pattern starts with
    ``.*`` and leaves the first part out where it stays exact: ``.*layers\.\d+\.mlp\.gate``.
    """
    names = list(names)
    wanted = set(names)
    others = [name for name in everything if name not in wanted]
    found: dict[str, None] = {}
    for name in names:
        _, _, tail = name.partition(".")
        stems = [tail, name] if "." in tail else [name]
        candidates = [f".*{_any_number(stem)}" for stem in stems] + [f".*{re.escape(stem)}" for stem in stems]
        exact = (c for c in candidates if c in found or not _matches_any(c, others))
        found[next(exact, re.escape(name))] = None
    return list(found)


def not_matched(names: Iterable[str], given: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Those of ``names`` that the patterns of ``given`` do not mean."""
    patterns = [re.compile(pattern) for pattern in module_patterns(given, everything)]
    return [name for name in dict.fromkeys(names) if not any(pattern.fullmatch(name) for pattern in patterns)]


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _matches_any(pattern: str, names: list[str]) -> bool:
    matcher = re.compile(pattern)
    return any(matcher.fullmatch(name) for name in names)
