"""Does transformers find in an artifact exactly what it expects? Asked of transformers itself, in a process apart.

The artifact is loaded by ``from_pretrained``, which lists the names and shapes it missed, did not expect,
or could not fit. What it lacks and the original does not is a failure. The
model is laid out on the meta device, so neither time nor memory depends on its size; where shapes alone do not
tell, it is loaded for real if that fits into memory.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.errors import InputError
from quantcli.planning.plan import Plan
from quantcli.system.child import Child, ChildFailedError
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.text import first_line

TIMEOUT_SECONDS = 900
#: Packages that transformers needs to load a format.
_NEEDS = {
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class RuntimeCheck:
    """A check under way, once it is entered: then the artifact's headers and config.json are written."""

    def __init__(self, artifact: Path, plan: Plan, checkpoint: Checkpoint, nbytes: int) -> None:
        self._child: Child | None = None
        bare = "a bare file has no runtime of its own"
        self._skipped = _reason_to_skip(plan, checkpoint, nbytes) if checkpoint.folder else bare
        self._needs_weights = _needs_weights(plan)
        device = "cpu" if self._needs_weights else "meta"
        self._request = {"artifact": str(artifact), "original": str(checkpoint.folder), "device": device}

    def __enter__(self) -> RuntimeCheck:
        """Begin in the background, unless the weights are waited for."""
        if not self._needs_weights:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """End a check that is still running, and release what it holds."""
        if self._child:
            self._child.stop()

    def _start(self) -> None:
        if not self._skipped and self._child is None:
            self._child = Child(f"{__name__}:check", self._request, {"OMP_NUM_THREADS": "1"})

    def result(self) -> dict[str, Any]:
        """What transformers says, for the manifest.

        Raises:
            InputError: transformers would miss or misread weights of the artifact.
        """
        if self._skipped:
            return {"checked": False, "reason": self._skipped}
        self._start()
        assert self._child is not None
        try:
            answer = self._child.result(TIMEOUT_SECONDS)
        except ChildFailedError as error:
            ended = f"the check ended with status {error.status}"
            took = f"transformers took over {TIMEOUT_SECONDS} s"
            return {"checked": False, "reason": took if error.status is None else ended}
        problems = answer.pop("problems", [])
        if problems:
            raise InputError(
                f"transformers {answer.get('transformers')} would not load the result: {'; '.join(problems[:4])}.",
                hint="--skip the layers it names, choose another --format, or --target vllm if that is meant.",
            )
        return answer


def _needs_weights(plan: Plan) -> bool:
    """Whether shapes alone do not tell: settings that are tensors, and int4 experts, unpacked where they are joined."""
    return plan.format == "bitsandbytes" or any(
        layer.role == "expert" and layer.has_codes and layer.scheme and layer.scheme.weights.bits == 4
        for layer in plan.layers
    )


def _reason_to_skip(plan: Plan, checkpoint: Checkpoint, nbytes: int) -> str | None:
    if not any(layer.has_codes for layer in plan.layers) and not isinstance(checkpoint, DecodedCheckpoint):
        return "names and shapes are those of the original"
    if plan.recipe.runtime[0] not in (None, "transformers"):
        return f"the target is {plan.recipe.target}"
    if "model_type" not in (checkpoint.config or {}):
        return "config.json names no model type"
    for package in filter(None, ("transformers", _NEEDS.get(plan.format))):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    # Experts are joined unpacked, in their original size.
    loaded = nbytes if plan.format == "bitsandbytes" else sum(layer.info.nbytes for layer in plan.layers)
    if _needs_weights(plan) and loaded > free_memory_bytes() // 4:
        return f"{plan.format} weights of this kind cannot be checked without loading, and memory is too small"
    return None


def check(request: dict[str, str]) -> dict[str, Any]:
    """In the child: load the artifact, and where that is not clean the original too."""
    artifact, original, device = request["artifact"], request["original"], request["device"]
    import transformers

    answer: dict[str, Any] = {"checked": True, "transformers": transformers.__version__}
    problems: list[str] = []
    try:
        after = _loading_info(artifact, None if device == "cpu" else device)
        answer["class"] = after["class"]
    except Exception as error:
        after = None
        problems = [first_line(error)]
    if after is None or any(after[kind] for kind in _KINDS):
        try:
            before = _loading_info(original, "meta")
        except Exception as error:
            reason = f"transformers {transformers.__version__} does not load the original: {first_line(error)}"
            return {"checked": False, "reason": reason}
        for kind in _KINDS:
            new = sorted(after[kind] - before[kind]) if after else []
            problems += [f"{kind.replace('_', ' ')}: {', '.join(new[:3])}"] if new else []
    return answer | {"problems": problems}


def _loading_info(folder: str, device: str | None) -> dict[str, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    loader = named or transformers.AutoModel
    options = {"device_map": device} if device else {}
    model, info = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    names = {kind: {_name(entry) for entry in info.get(kind, ())} for kind in _KINDS}
    return names | {"class": type(model).__name__}


def _name(entry: Any) -> str:
    """A key, or the name in front of two shapes that do not fit."""
    return entry if isinstance(entry, str) else str(entry[0])
