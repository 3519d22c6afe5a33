"""How far an artifact is proven by a run, and what of that is said: in the report, in the manifest, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.conversion.checkpoint.loader_memory import Blocks
from quantcli.reporting.tables.common import counted_text
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.text import format_bytes

_UNCOMPARED = "transformers holds the others in a form of its own"


@dataclass(frozen=True)
class Skipped:
    """Why transformers is not asked at all. ``foreseen``: by the user's own choice, or since nothing could be found."""

    reason: str
    foreseen: bool = True


@dataclass(frozen=True)
class Scope:
    """How much of an artifact is run.

    - ``run``: whether anything is. ``reason``: why not everything. ``foreseen``: that is the user's own choice.
    - ``keep``: of lists of blocks, the blocks that are run; empty for the whole model.
    - ``blocks``: the same for the manifest. ``layers``: quantized layers that are run, and of how many.
    - ``smaller``: what is run where this takes more memory than there is.
    """

    run: bool = True
    reason: str = ""
    foreseen: bool = False
    keep: Mapping[str, list[str]] = field(default_factory=dict)
    blocks: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, int] = (0, 0)
    smaller: Scope | None = None


def choose_scope(blocks: Blocks, verify: str | None, limit: int | None) -> Scope:
    """The whole model where it fits into half of the free memory and into ``limit``, else what of it fits.

    Args:
        blocks: the model.
        verify: ``run`` for the whole model, ``codes`` for nothing, None for what fits.
        limit: of bytes, beside the memory that is free.
    """
    layers = blocks.counts({})
    if not layers[1]:
        return Scope(run=False, foreseen=True, reason="no layer has codes")
    if verify == "codes":
        return Scope(run=False, reason="--verify codes", foreseen=True, layers=(0, layers[1]))
    if verify == "run":
        return Scope(layers=layers)
    allowed, bound = free_memory_bytes() // 2, "half of the free memory"
    if limit is not None and limit < allowed:
        allowed, bound = limit, "--max-memory allows"
    whole = blocks.needed_bytes({})
    reason = f"loaded whole, it takes {format_bytes(whole)}, more than {bound}"
    parts = [keep for keep in (blocks.one_of_each_kind(), blocks.ends()) if blocks.needed_bytes(keep) < whole]
    if whole <= allowed:
        smaller = _part(blocks, parts[0], "there was too little memory for the whole model") if parts else None
        return Scope(layers=layers, smaller=smaller)
    for keep in parts:
        if blocks.needed_bytes(keep) <= allowed:
            return _part(blocks, keep, reason)
    if parts:
        reason += f", and so do its first and last blocks with {format_bytes(blocks.needed_bytes(parts[-1]))}"
    return Scope(run=False, reason=reason, layers=(0, layers[1]))


def _part(blocks: Blocks, keep: Mapping[str, list[str]], reason: str) -> Scope:
    return Scope(keep=keep, reason=reason, blocks=blocks.described(keep), layers=blocks.counts(keep))


def described(
    said: Mapping[str, Any], scope: Scope, skipped: Skipped | None, *, planned: bool = False
) -> dict[str, Any]:
    """What the manifest and the report hold of transformers.

    - ``checked``: whether it loaded the artifact, or its names and shapes. ``run``: ``all``, ``part`` or ``none`` of
      its quantized layers. ``summary``: both in one sentence.
    - ``reason``: why not all. ``foreseen``: that is the user's own choice, or nothing is to be proven.
    - ``blocks``: where only a part was run, which blocks.

    Args:
        said: what transformers said, with ``ran`` where it ran.
        scope: what was to be run.
        skipped: why it was not asked.
        planned: nothing is run yet.
    """
    if skipped or (not said and not planned):
        reason = skipped.reason if skipped else scope.reason
        about = {"checked": False, "run": "none", "reason": reason}
        foreseen = skipped.foreseen if skipped else scope.foreseen
        return about | {"foreseen": foreseen, "summary": f"neither loaded nor run by transformers: {reason}"}
    about = {"checked": bool(said), **said}
    done = scope.layers[0] if planned else sum(_counts(said)) if "ran" in said else 0
    total = scope.layers[1]
    if not scope.run:
        about |= {"run": "none", "reason": scope.reason, "foreseen": scope.foreseen}
    elif done < total:
        about |= {"run": "part", "reason": scope.reason or _UNCOMPARED, "foreseen": False}
        about |= {"blocks": dict(scope.blocks)} if scope.blocks else {}
    else:
        about |= {"run": "all", "foreseen": "forward" not in said.get("ran", {})}
    return about | {"summary": _sentence(about, done, total, planned=planned)}


def _counts(said: Mapping[str, Any]) -> tuple[int, int, int]:
    ran = said["ran"]
    return ran["by_forward"], ran["by_themselves"], ran["joined"]


def _sentence(about: Mapping[str, Any], done: int, total: int, *, planned: bool) -> str:
    name = f"transformers {about['transformers']}" if "transformers" in about else "transformers"
    model = f" of {about['class']}" if "class" in about else ""
    if about["run"] == "none":
        finds = f"{name} {'is to find' if planned else 'finds'} every weight{model}"
        return f"{finds}; not run: {about['reason']}"
    layers = counted_text(total, "quantized layer")
    share = layers if done >= total else f"{done} of {layers}"
    said = f"{name} is to run {share}{model}" if planned else f"{name} runs {share}{model} as the codes say"
    said += "" if planned else _manner(about["ran"])
    if about["run"] == "part":
        said += f"{_named(about.get('blocks', {}))}; the rest is compared code by code only: {about['reason']}"
    forward = about.get("ran", {}).get("forward")
    return f"{said}; {forward}" if forward else said


def _manner(ran: Mapping[str, Any]) -> str:
    """How layers were run that the forward pass did not come to."""
    odd = {"called by themselves": ran["by_themselves"], "joined": ran["joined"]}
    listed = ", ".join(f"{count} {how}" for how, count in odd.items() if count)
    return f" ({listed})" if listed else ""


def _named(blocks: Mapping[str, Any]) -> str:
    listed = "; ".join(f"blocks {', '.join(each['run'])} of {each['of']} in {path}" for path, each in blocks.items())
    return f" ({listed})" if listed else ""


def warning(runtime: Mapping[str, Any]) -> str | None:
    """What a report warns of: an artifact that the default check did not run whole, not by the user's choice."""
    if runtime.get("foreseen", True):
        return None
    if runtime["run"] == "all":
        return f"The artifact was run layer by layer only: {runtime['ran']['forward']}."
    what = "not run" if runtime["run"] == "none" else "run only in part"
    return f"The artifact was {what}: {runtime['reason']}."
