"""What looks after an artifact with fixed ranges, once its outputs were compared: implemented in rooms above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.conversion.onnx.comparison import Comparison, OutputComparison
from quantcli.onnx.plan.evidence import Evidence
from quantcli.planning.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Attempt:
    """An artifact that was built and compared, before it is kept.

    Attributes:
        recipe: what was carried out.
        model: the model as a file.
        graph: its graph before it was rewritten; to be cloned.
        evidence: what its layers were quantized by.
        outputs: compares artifacts with the model, on the data.
        compared: what came of it for this one.
        artifact: the file.
    """

    recipe: Recipe
    model: Path
    graph: ir.Model
    evidence: Evidence
    outputs: OutputComparison
    compared: Comparison
    artifact: Path


@dataclass(frozen=True)
class Protection:
    """A recipe that leaves out what ruined the outputs; ``details`` are for the report, and so are warnings."""

    recipe: Recipe
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Guard(Protocol):
    """Looks at artifacts of static quantization."""

    def protect(self, attempt: Attempt) -> Protection | None:
        """A better recipe where a few layers ruin the outputs, or None."""

    def require_speed(self, attempt: Attempt) -> None:
        """Raise InputError where the artifact is slower than its model, clearly beyond noise."""
