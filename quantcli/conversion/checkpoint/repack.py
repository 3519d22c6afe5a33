"""Quantized artifacts converted without quantizing again: to another container with equal codes, or back to 16 bits.

A container change carries codes, zero points and scales over as they are. Whatever the new container cannot hold
exactly is refused before work starts, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint, decoded_checkpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint, QuantizedWeight, is_quantized, open_quantized
from quantcli.checkpoint.roles import classify, original_dtype
from quantcli.conversion.checkpoint.gguf_file import with_wide_ends
from quantcli.core.dtypes import DTYPE_OF_TORCH_NAME, NUMBER_OF_DTYPE
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import RoundedTensor, Rounding, TensorInfo
from quantcli.errors import UsageError
from quantcli.formats.base import QuantizedFormat
from quantcli.formats.gguf import exact_minimum
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import Recipe, dequantizes
from quantcli.planning.requantization import refuse_wishes
from quantcli.planning.resolve import resolve
from quantcli.planning.steps import parse_steps
from quantcli.planning.targets import for_target
from quantcli.system import ranks
from quantcli.system.parallel import in_parallel

if TYPE_CHECKING:
    from quantcli.conversion.checkpoint.writer import Output
    from quantcli.conversion.staging import Staging
    from quantcli.training.loop import History


def planned_conversion(stored: Checkpoint, recipe: Recipe, *, data: bool) -> tuple[Checkpoint, Plan, Repacking | None]:
    """What is read of a checkpoint, what becomes of it, and the work where its codes are carried over.

    Raises:
        UsageError: the recipe does not suit the checkpoint, or the target would not load the result.
        InputError: the checkpoint's kind is not read, or nothing in it can be quantized.
    """
    checkpoint: Checkpoint | None = stored
    if recipe.format == "gguf":
        recipe = with_wide_ends(recipe, decoded_checkpoint(stored) if is_quantized(stored) else stored)
    if is_quantized(stored):
        decoded = decoded_checkpoint(stored) if recipe.scheme is not None else None
        checkpoint = decoded if dequantizes(recipe) or (decoded and decoded.is_read_only) else None
    if checkpoint is not None:
        return checkpoint, for_target(resolve(recipe, checkpoint.infos(), checkpoint.config, data=data)), None
    ranks.go_on_alone("A change of container")
    work = prepare_repacking(stored, recipe, data=data)
    return work.checkpoint, for_target(work.plan), work


def prepare_repacking(checkpoint: Checkpoint, recipe: Recipe, *, data: bool = False) -> Repacking:
    """Check and plan a change of container; ``data`` says whether calibration data is given.

    Raises:
        UsageError: the new container cannot hold what the old one does, or more is asked for.
        InputError: the checkpoint's kind is not read, or it is damaged.
    """
    refuse_wishes(checkpoint, recipe, data=data)
    quantized = open_quantized(checkpoint)
    decoded = DecodedCheckpoint(quantized)
    return Repacking(_Planner(quantized, decoded, recipe).plan(), quantized, decoded)


@dataclass
class Repacking:
    """A change of container: its plan, and the work on the layers that are codes. Use `prepare_repacking`.

    ``checkpoint`` is what is read; ``history`` None: codes are carried over, and not trained.
    """

    plan: Plan
    quantized: QuantizedCheckpoint
    checkpoint: DecodedCheckpoint
    history: History | None = None

    def names(self) -> set[str]:
        """Tensors that are carried over as codes."""
        return {layer.info.name for layer in self.plan.layers if layer.has_codes}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the output beside the recipe and the tensors."""
        return {"from": self.quantized.form.NAME, "config": self.quantized.checkpoint.config}

    def manifest(self) -> dict[str, Any]:
        """Nothing: where the codes come from is recorded for every quantized source."""
        return {}

    def has_learned(self, staging: Staging) -> bool:
        """Never: nothing is learned."""
        return False

    def run(self, output: Output) -> None:
        """Carry every layer over that is not in the output's results yet."""
        layers = [layer for layer in self.plan.layers if layer.has_codes and layer.info.name not in output.results]
        done = count(1)

        def carry(layer: LayerPlan) -> None:
            from quantcli.conversion.checkpoint.writer import write_codes

            rounded = RoundedTensor(self.quantized.tensor(layer.info.name), Rounding(layer.algorithm or ""))
            output.record(layer.info.name, write_codes(layer, rounded, self.plan, output.destinations))
            output.tick(next(done) / len(layers))

        in_parallel((partial(carry, layer) for layer in layers), output.workers)


class _Planner:
    """Holds what the checks share; `plan` makes them."""

    def __init__(self, quantized: QuantizedCheckpoint, checkpoint: DecodedCheckpoint, recipe: Recipe) -> None:
        self.quantized, self.checkpoint, self.recipe = quantized, checkpoint, recipe
        name = recipe.format or ""
        if not hasattr(formats.output_format(name), "STORAGE"):
            raise UsageError(f"The format {name} holds no codes.", "Use --scheme bf16 to turn them into values.")
        self.form: QuantizedFormat = formats.quantized_format(name)
        if name == quantized.form.NAME:
            raise UsageError(f"The model is stored as {name} already.")
        self.roles = classify(checkpoint.infos(), checkpoint.config)
        #: Weights that become values, and why, of a source whose codes need not all be held.
        self._decoded: dict[str, str] = {}

    def plan(self) -> Plan:
        """Every tensor's way; refuses what cannot be held exactly."""
        weights = self.quantized.weights
        self._decoded = self._unheld()
        held = weights.keys() - self._decoded.keys()
        if not self.quantized.form.STORAGE.starts_anew or not held:
            self._refuse(self._decoded)
        schemes = {name: weights[name].scheme for name in weights if name in held}
        reason = self.form.together(schemes.values())
        if reason:
            raise UsageError(f"One {self.form.NAME} model cannot hold what this one does: {reason}.")
        scale_dtype = self._scale_dtype()
        layers = tuple(self._layer(info, schemes.get(info.name)) for info in self.checkpoint.infos())
        algorithm = self.checkpoint.manifest.algorithm or "carried over"
        return Plan(
            layers,
            self.form.NAME,
            self.quantized.scheme,
            algorithm,
            self._dtype(),
            self.recipe,
            parse_steps([]),
            scale_dtype,
        )

    def _unheld(self) -> dict[str, str]:
        """Why weights cannot be held by the new container, of those that cannot."""
        found: dict[str, str] = {}
        for check in (self._scheme, self._role, self._shape):
            for name, weight in self.quantized.weights.items():
                if reason := check(weight):
                    found.setdefault(name, reason)
        return found

    def _refuse(self, reasons: Mapping[str, str]) -> None:
        if reasons:
            name, reason = next(iter(reasons.items()))
            more = f" The same holds for {len(reasons) - 1} more." if len(reasons) > 1 else ""
            raise UsageError(
                f"{name} cannot go to {self.form.NAME} with equal codes: {reason}.{more}",
                "Start from the original weights, or turn the codes into values first (--scheme bf16).",
            )

    def _scheme(self, weight: QuantizedWeight) -> str | None:
        return self.form.supports(weight.scheme)

    def _role(self, weight: QuantizedWeight) -> str | None:
        return self.form.carries(self.roles[weight.name])

    def _shape(self, weight: QuantizedWeight) -> str | None:
        return self.form.fits(weight.shape, weight.scheme)

    def _scale_dtype(self) -> str:
        """A dtype that the format may have and that holds all scales; refuses where there is none."""
        from quantcli.core.dtypes import torch_dtype
        from quantcli.core.numerics import code_range

        fixed = self.form.STORAGE.scale_dtype
        weights = {name: each for name, each in self.quantized.weights.items() if name not in self._decoded}
        own = [self.quantized.scale_dtype(name) for name in weights]
        candidates = [fixed] if fixed else list(dict.fromkeys([self._dtype(), *own, "F32"]))
        inexact: dict[str, dict[str, str]] = {dtype: {} for dtype in candidates}
        zeros: dict[str, str] = {}
        for name, weight in weights.items():
            scale, zero_point = self.quantized.scales(name)
            lowest, _ = code_range(weight.scheme.weights)
            if zero_point is not None and not self.form.STORAGE.lowest_zero_point and (zero_point == lowest).any():
                zeros[name] = f"it has a zero point of 0, and {self.form.NAME} stores zero points less one"
            if zero_point is not None and self.form.STORAGE.coarse_scales and not exact_minimum(scale, zero_point):
                zeros[name] = "its zero points times its scales are no numbers of FP16, as Q4_1 stores them"
            for dtype in candidates:
                if not bool((scale.to(torch_dtype(dtype)).float() == scale).all()):
                    inexact[dtype][name] = (
                        f"its scales are {self.quantized.scale_dtype(name)}, and not exact in {dtype}"
                    )
        self._refuse(zeros)
        exact = [dtype for dtype in candidates if not inexact[dtype]]
        self._refuse({} if exact else inexact[candidates[-1]])
        return exact[0]

    def _dtype(self) -> str:
        config = self.checkpoint.config or {}
        declared = DTYPE_OF_TORCH_NAME.get(str(config.get("dtype") or config.get("torch_dtype")))
        return declared if declared in NUMBER_OF_DTYPE else original_dtype(self.quantized.rest)

    def _layer(self, info: TensorInfo, scheme: Scheme | None) -> LayerPlan:
        role = self.roles[info.name]
        if role == "tied head" and info.shares:
            return LayerPlan(info, role, info.dtype, reason=f"tied to {info.shares}: stored once", dropped=True)
        if info.name in self._decoded:
            return LayerPlan(info, role, info.dtype, reason=f"values of its codes: {self._decoded[info.name]}")
        if scheme is None:
            return LayerPlan(info, role, info.dtype, reason="not quantized before either")
        weight = self.quantized.weights[info.name]
        return LayerPlan(
            replace(info, nbytes=weight.nbytes),
            role,
            info.dtype,
            scheme,
            scheme.weights.dtype,
            self.quantized.algorithm(info.name),
            by_rows=self.form.STORAGE.by_rows,
        )
