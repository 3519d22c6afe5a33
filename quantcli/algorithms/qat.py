"""qat: let weights, scales and what surrounds them learn to live with the grid they are stored on.

Quantization-aware training (Jacob et al., arXiv:1712.05877) with learned step sizes (LSQ: Esser et al.,
arXiv:1902.08153). Forward, everything that will be quantized is rounded by `core.numerics` as it will be stored;
backward, rounding counts as having slope one, and none where a value is cut off (straight-through). A scale has the
slope that follows from that.

A weight is learned in steps of its grid, so that a learning rate means the same for all, and a scale that learns takes
its weights along. It starts in the middle of the cell of the code that was chosen for it before. Where it lay before
it was quantized can be next to the cell's edge, and then the noise of the first steps would change its code, and those
of many others with it; from the middle only those change that are told so step after step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantcli.algorithms.base import AlgorithmOptions
from quantcli.core.scheme import NumberFormat

NEEDS = frozenset({"training"})


def supports(number_format: NumberFormat) -> str | None:
    """Integer codes: a step size is what is learned."""
    return "qat learns the steps of an even grid, which nf4 is not" if number_format.dtype == "nf4" else None


class Options(AlgorithmOptions):
    """How a quantized model is trained. What is None depends on the kind of model (see `quantcli.training.loop`).

    - ``epochs`` over the data, or ``steps`` of the optimizer; ``batch_size`` samples at a time, ``accumulate`` batches
      in a step.
    - ``learning_rate``: of weights, in steps of their grid; ``scale_learning_rate``: of scales, biases and norms,
      relative to their size. Both rise over the share ``warm_up`` of all steps, and fall to zero in a cosine.
    - ``distillation`` and ``labels``: what the original model's outputs and the labels count for in the loss; or
      ``loss``, ``package.module:function`` of one's own in their place.
    - ``held_out``: the share of the data that is not trained on. The state that did best on it every
      ``evaluate_every`` steps is the one that is kept; with ``patience`` training stops after so many evaluations
      without a better one.
    - ``norms``: whether norms (and biases) are learned, too. ``mixed_precision``: bfloat16 products where the
      processor has them.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float | None = Field(default=None, gt=0)
    scale_learning_rate: float | None = Field(default=None, gt=0)
    warm_up: float = Field(default=0.1, ge=0, le=1)
    distillation: float = Field(default=1.0, ge=0)
    labels: float = Field(default=1.0, ge=0)
    loss: str | None = None
    held_out: float | None = Field(default=None, ge=0, le=0.5)
    evaluate_every: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    norms: bool = True
    mixed_precision: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> Options:
        if self.epochs and self.steps:
            raise ValueError("epochs and steps both say how long; keep one of them")
        if not self.distillation and not self.labels and not self.loss:
            raise ValueError("distillation and labels are both 0: nothing would be learned")
        return self
