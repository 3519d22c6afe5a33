"""transformers, asked what it makes of an artifact: before work, of its plan, and after it, of the artifact itself.

It is asked in a process apart, on the meta device first, where neither time nor memory depends on the model's size.
`loader_survey.py` learns how the library names and uses layers; `load_names` lets it load headers without values;
`loader_run.py` loads the artifact, runs it and compares its layers with our own decoding.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import load_json
from quantcli.checkpoint.quantized import section_of
from quantcli.checkpoint.rearranged import RearrangedCheckpoint
from quantcli.checkpoint.split_experts import SplitExperts
from quantcli.conversion.checkpoint.layout import Layout
from quantcli.core.dtypes import TORCH_NAMES
from quantcli.errors import InputError
from quantcli.planning.plan import Loader, Plan
from quantcli.planning.rules import Rules
from quantcli.system.child import ChildFailedError, Service
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.parallel import usable_cores
from quantcli.system.text import first_line, format_bytes

TIMEOUT_SECONDS = 900
#: Packages that transformers needs to load a format.
_NEEDS = {
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}
_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")
_HERE = "quantcli.conversion.checkpoint"


class RuntimeCheck:
    """transformers under way in a process of its own, from before the work until after it.

    ``verify``: ``run``, ``codes`` (names and shapes only), or None: run it where it fits into half of the memory that
    is free, and into ``limit``.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, verify: str | None = None, limit: int | None = None) -> None:
        bare = "a bare file has no runtime of its own"
        self._skipped = _reason_to_skip(plan, checkpoint) if checkpoint.folder else bare
        self._checkpoint, self._verify, self._limit = checkpoint, verify, limit
        self._answers: dict[str, Any] = {}
        self._rehearsed: dict[str, Any] = {}
        self._not_run: str | None = None
        self._other = "int8" if plan.format == "bitsandbytes" else "nf4"
        # Where the child imports what it needs, this process goes on.
        self._service = None if self._skipped else Service({"OMP_NUM_THREADS": str(usable_cores())})
        if self._service:
            self._service.start(f"{_HERE}.loader_survey:survey", self._survey_request(plan))

    def __enter__(self) -> RuntimeCheck:
        """Nothing more: it has begun."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and release what it holds."""
        if self._service:
            self._service.stop()

    def as_held(self, rules: Rules) -> Checkpoint | None:
        """The checkpoint as the library holds it, where that is otherwise; None where it is as stored.

        Its experts are one by one where it fuses them and the library runs codes only so, and what the library joins or
        splits by rows is joined or split, unless ``rules`` name it.
        """
        answer = self._result()
        if made := _free(answer.get("rearranged", {}), self._checkpoint, rules):
            self._checkpoint = RearrangedCheckpoint(self._checkpoint, made)
            name, how = next(iter(made.items()))
            self._checkpoint.warnings += (
                f"{len(made)} tensors are stored as transformers holds them, such as {name} made of rows of "
                f"{how['sources'][0]}; what runs the file's own names wants --target vllm.",
            )
        if split := answer.get("split"):
            self._checkpoint = SplitExperts(self._checkpoint, split)
        return self._checkpoint if made or split else None

    def ask(self, plan: Plan) -> None:
        """Ask again, of another plan."""
        self._start("loader_survey:survey", self._survey_request(plan))

    def survey(self) -> Loader:
        """What the library makes of names and layers; nothing where it is not asked, or has no such model."""
        answer = self._result()
        if not answer:
            return Loader()
        if "error" in answer:
            self._skip(f"transformers does not make the original: {answer['error']}")
            return Loader()
        self._answers = answer
        return Loader(
            answer["name"],
            answer["modules"],
            tuple(answer["absent"]),
            answer["leave"],
            frozenset(answer["unpacked"]),
            frozenset(answer["weights_only"]),
            frozenset(answer["wide"]),
        )

    def rehearse(self, plan: Plan, layout: Layout) -> None:
        """Let the library load an artifact of the plan's names and shapes, without values.

        Raises:
            InputError: it would miss or misread weights.
        """
        self._not_run = self._reason_not_to_run(plan, layout)
        if self._skipped or _needs_values(plan):
            return
        with tempfile.TemporaryDirectory(prefix="quantcli-") as place:
            # Files full of holes: headers, and room that takes no space.
            for destination in layout.create_files(Path(place)).values():
                destination.file.close()
            config = layout.config(plan, self._checkpoint.config)
            (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            self._start("transformers_check:load_names", {"artifact": place, "original": str(self._checkpoint.folder)})
            self._rehearsed = self._result()
        self._refuse(self._rehearsed.pop("problems", []))

    def result(self, artifact: Path) -> dict[str, Any]:
        """What the library says of the artifact that was written, for the manifest.

        Raises:
            InputError: it would miss or misread weights, or compute something else than their codes say.
        """
        if not self._skipped and self._not_run is None:
            request = {"artifact": str(artifact), "original": str(self._checkpoint.folder), "threads": usable_cores()}
            request |= {"loaded": self._answers.get("loaded", {}), "joined": self._answers.get("joined", {})}
            self._start("loader_run:prove", request)
            answer = self._result(running=True)
            self._refuse(answer.pop("problems", []))
            self._rehearsed |= answer
        if self._skipped or not self._rehearsed:
            return {"checked": False, "reason": self._skipped or self._not_run}
        return self._rehearsed | ({"not_run": self._not_run} if self._not_run else {})

    def _start(self, function: str, request: dict[str, Any]) -> None:
        assert self._service is not None
        self._service.start(f"{_HERE}.{function}", request)

    def _result(self, *, running: bool = False) -> dict[str, Any]:
        """The answer to the last request; empty where there is none, and then nothing more is asked."""
        if self._skipped or self._service is None:
            return {}
        try:
            answer = self._service.result(TIMEOUT_SECONDS)
        except ChildFailedError as error:
            if running and error.status is not None and error.status < 0 and error.status != -signal.SIGKILL:
                name = signal.Signals(-error.status).name
                self._refuse([f"it crashes as a forward pass is computed ({name})"])
            took = f"transformers took over {TIMEOUT_SECONDS} s"
            self._skip(took if error.status is None else f"the check ended with status {error.status}")
            return {}
        if not answer.get("checked", True):
            self._skip(str(answer["reason"]))
            return {}
        return answer

    def _skip(self, reason: str) -> None:
        self._skipped, self._rehearsed = reason, {}

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise InputError(
                f"transformers {self._rehearsed.get('transformers', '')} would not run the result: "
                f"{'; '.join(problems[:4])}.".replace("transformers  ", "transformers "),
                hint=f"--skip the layers it names, choose another --scheme such as {self._other}, or --target vllm if "
                "that is meant.",
            )

    def _survey_request(self, plan: Plan) -> dict[str, Any]:
        coded = {
            layer.info.name: {
                "role": layer.role,
                "packed": plan.format == "compressed-tensors" and layer.scheme.inputs is None,
                "inputs": layer.scheme.inputs is not None,
            }
            for layer in plan.layers
            if layer.has_codes and layer.scheme
        }
        return {
            "folder": str(self._checkpoint.folder),
            "tensors": {layer.info.name: layer.info.shape for layer in plan.layers if not layer.dropped},
            "coded": coded,
            "format": plan.format,
            "dtype": TORCH_NAMES[plan.dtype],
        }

    def _reason_not_to_run(self, plan: Plan, layout: Layout) -> str | None:
        """Why the artifact is not run, or None; empty where no layer has codes, and nothing is to be proven by that."""
        if not any(layer.has_codes for layer in plan.layers):
            return ""
        if self._verify == "codes":
            return "--verify codes"
        # Codes are unpacked as the first input comes, and a layer is decoded in float32 beside that.
        size = {"F32": 4, "F64": 8}.get(plan.dtype, 2)
        values = sum(layer.info.numel for layer in plan.layers) * size
        needed = layout.nbytes + (0 if plan.format == "bitsandbytes" else values)
        needed += 12 * max((prod(layer.matrix_shape) for layer in plan.layers if layer.has_codes), default=0)
        limit = min(free_memory_bytes() // 2, self._limit or needed)
        if self._verify is None and needed > limit:
            return f"loaded, it takes {format_bytes(needed)}, and half of the free memory is {format_bytes(limit)}"
        return None


def _free(made: Mapping[str, Mapping[str, Any]], checkpoint: Checkpoint, rules: Rules) -> dict[str, Mapping[str, Any]]:
    """Those tensors that may be stored as the library holds them: made of others of one dtype, which no rule names."""
    stored = {info.name: info for info in checkpoint.infos()}
    free = {}
    for name, how in made.items():
        sources = [stored[source] for source in how["sources"]]
        named = any(rules.first(source.name) for source in sources)
        if not named and len({source.dtype for source in sources}) == 1 and not any(each.shares for each in sources):
            free[name] = how
    return free


def _needs_values(plan: Plan) -> bool:
    """Whether shapes do not tell: settings that are tensors, and packed experts, unpacked where they are joined."""
    return plan.format == "bitsandbytes" or any(
        layer.role == "expert" and layer.has_codes and layer.scheme and layer.scheme.weights.bits == 4
        for layer in plan.layers
    )


def _reason_to_skip(plan: Plan, checkpoint: Checkpoint) -> str | None:
    if not any(layer.has_codes for layer in plan.layers) and not isinstance(checkpoint, DecodedCheckpoint):
        return "names and shapes are those of the original"
    if plan.recipe.runtime[0] not in (None, "transformers"):
        return f"the target is {plan.recipe.target}"
    if "model_type" not in (checkpoint.config or {}):
        return "config.json names no model type"
    for package in filter(None, ("transformers", _NEEDS.get(plan.format))):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def load_names(request: dict[str, str]) -> dict[str, Any]:
    """In the child: load headers on the meta device, and where that is not clean those of the original too."""
    _, answer = load(request["artifact"], request["original"], "meta")
    return answer


def load(artifact: str, original: str, device: str | None, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """In the child: the loaded artifact, and what transformers found wrong with it that is right in the original."""
    import transformers

    answer: dict[str, Any] = {"checked": True, "transformers": transformers.__version__}
    problems: list[str] = []
    model, after = None, None
    try:
        model, after = _loading_info(artifact, device, dtype)
        answer["class"] = type(model).__name__
    except Exception as error:
        problems = [first_line(error)]
    if after is None or any(after[kind] for kind in _KINDS):
        try:
            _, before = _loading_info(original, "meta")
        except Exception as error:
            if problems and section_of(load_json(Path(original) / "config.json")):
                # The original is quantized in a way that this installation does not load: that excuses nothing.
                return None, answer | {"problems": problems}
            reason = f"transformers {transformers.__version__} does not load the original: {first_line(error)}"
            return None, {"checked": False, "reason": reason}
        for kind in _KINDS:
            new = sorted(after[kind] - before[kind]) if after else []
            problems += [f"{kind.replace('_', ' ')}: {', '.join(new[:3])}"] if new else []
    return model, answer | {"problems": problems}


def _loading_info(folder: str, device: str | None, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    loader = named or transformers.AutoModel
    options = {"device_map": device} if device else {}
    options |= {"dtype": dtype} if dtype else {}
    model, info = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    return model, {kind: {_name(entry) for entry in info.get(kind, ())} for kind in _KINDS}


def _name(entry: Any) -> str:
    """A key, or the name in front of two shapes that do not fit."""
    return entry if isinstance(entry, str) else str(entry[0])
