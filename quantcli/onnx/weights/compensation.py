"""GPTQ on a graph's weights: codes of a layer that make up for each other's errors.

See `quantcli.algorithms.gptq` for the method. Each group of a convolution has inputs, and so a Hessian, of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.algorithms import default_rounding
from quantcli.core.tensors import Hessian, QuantizedTensor, RoundedTensor, Rounding

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def compensate(matrix: Tensor, grid: QuantizedTensor, scale_dtype: torch.dtype, hessian: Hessian) -> RoundedTensor:
    """Choose codes anew on the scales of ``grid``, a float32 ``[rows, columns]`` quantized without data.

    A Hessian of fewer columns is that of a matrix filled up with zeros. A group whose Hessian cannot be factored
    keeps the codes it has.
    """
    import torch
    from torch.nn import functional

    from quantcli.algorithms import gptq

    filled = matrix.shape[1] - hessian.values.shape[-1]
    groups = len(hessian.values)
    rows = len(matrix) // groups
    codes = grid.codes.clone()
    failed, damping = 0, hessian.damping
    for group, values in enumerate(hessian.values):
        part = slice(group * rows, (group + 1) * rows)
        own = replace(grid, codes=grid.codes[part], scale=_rows(grid.scale, part), shape=(rows, matrix.shape[1]))
        if grid.zero_point is not None:
            own.zero_point = _rows(grid.zero_point, part)
        solved = gptq.run(
            matrix[part],
            grid.number_format,
            scale_dtype,
            hessian=functional.pad(values, (0, filled, 0, filled)),
            damping=hessian.damping,
            grid=own,
        )
        codes[part] = solved.tensor.codes
        if solved.damping is not None:
            damping = max(damping, solved.damping)
        elif bool(torch.any(values.diagonal())):
            failed += 1
    if failed:
        algorithm = default_rounding(grid.number_format)
        where = "" if failed == groups else f" in {failed} of {groups} groups"
        note = f"{algorithm} in place of gptq{where}: its inputs' Hessian cannot be factored"
        rounding = Rounding(algorithm if failed == groups else "gptq", note)
    else:
        rounding = Rounding("gptq", f"gptq's damping raised to {damping:g}" if damping > hessian.damping else None)
    return RoundedTensor(replace(grid, codes=codes), rounding)


def _rows(values: Tensor, part: slice) -> Tensor:
    """Entries of some rows; a single entry is that of all."""
    return values[part] if len(values) > 1 else values
