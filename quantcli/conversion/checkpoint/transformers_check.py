"""transformers, asked what it makes of an artifact: before work, of its plan, and after it, of the artifact itself.

It is asked in a process apart, on the meta device first, where neither time nor memory depends on the model's size.
`loader_survey.py` learns how the library names and uses layers; `loader_load.py` lets it load headers without values;
`loader_run.py` loads the artifact, runs it and compares its layers with our own decoding. `proof.py` says what of that
was done.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import is_diffusers
from quantcli.checkpoint.quantized import is_quantized
from quantcli.checkpoint.rearranged import RearrangedCheckpoint
from quantcli.checkpoint.split_experts import SplitExperts
from quantcli.conversion.checkpoint.layout import Layout
from quantcli.conversion.checkpoint.loader_memory import Blocks
from quantcli.conversion.checkpoint.proof import Scope, Skipped, choose_scope, described
from quantcli.core.dtypes import TORCH_NAMES
from quantcli.errors import InputError, NotProvenError
from quantcli.planning.plan import Loader, Plan
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.planning.rules import SKIPPED, Rules
from quantcli.planning.targets.serving import CHECKED as SERVING
from quantcli.planning.targets.transformers import mixtures
from quantcli.system import ranks
from quantcli.system.child import ChildFailedError, Service
from quantcli.system.files import temporary_folder
from quantcli.system.parallel import usable_cores

TIMEOUT_SECONDS = 900
#: Bytes a second of an artifact that is run, at the least.
_SLOWEST = 5 << 20
#: Packages that transformers needs to load a format.
_NEEDS = {
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}
#: The C library of Linux keeps what is freed, for the next layer: else the system clears every page of it anew.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
_HERE = "quantcli.conversion.checkpoint"


class RuntimeCheck:
    """transformers under way in a process of its own, from before the work until after it.

    ``verify``: ``run``, ``codes`` (names and shapes only), or None: run it where it fits into half of the memory that
    is free, and into ``limit``; where it does not, a few of its blocks.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, verify: str | None = None, limit: int | None = None) -> None:
        self._skipped = _reason_to_skip(plan, checkpoint)
        self._checkpoint, self._verify, self._limit = checkpoint, verify, limit
        self._answers: dict[str, Any] = {}
        self._rehearsed: dict[str, Any] = {}
        self._scope = Scope()
        self._other = "int8" if plan.format == "bitsandbytes" else "nf4"
        # Where the child imports what it needs, this process goes on.
        self._service = _service() if ranks.is_first() and not self._skipped else None
        if self._service:
            self._start("loader_survey:survey", self._survey_request(plan))

    def __enter__(self) -> RuntimeCheck:
        """Nothing more: it has begun."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and release what it holds."""
        if self._service:
            self._service.stop()

    def as_held(self, rules: Rules, *, experts_alone: bool = False) -> Checkpoint | None:
        """The checkpoint as the library holds it, where that is otherwise; None where it is as stored.

        Its experts are one by one where it fuses them and the library takes codes only so, and what the library joins
        or splits by rows is joined or split, unless ``rules`` name it or ``experts_alone`` are meant.
        """
        answer = self._result("its names were asked for")
        rearranged = {} if experts_alone else answer.get("rearranged", {})
        if made := _free(rearranged, self._checkpoint, rules):
            self._checkpoint = RearrangedCheckpoint(self._checkpoint, made)
            name, how = next(iter(made.items()))
            self._checkpoint.warnings += (
                f"{len(made)} tensors are stored as transformers holds them, such as {name} made of rows of "
                f"{how['sources'][0]}; what runs the file's own names wants --target vllm.",
            )
        single = {name: parts for name, parts in answer.get("single", {}).items() if not _skipped(name, rules)}
        if split := answer.get("split", {}) | single:
            self._checkpoint = SplitExperts(self._checkpoint, split)
        return self._checkpoint if made or split else None

    def ask(self, plan: Plan) -> None:
        """Ask again, of another plan."""
        self._start("loader_survey:survey", self._survey_request(plan))

    def survey(self) -> Loader:
        """What the library makes of names and layers; nothing where it is not asked, or has no such model.

        Raises:
            InputError: it ends without an answer.
        """
        answer = self._result("its names were asked for")
        if not answer:
            return Loader()
        if "error" in answer:
            self._skipped = Skipped(f"transformers does not make the original: {answer['error']}", foreseen=False)
            return Loader()
        self._answers = answer
        return Loader(
            answer["name"],
            answer["modules"],
            tuple(answer["absent"]),
            answer["leave"],
            answer["takes_codes"],
            frozenset(answer["unpacked"]),
            answer["fits_nf4"],
            frozenset(answer["weights_only"]),
            frozenset(answer["wide"]),
            answer["runs_narrow"],
            frozenset(answer["unknown"]),
            frozenset(answer["untied"]),
        )

    def rehearse(self, plan: Plan, layout: Layout) -> dict[str, Any]:
        """Let the library load an artifact of the plan's names and shapes, without values.

        Returns:
            What will be run of it, in the keys of `result`.

        Raises:
            InputError: it would miss or misread weights, or ends without an answer.
        """
        if not self._skipped:
            blocks = Blocks(plan, layout, self._answers["lists"], self._answers["places"])
            self._scope = choose_scope(blocks, self._verify, self._limit)
            self._refuse([refusal.reason for refusal in mixtures(plan)])
        if not self._skipped and not _needs_values(plan):
            with temporary_folder() as place:
                # Files full of holes: headers, and room that takes no space.
                for destination in layout.create_files(Path(place)).values():
                    destination.file.close()
                config = layout.config(plan, self._checkpoint.config)
                (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
                self._start("loader_load:load_names", {"artifact": place, "original": str(self._checkpoint.folder)})
                self._rehearsed = self._result("names and shapes were loaded")
            self._refuse(self._rehearsed.pop("problems", []))
        return described(self._rehearsed, self._scope, self._skipped, planned=True)

    def result(self, artifact: Path) -> dict[str, Any]:
        """What the library says of the artifact that was written, for the manifest; see `described`.

        Raises:
            InputError: it would miss or misread weights, compute something else than their codes say, or ends without
                an answer.
        """
        while self._scope.run and not self._skipped:
            try:
                self._prove(artifact)
                break
            except ChildFailedError as error:
                smaller = self._scope.smaller if error.of_memory else None
                if smaller is None:
                    raise _not_proven(error) from error
                self._scope = smaller
                self._begin_anew()
        return described(self._rehearsed, self._scope, self._skipped)

    def _begin_anew(self) -> None:
        assert self._service is not None
        self._service.stop()
        self._service = _service()

    def _prove(self, artifact: Path) -> None:
        request = {"artifact": str(artifact), "original": str(self._checkpoint.folder), "threads": usable_cores()}
        request |= {"loaded": self._answers.get("loaded", {}), "joined": self._answers.get("joined", {})}
        self._start("loader_run:prove", request | {"keep": self._scope.keep})
        assert self._service is not None
        answer = self._checked(self._service.result(_seconds(artifact)))
        self._refuse(answer.pop("problems", []))
        self._rehearsed |= answer

    def _start(self, function: str, request: dict[str, Any]) -> None:
        if self._service is not None:
            self._service.start(f"{_HERE}.{function}", request)

    def _result(self, doing: str) -> dict[str, Any]:
        """The answer to the last request; empty where the library is not asked, and then nothing more is.

        Rank 0 asks, and tells the others.

        Raises:
            InputError: it ends without one.
        """
        if self._skipped:
            return {}
        answer, self._skipped = ranks.first(lambda: (self._answer(doing), self._skipped))
        return answer

    def _answer(self, doing: str) -> dict[str, Any]:
        assert self._service is not None
        try:
            answer = self._service.result(TIMEOUT_SECONDS)
        except ChildFailedError as error:
            reason = f"transformers gave no answer as {doing}: {error.end}"
            if self._verify == "codes":
                self._skipped = Skipped(reason, foreseen=False)
                return {}
            raise InputError(f"{reason}.", "--verify codes goes on without its word.") from error
        return self._checked(answer)

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if not answer.get("checked", True):
            self._skipped = Skipped(str(answer["reason"]), foreseen=False)
            return {}
        return answer

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise InputError(
                f"transformers {self._rehearsed.get('transformers', '')} would not run the result: "
                f"{'; '.join(problems[:4])}.".replace("transformers  ", "transformers "),
                hint=f"--skip the layers it names, choose another --scheme such as {self._other}, or --target vllm if "
                "that is meant.",
            )

    def _survey_request(self, plan: Plan) -> dict[str, Any]:
        rules = Rules(plan.recipe)
        coded = {
            layer.info.name: {
                "role": layer.role,
                "asked": (rule := rules.first(layer.info.name)) is not None and rule.scheme is not None,
                "packed": plan.format == "compressed-tensors" and layer.scheme.inputs is None,
                "inputs": layer.scheme.inputs is not None,
            }
            for layer in plan.layers
            if layer.has_codes and layer.scheme
        }
        return {
            "folder": str(self._checkpoint.folder),
            "tensors": {layer.info.name: layer.info.shape for layer in plan.layers if not layer.dropped},
            "twins": [layer.info.name for layer in plan.layers if layer.info.shares],
            "coded": coded,
            "format": plan.format,
            "dtype": TORCH_NAMES[plan.dtype],
        }


def with_single_experts(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint, for vLLM and SGLang with experts one by one that the file holds fused, where that is known.

    Both load codes of experts by the names that these had when a model was published expert by expert, which are those
    that transformers stacks as it loads. Where it knows none the experts stay fused, which the targets' rules refuse.
    """
    if recipe.runtime[0] not in SERVING or recipe.scheme is None or is_quantized(checkpoint):
        return checkpoint
    plan = resolve(recipe.model_copy(update={"target": None}), checkpoint.infos(), checkpoint.config, data=None)
    left = [layer for layer in plan.layers if layer.role == "experts" and layer.reason != SKIPPED]
    if not left or plan.format != "compressed-tensors" or not any(layer.has_codes for layer in plan.layers):
        return checkpoint
    with RuntimeCheck(plan, checkpoint, "codes") as check:
        return check.as_held(Rules(recipe), experts_alone=True) or checkpoint


def _service() -> Service:
    return Service({"OMP_NUM_THREADS": str(usable_cores()), **_KEEP_MEMORY})


def _not_proven(error: ChildFailedError) -> NotProvenError:
    way = "--verify codes compares codes, names and shapes alone, and goes on with what is written already."
    if error.of_memory:
        way = f"Free memory and run the same command again, which goes on where it stopped; or {way}"
    return NotProvenError(f"transformers gave no answer as it loaded and ran the artifact: {error.end}.", way)


def _seconds(artifact: Path) -> float:
    """Time that a run may take."""
    size = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    return TIMEOUT_SECONDS + size / _SLOWEST


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


def _skipped(name: str, rules: Rules) -> bool:
    rule = rules.first(name)
    return rule is not None and rule.skip


def _needs_values(plan: Plan) -> bool:
    """Whether shapes do not tell: settings that are tensors, and packed experts, unpacked where they are joined."""
    return plan.format == "bitsandbytes" or any(
        layer.role == "expert" and layer.has_codes and layer.scheme and layer.scheme.weights.bits == 4
        for layer in plan.layers
    )


def _reason_to_skip(plan: Plan, checkpoint: Checkpoint) -> Skipped | None:
    if checkpoint.folder is None:
        return Skipped("a bare file has no runtime of its own")
    if plan.format == "gguf":
        return Skipped("llama.cpp runs GGUF")
    if not any(layer.has_codes for layer in plan.layers) and not isinstance(checkpoint, DecodedCheckpoint):
        return Skipped("names and shapes are those of the original, and no layer has codes")
    if plan.recipe.runtime[0] not in (None, "transformers"):
        return Skipped(f"the target is {plan.recipe.target}, which is not run here")
    if checkpoint.config is None:
        return Skipped("a folder without config.json has no runtime of its own")
    if is_diffusers(checkpoint.config):
        return Skipped("it is a model of diffusers, which is not run here", foreseen=False)
    if "model_type" not in checkpoint.config:
        return Skipped("config.json names no model type", foreseen=False)
    for package in filter(None, ("transformers", _NEEDS.get(plan.format))):
        if importlib.util.find_spec(package) is None:
            return Skipped(f"{package} is not installed", foreseen=False)
    return None
