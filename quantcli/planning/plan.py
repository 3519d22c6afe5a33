"""A checkpoint's plan: one decision per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli import formats
from quantcli.checkpoint.roles import HEAD_NAMES, module_of
from quantcli.core.scheme import Scheme
from quantcli.core.tensors import TensorInfo
from quantcli.formats.module_patterns import not_matched
from quantcli.planning.recipe import Recipe
from quantcli.planning.steps import Steps

if TYPE_CHECKING:
    from torch import Tensor


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """What tells a runtime how the weights are stored; None where they are only cast."""
    schemes = {module_of(layer.info.name): layer.scheme for layer in plan.layers if layer.has_codes and layer.scheme}
    if not schemes:
        return None
    left = left_linear_modules(plan)
    # What the loader calls otherwise is named twice, unless a pattern for the file's name means it as well.
    loaded = plan.loader.modules
    renamed = [loaded[name] for name in left if name in loaded] + list(plan.loader.absent)
    quantized = {loaded[name]: scheme for name, scheme in schemes.items() if name in loaded}
    unseen = not_matched(renamed, left, [*schemes, *left])
    left += unseen
    # What is quantized has to be told from what is left by its loaded name, too, and schemes from one another.
    several = len(set(schemes.values())) > 1
    distinct = set() if several else set(not_matched(quantized, left, [*schemes, *left]))
    schemes |= {name: scheme for name, scheme in quantized.items() if name not in schemes and name not in distinct}
    for name, scheme in _looked_up_experts(plan).items():
        if scheme is None:
            left.append(name)
        else:
            schemes[name] = scheme
    section = formats.quantized_format(plan.format).config(schemes, left, plan.dtype)
    experts = [layer for layer in plan.layers if layer.role == "expert"]
    if experts and not any(layer.has_codes for layer in experts) and plan.recipe.runtime[0] in (None, "transformers"):
        with_experts_left = getattr(formats.output_format(plan.format), "with_experts_left", None)
        return with_experts_left(section) if with_experts_left else section
    return section


def _looked_up_experts(plan: Plan) -> dict[str, Scheme | None]:
    """Schemes of experts by the names that serving runtimes look them up by, whatever the checkpoint calls them.

    SGLang 0.5.23 asks of each mixture what holds for the first expert's ``gate_proj``, ``up_proj`` and ``down_proj``,
    and so did vLLM for long; of those that are called otherwise (Mixtral's ``w1``) it would take what most layers have.
    """
    if plan.format != "compressed-tensors" or plan.recipe.runtime[0] not in ("vllm", "sglang"):
        return {}
    found: dict[str, Scheme | None] = {}
    for layer in plan.layers:
        expert, _, leaf = module_of(layer.info.name).rpartition(".")
        if layer.role == "expert" and leaf not in _EXPERT_PARTS:
            found |= {f"{expert}.{part}": layer.scheme if layer.has_codes else None for part in _EXPERT_PARTS}
    return found


_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
_LINEAR_ROLES = ("linear", "conv1d", "head", "tied head", "draft", "router", "expert")


@dataclass(frozen=True)
class Loader:
    """What the library that loads an artifact makes of a checkpoint, as far as it was asked; by default nothing else.

    - ``name``: the class, for messages.
    - ``modules``: modules of the file that it calls otherwise. ``absent``: linear modules that no tensor fills.
    - ``leave``: reasons, by tensor, why it would not run codes. ``unknown``: tensors that it does not load at all.
    - ``untied``: tensors that a file holds in the memory of others, and that it does not tie.
    - ``takes_codes``: whether it loads this class with codes of the format at all.
    - ``unpacked``: weights whose codes it takes only under the weight's own name; ``fits_nf4`` says whether it would
      run some of them as nf4.
    - ``weights_only``: weights that it runs only with inputs as they are.
    - ``wide``: tensors that it keeps in float32 whatever the model's dtype is.
    - ``runs_narrow``: whether its class runs in the dtype that float32 is cast to by default.
    """

    name: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    leave: Mapping[str, str] = field(default_factory=dict)
    takes_codes: bool = True
    unpacked: frozenset[str] = frozenset()
    fits_nf4: bool = True
    weights_only: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    runs_narrow: bool = True
    unknown: frozenset[str] = frozenset()
    untied: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one tensor.

    ``scheme`` None: it is left, for ``reason``, and stored as ``dtype``. ``label`` is the scheme's
    short name in tables. ``note`` tells of a choice made for a quantized layer. ``by_rows``: the format
    stores codes row by row.
    """

    info: TensorInfo
    role: str
    dtype: str
    scheme: Scheme | None = None
    label: str = ""
    algorithm: str | None = None
    reason: str | None = None
    note: str | None = None
    dropped: bool = False
    by_rows: bool = True

    def as_matrix(self, values: Tensor) -> Tensor:
        """A weight as the checkpoint holds it, as a matrix ``[outputs, inputs]``."""
        return values.T.contiguous() if self.transposed else values.reshape(self.matrix_shape)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Inverse of `as_matrix`."""
        return matrix.T.contiguous() if self.transposed else matrix.reshape(self.info.shape)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``[inputs, outputs]``."""
        return self.role == "conv1d"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape as a matrix of output rows, which is how it is quantized."""
        shape = (self.info.rows, self.info.columns)
        return (shape[1], shape[0]) if self.transposed else shape

    @property
    def has_codes(self) -> bool:
        """Whether the tensor becomes codes and scales, rather than a copy or a cast."""
        return self.scheme is not None and not self.scheme.weights.is_cast


@dataclass(frozen=True)
class Plan:
    """The whole conversion. ``dtype`` is what most leftovers are stored as, ``scale_dtype`` what scales are."""

    layers: tuple[LayerPlan, ...]
    format: str
    scheme: str
    algorithm: str
    dtype: str
    recipe: Recipe
    steps: Steps
    scale_dtype: str
    warnings: tuple[str, ...] = field(default=())
    loader: Loader = field(default_factory=Loader)

    @property
    def quantized(self) -> list[LayerPlan]:
        """Layers that get codes, or with a casting scheme a new dtype."""
        return [layer for layer in self.layers if layer.scheme is not None]


def left_linear_modules(plan: Plan) -> list[str]:
    """Modules a loader could take for quantized ones, but whose weights were left, or are not stored.

    A head that is tied to the embedding is often not in the checkpoint at all, yet it is a linear
    module of the model; it is named as the field names it.
    """
    left = [
        module_of(layer.info.name)
        for layer in plan.layers
        if not layer.has_codes and layer.info.name.endswith(".weight") and layer.role in (*_LINEAR_ROLES, "embedding")
    ]
    has_head = any(layer.role in ("head", "tied head") for layer in plan.layers)
    return left if has_head else [*left, *HEAD_NAMES]
