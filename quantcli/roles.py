"""What each tensor of a checkpoint is, told from names, shapes and neighbours.

Structure decides, not the model's name: an embedding has no bias, a router is the neighbour of a set
of experts, an output head has the embedding's shape, a transposed Conv1D has a bias as long as its
second dimension.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quantcli.scheme import FLOAT_DTYPES, TensorInfo

#: Roles whose tensors are weights of a layer that some format can quantize.
LAYER_ROLES = ("linear", "conv1d", "conv", "embedding", "head", "tied head", "router", "experts")

_EMBEDDING_LEAF = re.compile(r"embed|^(emb|wte|wpe|shared|relative_attention_bias)$")
#: Output heads of language models that share the embedding's weight and so are often not stored.
HEAD_NAMES = ("lm_head", "embed_out", "cls.predictions.decoder")
_HEAD_LEAF = re.compile(r"^(lm_head|embed_out)$")
_SMALLEST_EXPERT_SIDE = 32


def module_of(name: str) -> str:
    """The module a parameter belongs to: its name without the last part."""
    return name.rpartition(".")[0]


def classify(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> dict[str, str]:
    """Role of every tensor by name: one of `LAYER_ROLES`, or norm, bias, buffer, parameter, empty."""
    infos = list(infos)
    by_name = {info.name: info for info in infos}
    expert_parents = {
        info.name.split(".experts.")[0] for info in infos if ".experts." in info.name
    }
    roles = {info.name: _by_shape(info, by_name) for info in infos}
    embeddings = [by_name[name] for name, role in roles.items() if role == "embedding"]
    vocabulary = max((info.rows for info in embeddings), default=0)
    vocabulary_shapes = {info.shape for info in embeddings if info.rows == vocabulary}
    tied = bool((config or {}).get("tie_word_embeddings"))
    for info in infos:
        if roles[info.name] != "linear":
            continue
        module = module_of(info.name)
        if info.shape in vocabulary_shapes or _HEAD_LEAF.match(_leaf(module)):
            roles[info.name] = "tied head" if tied or info.shares else "head"
        elif module_of(module) in expert_parents and _leaf(module) != "experts":
            roles[info.name] = "router"
    for name in _transposed(roles, by_name):
        roles[name] = "conv1d"
    return roles


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _by_shape(info: TensorInfo, by_name: Mapping[str, TensorInfo]) -> str:
    module, _, parameter = info.name.rpartition(".")
    dimensions = len(info.shape)
    if not info.numel:
        return "empty"
    if not info.is_float:
        return "buffer"
    if parameter == "bias" or parameter.endswith("_bias"):
        return "bias"
    if dimensions == 3 and min(info.shape[1:]) >= _SMALLEST_EXPERT_SIDE and "conv" not in info.name:
        return "experts"
    if parameter != "weight":
        return "parameter"
    if dimensions == 1:
        return "norm"
    if dimensions > 2:
        return "conv"
    has_bias = f"{module}.bias" in by_name
    if dimensions == 2 and not has_bias and _EMBEDDING_LEAF.search(_leaf(module)) and not _HEAD_LEAF.match(_leaf(module)):
        return "embedding"
    return "linear" if dimensions == 2 else "parameter"


def _transposed(roles: Mapping[str, str], by_name: Mapping[str, TensorInfo]) -> list[str]:
    """Linear weights stored ``[inputs, outputs]`` (GPT-2's Conv1D).

    A bias tells the outputs. Square weights follow the non-square ones: those of the same leaf
    name first, then the model's majority.
    """
    votes: dict[str, Counter[bool]] = {}
    for name, role in roles.items():
        info, bias = by_name[name], by_name.get(f"{module_of(name)}.bias")
        if role == "linear" and bias and info.shape[0] != info.shape[1] and bias.shape[0] in info.shape:
            votes.setdefault(_leaf(module_of(name)), Counter())[bias.shape[0] == info.shape[1]] += 1
    majority = sum(votes.values(), Counter())
    if not majority[True]:
        return []
    found = []
    for name, role in roles.items():
        module = module_of(name)
        if role != "linear" or f"{module}.bias" not in by_name:
            continue
        verdict = votes.get(_leaf(module), majority)
        if verdict[True] > verdict[False]:
            found.append(name)
    return found


def quantization_of(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> str | None:
    """How a checkpoint is quantized already, or None."""
    declared = (config or {}).get("quantization_config")
    if isinstance(declared, dict):
        return str(declared.get("quant_method", "quantization_config"))
    suffixes = {
        "weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors", "qweight": "gptq or awq",
        "bitsandbytes__nf4": "bitsandbytes", "bitsandbytes__fp4": "bitsandbytes", "SCB": "bitsandbytes",
        "weight_scale_inv": "fp8",
    }  # fmt: skip
    for info in infos:
        leaf = info.name.rpartition(".")[2]
        if leaf in suffixes:
            return suffixes[leaf]
        if info.dtype.startswith("F8_"):
            return "fp8"
    return None

def original_dtype(infos: Iterable[TensorInfo]) -> str:
    """The floating-point dtype that most elements have."""
    counts = Counter[str]()
    for info in infos:
        if info.dtype in FLOAT_DTYPES:
            counts[info.dtype] += info.numel
    return counts.most_common(1)[0][0] if counts else "F32"
