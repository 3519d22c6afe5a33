"""GPTQ: round one column after the other, and let the columns still to come make up for each error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
arXiv:2210.17323. With inputs x and H the sum of x x^T, the layer's squared output error is tr(D H D^T), D the
change of the weight. Columns go in order of falling H_jj (activation order), since what is rounded early is
compensated best; scales are chosen beforehand from the columns as they lie in the file (static groups), so
that the order costs nothing at run time.

The weight is worked on transposed: a column of it is then contiguous, which makes the loop five times faster.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from quantcli.algorithms import mse, rtn
from quantcli.algorithms.base import AlgorithmOptions, BlockLayers, by_rows
from quantcli.core.numerics import multiples, quantize
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, RoundedTensor, Rounding

NEEDS = frozenset({"gram"})

#: Columns whose updates are gathered before the rest of the weight sees them, in two levels: within the larger
#: block, the rest of it sees those of a smaller one.
BLOCK_COLUMNS, INNER_COLUMNS = 128, 16
#: Columns of H that are summed up at a time.
HESSIAN_COLUMNS = 192
#: Rows worked on at a time: a small block of columns then fits a core's cache.
CHUNK_ROWS = 4096
#: Columns of a triangular matrix inverted at a time, and elements of a vector turned round at a time.
_INVERTED_COLUMNS, _REVERSED_AT_ONCE = 512, 1 << 20
#: Damping is multiplied by this where H cannot be factored, and given up above the limit.
DAMPING_FACTOR, MAX_DAMPING = 10.0, 10.0


@dataclass
class Solved:
    """A quantized weight, and what it took.

    ``damping`` is the fraction of H's mean diagonal that was added to it, or None where H could not be
    factored and the weight was quantized without it. ``dead`` counts the inputs that were always zero.
    """

    tensor: QuantizedTensor
    damping: float | None
    dead: int


def supports(number_format: NumberFormat) -> str | None:
    """None: any grid will do, even or not, since only its errors are made up for."""
    return None


def add_hessian(total: Tensor, inputs: Tensor) -> None:
    """Add the inputs' x x^T, summed over tokens, to ``total`` ``[columns, columns]``; inputs ``[..., columns]``."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).to(total.dtype)
    # What is above the diagonal is below it, too: nearly half of the work.
    for start in range(0, len(total), HESSIAN_COLUMNS):
        stop = start + HESSIAN_COLUMNS
        total[start:, start:stop].addmm_(tokens[:, start:].T, tokens[:, start:stop])
        total[start:stop, stop:] = total[stop:, start:stop].T


def run(
    weight: Tensor,
    number_format: NumberFormat,
    scale_dtype: torch.dtype,
    *,
    hessian: Tensor,
    damping: float = 0.01,
    grid: QuantizedTensor | None = None,
) -> Solved:
    """Quantize ``weight``, float32 ``[rows, columns]``.

    Args:
        weight: the weight; it is not changed.
        number_format: integer, symmetric or not, or nf4 in groups of a row.
        scale_dtype: what scales are rounded to before codes are chosen.
        hessian: float32 ``[columns, columns]``, the sum of x x^T over the calibration tokens; it is not changed.
        damping: what is added to its diagonal, as a fraction of the diagonal's mean; more where it is singular.
        grid: the weight as it is without compensation, where scales are chosen elsewhere; by default `initial`.
    """
    diagonal = hessian.diagonal()
    dead = int((diagonal == 0).sum())
    order = torch.argsort(diagonal, descending=True, stable=True)
    factored = _factor(hessian, order, damping) if dead < len(order) else None
    if factored is None:
        return Solved(grid or uncompensated(weight, number_format, scale_dtype), None, dead)
    base = grid or initial(weight, number_format, scale_dtype)
    inverse_root, damping = factored
    scale = base.scale.expand(len(weight), -1)
    zero_point = None if base.zero_point is None else base.zero_point.expand(len(weight), -1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        part = weight[rows].T[order]
        offset = None if zero_point is None else zero_point[rows].T
        chosen = _solve(part, scale[rows].T, offset, order, number_format, inverse_root)
        codes[rows, order] = chosen.T
    return Solved(
        QuantizedTensor(codes, base.scale, base.zero_point, tuple(weight.shape), number_format), damping, dead
    )


def initial(weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Where the scales come from: clip search for int4, the full range for int8 and nf4."""
    return by_rows(mse.clipped if number_format.dtype == "int4" else rtn.run, weight, number_format, scale_dtype)


def uncompensated(weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """What takes its place where its matrix cannot be used."""
    run = mse.run if _fallback(number_format) == "mse" else rtn.run
    return by_rows(run, weight, number_format, scale_dtype)


def _fallback(number_format: NumberFormat) -> str:
    """The name of what `uncompensated` rounds by."""
    return "mse" if number_format.dtype == "int4" else "rtn"


def _factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Upper triangular U with H^-1 = U^T U, columns in ``order``, and the damping that made it possible.

    Turned about both axes H has a lower factor L; turned back that is an upper R with H = R R^T, and U is its
    inverse: one factorization, where inverting H first would take two. All of it happens in one copy of H, which
    may be the largest matrix that there is.
    """
    mean = hessian.diagonal().mean()
    turned_order = order.flip(0)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    while damping <= MAX_DAMPING:
        matrix = hessian[turned_order.unsqueeze(1), turned_order]
        matrix.diagonal().add_(damping * mean)
        # The library works in place where columns are contiguous; by rows, its upper factor is then the lower one.
        torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, info))
        if not info.item():
            _reverse(matrix.view(-1))
            _invert_upper(matrix)
            if bool(torch.isfinite(matrix.sum())):
                return matrix, damping
        del matrix
        damping *= DAMPING_FACTOR
    return None


def _reverse(values: Tensor) -> None:
    """Turn a vector round in place. The rows of a matrix, one after the other, make it turn about both axes."""
    count = len(values)
    for start in range(0, count // 2, _REVERSED_AT_ONCE):
        stop = min(start + _REVERSED_AT_ONCE, count // 2)
        front, back = values[start:stop], values[count - stop : count - start]
        saved = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(saved)


def _invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in place, some columns at a time."""
    for start in range(0, len(matrix), _INVERTED_COLUMNS):
        columns = slice(start, start + _INVERTED_COLUMNS)
        own, above = matrix[columns, columns], matrix[:start, columns]
        identity = torch.eye(len(own), device=matrix.device)
        inverse = torch.linalg.solve_triangular(own, identity, upper=True)
        above.copy_(matrix[:start, :start] @ above @ inverse.neg())
        own.copy_(inverse)


def _solve(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    order: Tensor,
    number_format: NumberFormat,
    inverse_root: Tensor,
) -> Tensor:
    """Codes int8 ``[columns, rows]`` of a transposed weight whose columns are in ``order``; it is changed.

    ``scale`` and ``zero_point`` are ``[groups, rows]``; ``order`` tells which group a column is in.
    """
    columns = len(weight)
    group = (order // (columns // len(scale))).tolist()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        errors = weight.new_empty(stop - start, weight.shape[1])
        for inner in range(start, stop, INNER_COLUMNS):
            end = min(inner + INNER_COLUMNS, stop)
            for column in range(inner, end):
                values = weight[column]
                step, offset = scale[group[column]], None if zero_point is None else zero_point[group[column]]
                chosen = quantize(values.unsqueeze(-1), step, offset, number_format).squeeze(-1)
                codes[column] = chosen
                rounded = multiples(chosen, offset, number_format)
                error = torch.addcmul(values, rounded, step, value=-1) / inverse_root[column, column]
                errors[column - start] = error
                weight[column + 1 : end].addr_(inverse_root[column, column + 1 : end], error, alpha=-1)
            own = errors[inner - start : end - start]
            weight[end:stop].addmm_(inverse_root[inner:end, end:stop].T, own, alpha=-1)
        weight[stop:].addmm_(inverse_root[start:stop, stop:].T, errors, alpha=-1)
    return codes


def round_layers(layers: BlockLayers, options: Options) -> dict[str, RoundedTensor]:
    """Layers that share an input share a Hessian, and are solved as one matrix: rows do not depend on each other."""
    weights, stats = layers.weights, layers.stats
    groups: dict[tuple[int, str, NumberFormat], list[str]] = {}
    for name, number_format in layers.formats.items():
        alone = name if number_format.granularity.kind == "tensor" else ""
        groups.setdefault((id(stats[name].gram), alone, number_format), []).append(name)
    rounded: dict[str, RoundedTensor] = {}
    # What a weight takes grows with its size times its columns.
    cost = {name: weight.numel() * weight.shape[1] for name, weight in weights.items()}
    left = Counter(id(stats[names[0]].gram) for names in groups.values())
    for (number, _, number_format), names in groups.items():
        gram = stats[names[0]].gram
        assert gram is not None
        matrix = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        solved = run(matrix, number_format, layers.scale_dtype, hessian=gram, damping=options.damping)
        left[number] -= 1
        if not left[number]:
            stats[names[0]].gram = None  # no layer needs it any more
        start = 0
        for name in names:
            rows = slice(start, start := start + len(weights[name]))
            tensor = solved.tensor.on_cpu(rows, tuple(weights[name].shape))
            rounded[name] = RoundedTensor(tensor, _told(solved, options.damping))
        layers.report(sum(cost[name] for name in rounded) / sum(cost.values()))
    return rounded


def _told(solved: Solved, damping: float) -> Rounding:
    if solved.damping is None:
        fallback = _fallback(solved.tensor.number_format)
        return Rounding(fallback, f"singular Hessian: {fallback} in place of gptq")
    note = f"damping {solved.damping:g} for a Hessian that is nearly singular" if solved.damping > damping else None
    return Rounding("gptq", note)


class Options(AlgorithmOptions):
    """``damping``: added to the Hessian's diagonal, as a fraction of its mean."""

    damping: float = Field(default=0.01, gt=0, le=1)
