"""A decoder as an ONNX graph, block by block: one graph for the prompt and for each next token.

Attention is GroupQueryAttention with the rotary embedding inside, products are MatMulNBits and lookups
GatherBlockQuantized where weights are codes (all of domain com.microsoft, in onnxruntime's docs/ContribOperators.md).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantcli.core.ports import CACHE_INPUT, CACHE_OUTPUT
from quantcli.export.decoder.architecture import Decoder
from quantcli.export.decoder.nodes import Nodes, Table
from quantcli.export.decoder.rotary import rotary_tables, table_rows
from quantcli.export.decoder.weights import DecoderWeights, Matrix
from quantcli.system.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

#: What every runtime of language models knows inputs and outputs by.
PAST, PRESENT = f"{CACHE_INPUT}{{}}.{{}}", f"{CACHE_OUTPUT}{{}}.{{}}"

_OPSET, _IR_VERSION = 21, 10

#: A head of more bytes is made of so many products. Kernels of MatMulNBits keep a copy of their weights in an order of
#: their own, and the runtime holds weight and copy of one node at a time: of a whole head, which may be a third of a
#: small model, that would be the peak. Each product costs time as well: four took 3% of a step more than two.
LARGE_HEAD_BYTES, HEAD_PARTS = 4 << 20, 2


def build_decoder(
    decoder: Decoder,
    weights: DecoderWeights,
    folder: Path,
    target: Path,
    *,
    data: str,
    accuracy_level: int,
    fill_head: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write a decoder's graph, and its weights in a file beside it; each weight is read and written once.

    Args:
        decoder: its dimensions.
        weights: where its weights come from.
        folder: whose configuration tells its rotary embedding.
        target: the file to write.
        data: the name of the file of weights.
        accuracy_level: what MatMulNBits may round its inputs to: 0 for nothing, 4 for int8.
        fill_head: whether a head with one scale for a row may be filled up to blocks that its kernel is faster with.
        progress: called with blocks done and blocks in all.

    Returns:
        How many tensors the file of weights holds; all were read back.

    Raises:
        InputError: a weight is missing, or of a kind that the graph does not hold.
        VerificationError: what was read back is not what was written.
    """
    import onnx_ir as ir

    nodes = Nodes(target.with_name(data), accuracy_level)
    try:
        graph = _Builder(decoder, weights, nodes, folder, fill_head=fill_head).graph(progress)
    finally:
        nodes.data.close()
    ir.save(ir.Model(graph, ir_version=_IR_VERSION, producer_name="quantcli"), target)
    return nodes.data.read_back()


class _Builder:
    """Holds what the parts of a graph share."""

    def __init__(
        self, decoder: Decoder, weights: DecoderWeights, nodes: Nodes, folder: Path, *, fill_head: bool
    ) -> None:
        self.decoder, self.weights, self.nodes, self.folder, self.fill_head = decoder, weights, nodes, folder, fill_head
        self.architecture = decoder.architecture
        self.tables: dict[str | None, tuple[ir.Value, ir.Value]] = {}

    def graph(self, progress: Progress | None) -> ir.Graph:
        import onnx_ir as ir

        decoder, nodes = self.decoder, self.nodes
        ids = nodes.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = nodes.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        inputs, outputs = [ids, mask], list[ir.Value]()
        lengths = self._lengths(mask)
        short = decoder.short_context
        positions = None if short is None else table_rows(nodes, ids, *lengths, short)
        residual, table = self._embedded(ids)
        added: ir.Value | None = None
        for layer, kind in enumerate(decoder.rotary):
            shape = ("batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_dim)
            past = [nodes.input(PAST.format(layer, part), ir.DataType.FLOAT, shape) for part in ("key", "value")]
            normed, residual = self._norm(f"model.layers.{layer}.input_layernorm", residual, added)
            attended, *present = self._attention(layer, kind, normed, [*past, *lengths], positions)
            after = "post_feedforward" if self.architecture.sandwich else "post_attention"
            if self.architecture.sandwich:
                attended, _ = self._norm(f"model.layers.{layer}.post_attention_layernorm", attended, None)
                after = "pre_feedforward"
            normed, residual = self._norm(f"model.layers.{layer}.{after}_layernorm", residual, attended)
            added = self._feed_forward(layer, normed)
            if self.architecture.sandwich:
                added, _ = self._norm(f"model.layers.{layer}.post_feedforward_layernorm", added, None)
            inputs += past
            outputs += present
            if progress:
                progress(layer + 1, decoder.layers)
        normed, _ = self._norm("model.norm", residual, added)
        logits = self._logits(normed, table)
        return ir.Graph(
            inputs, [logits, *outputs], nodes=nodes.all, initializers=nodes.initializers,
            opset_imports={"": _OPSET, "com.microsoft": 1}, name="decoder",
        )  # fmt: skip

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention is told of lengths, int32: of each row less one, and with the cache in all."""
        import onnx_ir as ir

        nodes = self.nodes
        one = nodes.constant("one", np.array([1], np.int64))
        total = nodes.add("ReduceSum", [mask, one], "lengths.sum", keepdims=0)
        last = nodes.add("Sub", [total, one], "lengths.last")
        rows = nodes.add("Cast", [last], "lengths.rows", to=ir.DataType.INT32.value)
        shape = nodes.add("Shape", [mask], "lengths.shape")
        index = nodes.constant("axis", np.array(1, np.int64))
        length = nodes.add("Gather", [shape, index], "lengths.gather", axis=0)
        return rows, nodes.add("Cast", [length], "lengths.all", to=ir.DataType.INT32.value)

    def _embedded(self, ids: ir.Value) -> tuple[ir.Value, Table]:
        """Embeddings of tokens, and their table."""
        nodes, name = self.nodes, "model.embed_tokens"
        table = nodes.table(name, self.weights.matrix(f"{name}.weight", fill=self.fill_head and self.decoder.tied))
        found = nodes.lookup(name, table, ids)
        if self.decoder.embedding_scale != 1.0:
            factor = nodes.constant(f"{name}.scale", np.array(self.decoder.embedding_scale, np.float32))
            found = nodes.add("Mul", [found, factor], f"{name}.scaled")
        return found, table

    def _norm(self, name: str, value: ir.Value, added: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """A value, with another added to it if there is one, normalized; and the sum itself."""
        nodes, epsilon = self.nodes, self.decoder.epsilon
        weight = nodes.weight(f"{name}.weight", self._scales(name))
        if added is None:
            normed = nodes.add("SimplifiedLayerNormalization", [value, weight], name, axis=-1, epsilon=epsilon,
                               stash_type=1)  # fmt: skip
            return normed, value
        normed, _, _, total = nodes.add_many(
            "SkipSimplifiedLayerNormalization", [value, added, weight], name, 4, domain="com.microsoft",
            epsilon=epsilon, unused=(1, 2),
        )  # fmt: skip
        return normed, total

    def _scales(self, name: str) -> np.ndarray:
        scales = self.weights.vector(f"{name}.weight")
        return np.asarray(scales + self.architecture.norm_offset, np.float32)

    def _linear(self, names: list[str], value: ir.Value) -> list[ir.Value]:
        """Products of one value with several weights: one where they are joined. Biases, if any, are added."""
        matrices = self.weights.joined([f"{name}.weight" for name in names])
        joined = len(matrices) == 1 and len(names) > 1
        shown = [_joined_name(names)] if joined else names
        parts = [names] if joined else [[name] for name in names]
        return [
            self._product(name, value, matrix, own) for name, matrix, own in zip(shown, matrices, parts, strict=True)
        ]

    def _product(self, name: str, value: ir.Value, matrix: Matrix, parts: list[str]) -> ir.Value:
        return self._with_bias(name, self.nodes.product(name, matrix, value), parts)

    def _with_bias(self, name: str, product: ir.Value, parts: list[str]) -> ir.Value:
        """A product, with the biases of its parts added to it if there are any."""
        if not any(self.weights.has(f"{part}.bias") for part in parts):
            return product
        bias = np.concatenate([self.weights.vector(f"{part}.bias") for part in parts])
        return self.nodes.add("Add", [product, self.nodes.weight(f"{name}.bias", bias)], f"{name}.add")

    def _attention(
        self, layer: int, kind: str | None, value: ir.Value, past: list[ir.Value], positions: ir.Value | None
    ) -> list[ir.Value]:
        """What a block's attention returns, and the keys and values of all tokens so far.

        ``past`` are those of the tokens before, and the lengths; ``positions`` are rows of the tables of the rotary
        embedding, where these are not the tokens' own positions.
        """
        decoder, nodes, name = self.decoder, self.nodes, f"model.layers.{layer}.self_attn"
        made = self._linear([f"{name}.{part}" for part in self.architecture.qkv], value)
        if self.architecture.qk_norm:
            made = self._normed_heads(name, made)
        queries = [*made, *[None] * (3 - len(made))]
        rotary = [*self._rotary(kind), *([] if positions is None else [positions])]
        attention = nodes.add_many(
            "GroupQueryAttention", [*queries, *past, *rotary], name, 3, domain="com.microsoft", num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads, scale=float(decoder.scale), softcap=float(decoder.softcap),
            local_window_size=decoder.windows[layer], do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        for part, present in zip(("key", "value"), attention[1:], strict=True):
            shape = ("batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_dim)
            nodes.output(present, PRESENT.format(layer, part), shape)
        (projected,) = self._linear([f"{name}.o_proj"], attention[0])
        return [projected, *attention[1:]]

    def _normed_heads(self, name: str, made: list[ir.Value]) -> list[ir.Value]:
        """Queries, keys and values, of which the first two are normalized head by head."""
        decoder, nodes = self.decoder, self.nodes
        sizes = [decoder.heads * decoder.head_dim] + [decoder.kv_heads * decoder.head_dim] * 2
        if len(made) == 1:
            split = nodes.constant("qkv_sizes", np.array(sizes, np.int64))
            made = nodes.add_many("Split", [made[0], split], f"{name}.split", 3, axis=-1)
        by_head = nodes.constant("by_head", np.array([0, -1, decoder.head_dim], np.int64))
        found = []
        for part, value, size in zip(("q_norm", "k_norm"), made[:2], sizes[:2], strict=True):
            flat = nodes.constant(f"flat_{size}", np.array([0, -1, size], np.int64))
            heads = nodes.add("Reshape", [value, by_head], f"{name}.{part}.by_head")
            normed, _ = self._norm(f"{name}.{part}", heads, None)
            found.append(nodes.add("Reshape", [normed, flat], f"{name}.{part}.flat"))
        return [*found, made[2]]

    def _rotary(self, kind: str | None) -> tuple[ir.Value, ir.Value]:
        """The tables of a kind of rotary embedding, which blocks share; those of short texts come before the others."""
        if kind not in self.tables:
            lengths = [length for length in (self.decoder.short_context, self.decoder.context) if length]
            halves = [rotary_tables(self._rotary_module, kind, length) for length in lengths]
            tables = [np.concatenate(tables) for tables in zip(*halves, strict=True)]
            suffix = "" if kind is None else f"_{kind}"
            cosines, sines = (
                self.nodes.weight(f"{name}{suffix}", table)
                for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True)
            )
            self.tables[kind] = cosines, sines
        return self.tables[kind]

    @cached_property
    def _rotary_module(self) -> nn.Module:
        from quantcli.models.hugging_face import rotary_module

        return rotary_module(self.folder)

    def _feed_forward(self, layer: int, value: ir.Value) -> ir.Value:
        nodes, name = self.nodes, f"model.layers.{layer}.mlp"
        gate, up = self._gate_and_up(name, value)
        if self.decoder.activation == "silu":
            active = nodes.add("QuickGelu", [gate], f"{name}.act", domain="com.microsoft", alpha=1.0)
        else:
            active = nodes.add("FastGelu", [gate], f"{name}.act", domain="com.microsoft")
        gated = nodes.add("Mul", [active, up], f"{name}.gated")
        (down,) = self._linear([f"{name}.down_proj"], gated)
        return down

    def _gate_and_up(self, name: str, value: ir.Value) -> list[ir.Value]:
        parts = [f"{name}.{part}" for part in self.architecture.gate_up]
        if len(parts) == 1:
            matrix = self.weights.matrix(f"{parts[0]}.weight")
            half = matrix.shape[0] // 2
            halves = [
                matrix.rows(start, start + half) if not isinstance(matrix, np.ndarray) else matrix[start : start + half]
                for start in (0, half)
            ]
            return [
                self.nodes.product(f"{name}.{part}", own, value)
                for part, own in zip(("gate_proj", "up_proj"), halves, strict=True)
            ]
        return [self._product(part, value, self.weights.matrix(f"{part}.weight"), [part]) for part in parts]

    def _logits(self, value: ir.Value, table: Table) -> ir.Value:
        decoder, nodes = self.decoder, self.nodes
        if not decoder.tied:
            table = nodes.table("lm_head", self.weights.matrix("lm_head.weight", fill=self.fill_head))
        large = table.nbytes > LARGE_HEAD_BYTES and table.blocks is not None
        logits = nodes.product_with("lm_head", table, value, HEAD_PARTS if large else 1)
        if not decoder.tied:
            logits = self._with_bias("lm_head", logits, ["lm_head"])
        if decoder.final_softcap:
            cap = nodes.constant("softcap", np.array(decoder.final_softcap, np.float32))
            flat = nodes.add("Tanh", [nodes.add("Div", [logits, cap], "lm_head.divided")], "lm_head.tanh")
            logits = nodes.add("Mul", [flat, cap], "lm_head.capped")
        return nodes.output(logits, "logits", ["batch_size", "sequence_length", decoder.vocabulary])


def _joined_name(names: list[str]) -> str:
    """What modules of one parent are called together: ``model.layers.0.self_attn.qkv_proj``."""
    parent = names[0].rpartition(".")[0]
    return f"{parent}.qkv_proj"
