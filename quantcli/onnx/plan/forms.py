"""The forms that a weight can take in a graph: one module of `quantcli.onnx.rewrite` each, under its name here.

The table stands with the plan, which asks a form what it supports; it imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

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
    "recurrent": "quantcli.onnx.rewrite.recurrent",
    "nbits": "quantcli.onnx.rewrite.nbits",
    "expanded": "quantcli.onnx.rewrite.expanded",
    "stored": "quantcli.onnx.rewrite.stored",
    "cast": "quantcli.onnx.rewrite.cast",
}


@dataclass(frozen=True)
class Form:
    """What a form's module calls ``FORM``.

    - ``mode``: its name in manifests; layers of one mode are rewritten together.
    - ``takes``: whether it is a form for schemes of this kind.
    - ``supports``: why a layer cannot take it with such a scheme, or None. No weight is read.
    - ``rewriter``: given all the layers of a graph that take it, what rewrites one after the other in graph order.
    - ``opset``: the operator set that a planned layer is written in; 0: any.
    - ``substitute``: the scheme that a layer gets in place of one the form has not, and why; None: it gets its own.
    """

    mode: str
    takes: Callable[[Scheme], bool]
    supports: Callable[[NodePlan, Scheme], str | None]
    rewriter: Callable[[ir.Model, Sequence[NodePlan], Evidence], Callable[[NodePlan], LayerOutcome]]
    opset: Callable[[NodePlan], int] = lambda layer: 0
    substitute: Callable[[NodePlan, Scheme], tuple[Scheme, str] | None] = lambda layer, scheme: None


def form(name: str) -> Form:
    """The form of this name."""
    return cast(Form, lookup(FORMS, "ONNX form", name).FORM)


def form_of(layer: NodePlan, scheme: Scheme) -> tuple[str | None, str]:
    """The name of the first form that supports a layer with a scheme; or None, and the first one's reason."""
    reasons = []
    for name in FORMS:
        if form(name).takes(scheme):
            reason = form(name).supports(layer, scheme)
            if reason is None:
                return name, ""
            reasons.append(reason)
    return None, next(iter(reasons), f"no form of it has {scheme}")
