"""A quantized checkpoint as ONNX: its codes and scales in MatMulNBits nodes as they are.

The model is exported with its weights decoded. A product whose matrix equals a decoded weight, value for value, gets
that weight's codes. A scale of more columns than a block of the operator has is repeated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint, QuantizedWeight
from quantcli.checkpoint.roles import classify
from quantcli.core.scheme import Granularity, Scheme
from quantcli.core.tensors import QuantizedTensor
from quantcli.errors import UsageError, VerificationError
from quantcli.onnx.plan.plan import GraphPlan, NodePlan, counted, require_work, undecided, weighted_nodes
from quantcli.planning.recipe import Recipe
from quantcli.planning.requantization import refuse_wishes
from quantcli.system.text import listed

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from quantcli.onnx.graph.operands import Operand

#: Block sizes that the kernels of MatMulNBits take: these and the powers of two between.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


class CheckpointCodes:
    """The codes of a checkpoint, for the nodes of its export."""

    def __init__(self, checkpoint: Checkpoint, quantized: QuantizedCheckpoint, recipe: Recipe) -> None:
        """Check whether n-bit nodes can hold what the checkpoint does.

        Raises:
            UsageError: they cannot, or the recipe asks for more.
        """
        refuse_wishes(checkpoint, recipe, data=False)
        self.quantized, self.recipe = quantized, recipe
        self._decoded = DecodedCheckpoint(quantized)
        self._infos = {info.name: info for info in self._decoded.infos()}
        roles = classify(self._infos.values(), self._decoded.config)
        for name, weight in quantized.weights.items():
            _refuse(name, _reason(weight, roles[name]))
        self._of: dict[str, str] = {}

    def plan(self, model: ir.Model, file: Path) -> GraphPlan:
        """What becomes of each weight of the exported graph.

        Raises:
            UsageError: a quantized weight is there, but not as a matrix that a node can hold.
            InputError: none is there.
        """
        from quantcli.onnx.graph.operands import operand_of

        names = {_key(self._values(name)): name for name in self.quantized.weights}
        nodes = []
        for node, weight in weighted_nodes(model):
            plan = undecided(model, node, weight, file)
            name = None if node.op_type == "Gather" else names.get(_key(_matrix(operand_of(node))))
            nodes.append(self._planned(plan, name) if name else plan.left("not quantized before either"))
        lacking = sorted(self.quantized.weights.keys() - self._of.values())
        for name in lacking:
            if any(constant and name.endswith(constant) for constant in model.graph.initializers):
                _refuse(name, "its export holds other values, or no plain product with them")
        warnings = counted(node.note for node in nodes)
        if lacking:
            warnings.append(f"Quantized, but no part of the export: {listed(lacking)}.")
        resolved = GraphPlan(tuple(nodes), self.quantized.scheme, self.recipe, tuple(warnings))
        require_work(resolved, file)
        return resolved

    def of(self, node: NodePlan) -> QuantizedTensor:
        """The codes of a node of the plan, with a scale for each of its blocks.

        Raises:
            VerificationError: they do not stand for the node's matrix.
        """
        import torch

        from quantcli.onnx.graph.operands import operand_of

        name = self._of[node.name]
        if not torch.equal(self._values(name), _matrix(operand_of(node.node))):
            raise VerificationError(f"The codes of {name} do not stand for the matrix of {node.node.name}.")
        assert node.scheme is not None
        return _in_blocks(self.quantized.tensor(name), node.scheme)

    def _planned(self, plan: NodePlan, name: str) -> NodePlan:
        from quantcli.onnx.plan import nbits

        weight, weights = self.quantized.weights[name], self.quantized.weights[name].scheme.weights
        block = _block(weight)
        note = None
        if block < (_group(weight) or weight.shape[1]):
            note = f"scales per {weights.granularity} repeated for blocks of {block}"
        scheme = Scheme(replace(weights, granularity=Granularity("group", block)))
        _refuse(name, nbits.supports(plan.node, scheme))
        self._of[plan.name] = name
        algorithm = self.quantized.algorithm(name) or "carried over"
        return replace(plan, form="nbits", scheme=scheme, label=weights.dtype, algorithm=algorithm, note=note)

    def _values(self, name: str) -> Tensor:
        info = self._infos[name]
        return self._decoded.read_rows(info, 0, info.rows)


def _refuse(name: str, reason: str | None) -> None:
    if reason:
        raise UsageError(
            f"{name} cannot go to ONNX with equal codes: {reason}.",
            "Use --scheme fp16 to turn the codes into values, or start from the original weights.",
        )


def _reason(weight: QuantizedWeight, role: str) -> str | None:
    """Why MatMulNBits cannot hold a weight, or None."""
    if weight.scheme.inputs is not None:
        return "its inputs are quantized as well"
    if weight.scheme.weights.dtype not in ("int4", "int8"):
        return f"it is {weight.scheme.weights.dtype}, and MatMulNBits holds integers"
    if role == "expert":
        return "experts are fused when transformers loads them"
    if not _block(weight):
        return f"no block of {_SMALLEST_BLOCK} columns or more divides its groups of {_group(weight)}"
    return None


def _group(weight: QuantizedWeight) -> int | None:
    return weight.scheme.weights.granularity.size


def _block(weight: QuantizedWeight) -> int:
    """The largest block size that each scale is whole blocks of; 0 where there is none."""
    from quantcli.onnx.plan.nbits import block_size

    group = _group(weight)
    if group is None:
        return block_size(weight.shape[1], weight.scheme.weights)
    block = min(group & -group, _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else 0


def _in_blocks(tensor: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The same codes, with the scale and zero point of every block."""
    import torch

    rows, columns = tensor.shape
    granularity, block = tensor.number_format.granularity, scheme.weights.granularity.size or columns
    groups = torch.arange(0, columns, block) // (granularity.size or columns)

    def spread(values: Tensor) -> Tensor:
        return values.expand(rows, -1)[:, groups].contiguous()

    zero_point = None if tensor.zero_point is None else spread(tensor.zero_point)
    return replace(tensor, scale=spread(tensor.scale), zero_point=zero_point, number_format=scheme.weights)


def _matrix(operand: Operand | str) -> Tensor:
    """The values of a node's matrix ``[outputs, inputs]``; none where there is none."""
    import torch

    return torch.empty(0) if isinstance(operand, str) else torch.from_numpy(operand.slab(0, operand.rows))


def _key(values: Tensor) -> tuple[Any, ...]:
    from quantcli.core.numerics import checksum

    return (*values.shape, checksum(values))
