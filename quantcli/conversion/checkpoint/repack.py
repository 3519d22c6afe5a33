"""Quantized artifacts converted without quantizing again: to another container with equal codes, or back to 16 bits.

A container change carries codes, zero points and scales over as they are. Whatever the new container cannot hold
exactly is refused before work starts, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import CodedCheckpoint, CodedWeight, open_coded
from quantcli.checkpoint.roles import classify, original_dtype
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import TensorInfo
from quantcli.errors import UsageError
from quantcli.formats.base import CodedFormat
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import Recipe
from quantcli.planning.requantization import refuse_wishes
from quantcli.planning.steps import parse_steps
from quantcli.system.parallel import in_parallel

if TYPE_CHECKING:
    from quantcli.conversion.checkpoint.writer import Output
    from quantcli.training.loop import History

    pass

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def decoded_view(checkpoint: Checkpoint) -> Checkpoint:
    """A quantized checkpoint with its weights decoded. Raises InputError where its kind is not read."""
    return DecodedCheckpoint(open_coded(checkpoint))


class Carrier:
    """A container change: its plan, and the work on the layers that are codes."""

    #: Threads to work on.
    workers = 1
    #: Codes are carried over, and not trained.
    history: History | None = None

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, *, data: bool = False) -> None:
        """Check and plan; ``data`` says whether calibration data is given.

        Raises:
            UsageError: the new container cannot hold what the old one does, or more is asked for.
            InputError: the checkpoint's kind is not read, or it is damaged.
        """
        refuse_wishes(checkpoint, recipe, data=data)
        self.coded = open_coded(checkpoint)
        self.checkpoint = DecodedCheckpoint(self.coded)
        self.plan = _Planner(self.coded, self.checkpoint, recipe).plan()

    def names(self) -> set[str]:
        """Tensors that are carried over as codes."""
        return set(self.coded.weights)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the output beside the recipe and the tensors."""
        return {"from": self.coded.form.NAME, "config": self.coded.checkpoint.config}

    def manifest(self) -> dict[str, Any]:
        """Nothing: where the codes come from is recorded for every quantized source."""
        return {}

    def run(self, output: Output) -> None:
        """Carry every layer over that is not in the output's results yet."""
        from quantcli.conversion.checkpoint.writer import place_codes

        layers = [layer for layer in self.plan.layers if layer.is_coded and layer.info.name not in output.results]
        done = count(1)

        def carry(layer: LayerPlan) -> None:
            result = place_codes(layer, self.coded.tensor(layer.info.name), self.plan, output.destinations)
            result.algorithm = layer.algorithm or ""
            output.record(layer.info.name, result)
            output.tick(next(done) / len(layers))

        in_parallel((partial(carry, layer) for layer in layers), self.workers)


class _Planner:
    """Holds what the checks share; `plan` makes them."""

    def __init__(self, coded: CodedCheckpoint, checkpoint: DecodedCheckpoint, recipe: Recipe) -> None:
        self.coded, self.checkpoint, self.recipe = coded, checkpoint, recipe
        name = recipe.format or ""
        if not hasattr(formats.output_format(name), "STORAGE"):
            raise UsageError(f"The format {name} holds no codes.", "Use --scheme bf16 to turn them into values.")
        self.form: CodedFormat = formats.coded_format(name)
        if name == coded.form.NAME:
            raise UsageError(f"The model is stored as {name} already.")
        self.roles = classify(checkpoint.infos(), checkpoint.config)

    def plan(self) -> Plan:
        """Every tensor's way; refuses what cannot be held exactly."""
        weights = self.coded.weights
        for check in (self._scheme, self._role, self._shape):
            self._refuse({name: check(weight) for name, weight in weights.items()})
        schemes = {name: weight.scheme for name, weight in weights.items()}
        reason = self.form.together(schemes.values())
        if reason:
            raise UsageError(f"One {self.form.NAME} model cannot hold what this one does: {reason}.")
        scale_dtype = self._scale_dtype()
        layers = tuple(self._layer(info, schemes.get(info.name)) for info in self.checkpoint.infos())
        algorithm = self.checkpoint.manifest.algorithm or "carried over"
        return Plan(
            layers,
            self.form.NAME,
            self.coded.scheme,
            algorithm,
            self._dtype(),
            self.recipe,
            parse_steps([]),
            scale_dtype,
        )

    def _refuse(self, reasons: Mapping[str, str | None]) -> None:
        named = {name: reason for name, reason in reasons.items() if reason}
        if named:
            name, reason = next(iter(named.items()))
            more = f" The same holds for {len(named) - 1} more." if len(named) > 1 else ""
            raise UsageError(f"{name} cannot go to {self.form.NAME} with equal codes: {reason}.{more}")

    def _scheme(self, weight: CodedWeight) -> str | None:
        return self.form.supports(weight.scheme)

    def _role(self, weight: CodedWeight) -> str | None:
        return self.form.carries(self.roles[weight.name])

    def _shape(self, weight: CodedWeight) -> str | None:
        return self.form.fits(weight.shape, weight.scheme)

    def _scale_dtype(self) -> str:
        """A dtype that the format may have and that holds all scales; refuses where there is none."""
        from quantcli.core.dtypes import torch_dtype
        from quantcli.core.numerics import code_range

        fixed = self.form.STORAGE.scale_dtype
        own = [self.coded.scale_dtype(name) for name in self.coded.weights]
        candidates = [fixed] if fixed else list(dict.fromkeys([self._dtype(), *own, "F32"]))
        inexact: dict[str, dict[str, str | None]] = {dtype: {} for dtype in candidates}
        zeros: dict[str, str | None] = {}
        for name, weight in self.coded.weights.items():
            scale, zero_point = self.coded.scales(name)
            lowest, _ = code_range(weight.scheme.weights)
            if zero_point is not None and not self.form.STORAGE.lowest_zero_point and (zero_point == lowest).any():
                zeros[name] = f"it has a zero point of 0, and {self.form.NAME} stores zero points less one"
            for dtype in candidates:
                if not bool((scale.to(torch_dtype(dtype)).float() == scale).all()):
                    inexact[dtype][name] = f"its scales are {self.coded.scale_dtype(name)}, and not exact in {dtype}"
        self._refuse(zeros)
        exact = [dtype for dtype in candidates if not inexact[dtype]]
        self._refuse({} if exact else inexact[candidates[-1]])
        return exact[0]

    def _dtype(self) -> str:
        config = self.checkpoint.config or {}
        declared = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        return declared or original_dtype(self.coded.rest)

    def _layer(self, info: TensorInfo, scheme: Scheme | None) -> LayerPlan:
        role = self.roles[info.name]
        if role == "tied head" and info.shares:
            return LayerPlan(info, role, info.dtype, reason=f"tied to {info.shares}: stored once", dropped=True)
        if scheme is None:
            return LayerPlan(info, role, info.dtype, reason="not quantized before either")
        weight = self.coded.weights[info.name]
        return LayerPlan(
            replace(info, nbytes=weight.nbytes),
            role,
            info.dtype,
            scheme,
            scheme.weights.dtype,
            self.coded.algorithm(info.name),
            by_rows=self.form.STORAGE.by_rows,
        )
