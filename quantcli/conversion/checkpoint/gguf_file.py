"""A quantized model as one GGUF file: what is in it is decided before work, and written tensor by tensor after it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.gguf import architectures, settings
from quantcli.checkpoint.gguf.architectures import Architecture
from quantcli.checkpoint.gguf.checkpoint import MANIFEST_KEY, SUFFIX
from quantcli.checkpoint.gguf.header import nbytes_of, read_gguf_header
from quantcli.checkpoint.gguf.tokenizer import Vocabulary, read_vocabulary
from quantcli.checkpoint.roles import classify
from quantcli.conversion.checkpoint.layout import Layout
from quantcli.core.manifest import Manifest
from quantcli.core.tensors import TensorSpec
from quantcli.errors import InputError, MissingExtraError, UsageError, VerificationError
from quantcli.formats import gguf as form
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.recipe import NumberFormatSpec, Recipe, Rule, SchemeSpec, build_scheme
from quantcli.planning.rules import Rules

if TYPE_CHECKING:
    from torch import Tensor

#: What tables of tokens and heads are stored as where no rule says otherwise: Q8_0.
_WIDE = SchemeSpec(weights=NumberFormatSpec(dtype="int8", granularity="group", group_size=form.BLOCK))
#: Room for what a manifest gains once llama.cpp has run the file.
_RESERVE = 2048
#: GGUF's numbers of kinds of files, for people; of several types the most frequent counts.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_DTYPES = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}


def with_wide_ends(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with 8 bits for the table of tokens and the head, unless it says something of them itself."""
    if recipe.scheme is None or build_scheme(recipe.scheme).weights.is_cast:
        return recipe
    roles = classify(checkpoint.infos(), checkpoint.config)
    rules = Rules(recipe)
    whole = {info.name for info in checkpoint.infos() if info.columns % form.BLOCK == 0}
    free = (name for name, role in roles.items() if role in ("embedding", "head") and rules.first(name) is None)
    ends = [name for name in free if name in whole]
    added = [Rule(match=ends, scheme=_WIDE, group_size=form.BLOCK)] if ends else []
    return recipe.model_copy(update={"rules": [*recipe.rules, *added]})


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: its name and type there, its shape with the rows first, and what it is made of."""

    name: str
    kind: str
    layer: LayerPlan
    order: tuple[int, int] | None
    shift: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.layer.info.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return nbytes_of(self.kind, self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What will be written. Use `plan_gguf`."""

    name: str
    architecture: Architecture
    plan: Plan
    tensors: tuple[StoredTensor, ...]
    settings: Mapping[str, int | float | str]
    factors: tuple[float, ...] | None
    vocabulary: Vocabulary
    folder: Path
    title: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and of the vocabulary, about what the file will take."""
        text = sum(len(token.encode("utf-8", "surrogateescape")) + 16 for token in self.vocabulary.tokens)
        return sum(tensor.nbytes for tensor in self.tensors) + 2 * text

    def as_reported(self, layout: Layout, nbytes: int | None = None) -> Layout:
        """The layout with what tensors take in the file; ``nbytes``: of the file, where it is written."""
        taken = {tensor.layer.info.name: TensorSpec("U8", (tensor.nbytes,)) for tensor in self.tensors}
        specs = {name: {name: taken[name]} if name in taken else {} for name in layout.layer_specs}
        return replace(layout, layer_specs=specs, nbytes=self.nbytes if nbytes is None else nbytes)

    def write(self, path: Path, made: Path, manifest: Manifest) -> None:
        """Write the file from what was made of the model, one tensor in memory at a time.

        Args:
            path: the file.
            made: the folder with codes, scales and values, as the plan says.
            manifest: what the file will say of itself.
        """
        import gguf
        import numpy as np

        artifact, float32 = open_checkpoint(made), np.dtype(np.float32)
        factors = None if self.factors is None else np.asarray(self.factors, float32)
        writer = gguf.GGUFWriter(path, self.architecture.name)
        self._add_metadata(writer, manifest)
        if factors is not None:
            writer.add_tensor_info(architectures.ROPE_FACTORS, factors.shape, float32, factors.nbytes)
        for tensor in self.tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            # With a dtype that is not bytes the shape is taken as that of the values.
            writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in self.tensors:
            writer.write_tensor_data(self._stored(tensor, artifact).numpy())
        writer.close()

    def check(self, path: Path, made: Path) -> dict[str, Any]:
        """Read the file again and compare every value with what codes and scales say.

        Returns:
            What was compared, for the manifest.

        Raises:
            VerificationError: a tensor is another one than was meant.
        """
        import gguf
        import numpy as np
        import torch

        artifact, header = open_checkpoint(made), read_gguf_header(path)
        found = {tensor.name: tensor for tensor in header.tensors}
        for tensor in self.tensors:
            there = found.get(tensor.name)
            if there is None or there.shape != tensor.shape or there.kind != tensor.kind:
                raise VerificationError(f"{tensor.name} in {self.name} is not as it was planned.")
            data = np.fromfile(path, np.uint8, there.nbytes, offset=there.offset)
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            values = gguf.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[tensor.kind])
            back = architectures.original_rows(torch.from_numpy(values.copy()).reshape(tensor.shape), tensor.order)
            if not torch.equal(back.float() - tensor.shift, self._meant(tensor, artifact)):
                raise VerificationError(f"{tensor.name}: what was read back is not what was written.")
        return {"tensors": len(self.tensors), "values": "equal", "decoded_by": "gguf"}

    def finish(self, path: Path, manifest: Manifest) -> None:
        """Put what became known since into the room that the manifest has in the file."""
        at, length = _place_of_manifest(path)
        text = _text(manifest).encode()
        if len(text) > length:
            raise AssertionError(f"the manifest outgrew its room by {len(text) - length} bytes")
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(text.ljust(length))

    def _add_metadata(self, writer: Any, manifest: Manifest) -> None:
        import gguf

        writer.add_name(self.title)
        writer.add_quantization_version(2)
        kinds = [tensor.kind for tensor in self.tensors for _ in range(len(tensor.shape) > 1)]
        writer.add_file_type(_FILE_TYPES[max(dict.fromkeys(kinds), key=kinds.count)])
        for key, value in self.settings.items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{self.architecture.name}.{key}", value)
        words = self.vocabulary
        writer.add_tokenizer_model(words.model)
        writer.add_tokenizer_pre(words.pre)
        writer.add_token_list(list(words.tokens))
        writer.add_token_types(list(words.types))
        if words.scores is not None:
            writer.add_token_scores(list(words.scores))
        if words.prefix is not None:
            writer.add_add_space_prefix(words.prefix)
        special = gguf.SpecialVocab(self.folder, load_merges=words.model == "gpt2", n_vocab=len(words.tokens))
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)
        writer.add_string(MANIFEST_KEY, _text(manifest) + " " * _RESERVE)

    def _quantized(self, tensor: StoredTensor, artifact: Checkpoint) -> Any:
        from quantcli.conversion.checkpoint.writer import read_codes

        return read_codes(tensor.layer, self.plan, artifact)

    def _stored(self, tensor: StoredTensor, artifact: Checkpoint) -> Tensor:
        """A tensor as the file has it, with its rows in llama.cpp's order."""
        import torch

        if tensor.layer.has_codes:
            return _turned(form.to_blocks(self._quantized(tensor, artifact)), tensor)
        values = artifact.load(tensor.layer.info.name)
        values = values.float() + tensor.shift if tensor.kind == "F32" else values
        return _turned(values, tensor).contiguous().reshape(-1).view(torch.uint8)

    def _meant(self, tensor: StoredTensor, artifact: Checkpoint) -> Tensor:
        """Values that a tensor stands for, float32; of a shifted norm as float32 gives them back."""
        from quantcli.core import numerics

        if tensor.layer.has_codes:
            return numerics.decoded(self._quantized(tensor, artifact))
        values = artifact.load(tensor.layer.info.name).float()
        return (values + tensor.shift) - tensor.shift


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.to_json(), separators=(",", ":"), allow_nan=False)


def _turned(values: Tensor, tensor: StoredTensor) -> Tensor:
    turned: Tensor = architectures.stored_rows(values, tensor.order)
    return turned.contiguous()


def _place_of_manifest(path: Path) -> tuple[int, int]:
    """Where the manifest's text begins in a file that was just written, and the bytes it may take."""
    key = MANIFEST_KEY.encode()
    mark = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little")
    with path.open("rb") as stream:
        head = stream.read(read_gguf_header(path).data_offset)
    at = head.index(mark) + len(mark)
    return at + 8, int.from_bytes(head[at : at + 8], "little")


def plan_gguf(plan: Plan, checkpoint: Checkpoint, output: Path) -> GgufFile:
    """Decide what a GGUF file will hold, and refuse what it cannot.

    Raises:
        UsageError: the output is not named as such a file.
        InputError: the model is of a kind that is not written, or computes otherwise than llama.cpp would.
        MissingExtraError: the package gguf is not installed.
    """
    _require_package()
    if output.suffix.lower() != SUFFIX:
        raise UsageError(f"GGUF is one file, and {output} does not end in {SUFFIX}.", f"Use -o {output}{SUFFIX}")
    folder, config = checkpoint.folder, checkpoint.config
    if folder is None or config is None:
        raise InputError(f"{checkpoint.path} is a bare file; GGUF needs its folder, with config.json and tokenizer.")
    architecture = architectures.architecture_of(config, str(checkpoint.path))
    told = settings.settings_of(architecture, config)
    factors = settings.rope_factors(architecture, config)
    tensors = tuple(_tensors(plan, architecture, config))
    tables = [tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight"]
    if not tables:
        raise InputError(f"{checkpoint.path} has no table of tokens (model.embed_tokens.weight).")
    told["vocab_size"] = tables[0]
    vocabulary = read_vocabulary(folder, tables[0])
    title = _title(output.stem, architecture, vocabulary)
    return GgufFile(
        output.name,
        architecture,
        plan,
        tensors,
        told,
        None if factors is None else tuple(factors),
        vocabulary,
        folder,
        title,
    )


#: By these in a model's name llama.cpp knows tokenizers that drop spaces behind special tokens, and needs these tokens.
_PHI3_NAMES, _PHI3_TOKENS = ("phi-3", "phi3"), {"<s>", "<unk>", "<|endoftext|>"}


def _title(stem: str, architecture: Architecture, vocabulary: Vocabulary) -> str:
    """A name for the model that llama.cpp takes for no other's tokenizer."""
    named = any(name in stem.lower() for name in _PHI3_NAMES)
    meant = architecture.name == "phi3" and _PHI3_TOKENS.issubset(vocabulary.tokens)
    if meant:
        return stem if named else f"phi-3 {stem}"
    return architecture.name.replace("phi3", "phi") if named or "jina" in stem.lower() else stem


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "Writing GGUF") from error


def _tensors(plan: Plan, architecture: Architecture, config: Mapping[str, Any]) -> Iterator[StoredTensor]:
    tied = bool(config.get("tie_word_embeddings", architecture.tied))
    for layer in plan.layers:
        name = layer.info.name
        ours = architectures.gguf_name(architecture, name)
        if layer.dropped or ours is None or (ours == "output.weight" and tied):
            continue
        order = architectures.row_order(architecture, name, config)
        if order is not None and layer.info.rows != 2 * prod(order):
            raise InputError(f"{name} has {layer.info.rows} rows, and config.json tells of {2 * prod(order)}.")
        shift = architectures.norm_shift(architecture, name)
        if layer.has_codes and layer.scheme:
            kind = form.type_of(layer.scheme)
        else:
            kind = "F32" if len(layer.info.shape) == 1 else _DTYPES[layer.dtype]
        yield StoredTensor(ours, kind, layer, order, shift)
