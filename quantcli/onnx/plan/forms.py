"""The forms that a weight can take in a graph: one module of `quantcli.onnx.rewrite` each, under its name here.

The table stands with the plan, which asks a form what it supports; it imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from quantcli.core.scheme import Scheme
from quantcli.system.text import lookup

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.onnx.plan.evidence import Evidence
    from quantcli.onnx.plan.plan import LayerOutcome, NodePlan

#: In the order in which they are tried for a layer, and in which a graph is rewritten.
FORMS = {
    "static": "quantcli.onnx.rewrite.qdq",
    "dynamic": "quantcli.onnx.rewrite.dynamic",
    "nbits": "quantcli.onnx.rewrite.nbits",
    "expanded": "quantcli.onnx.rewrite.expanded",
    "cast": "quantcli.onnx.rewrite.cast",
}


class Form(Protocol):
    """What a form's module holds, and perhaps a function `substitute` beside it.

    ``MODE`` is what manifests call the form; layers of one mode are rewritten together.
    """

    MODE: str

    def takes(self, scheme: Scheme) -> bool:
        """Whether this is a form for schemes of this kind."""

    def supports(self, layer: NodePlan, scheme: Scheme) -> str | None:
        """Why a layer cannot take this form with such a scheme, or None. No weight is read."""

    def opset(self, layer: NodePlan) -> int:
        """The operator set that a planned layer is written in; 0: any."""

    def rewriter(
        self, model: ir.Model, layers: Sequence[NodePlan], evidence: Evidence
    ) -> Callable[[NodePlan], LayerOutcome]:
        """What rewrites, one after the other in graph order, all the layers of a graph that take this form."""


def form(name: str) -> Form:
    """The form of this name."""
    return cast(Form, lookup(FORMS, "ONNX form", name))


def substitute(layer: NodePlan, scheme: Scheme) -> tuple[Scheme, str] | None:
    """The scheme that a layer gets in place of one that its form has not, and why; None: it gets its own."""
    of_form = getattr(form(layer.form), "substitute", None) if layer.form else None
    return of_form(layer, scheme) if of_form else None


def form_of(layer: NodePlan, scheme: Scheme) -> tuple[str | None, str | None]:
    """The name of the first form that supports a layer with a scheme; or None, and the first one's reason."""
    reasons: list[str | None] = []
    for name in FORMS:
        if form(name).takes(scheme):
            reasons.append(form(name).supports(layer, scheme))
            if reasons[-1] is None:
                return name, None
    return None, next(iter(reasons), f"no form of it has {scheme}")
