"""What each tensor of a checkpoint is, told from names, shapes and neighbours.

Structure decides, not the model's name: an embedding has no bias, a gate beside a set of experts is a
router, an output head has the embedding's shape, a transposed Conv1D has a bias as long as its second
dimension.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from quantcli.checkpoint.config_file import section_of
from quantcli.core.dtypes import FLOAT_DTYPES, SMALL_DTYPES
from quantcli.core.tensors import TensorInfo

#: Roles whose tensors are weights of a layer that some format can quantize.
LAYER_ROLES = (
    "linear", "conv1d", "conv", "embedding", "head", "tied head", "draft", "router", "expert", "experts",
)  # fmt: skip

#: Output heads of language models that share the embedding's weight and so are often not stored.
HEAD_NAMES = (
    "lm_head", "lm_head.decoder", "lm_head.out_proj", "embed_out", "proj_out", "output_projection", "lm_loss",
    "cls.predictions.decoder", "predictions.decoder", "head.decoder", "decoder", "vocab_projector",
    "pred_layer.proj", "generator_lm_head",
)  # fmt: skip
_HEAD_LEAF = re.compile(r"lm_heads?|embed_out")
_EMBEDDING_LEAF = re.compile(
    r"embed|(^|_)embs?(_|$)|tokens?$|codebook|^(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE
)
#: What is called an embedding but multiplies: nothing looks up an image patch.
_PROJECTION_LEAF = re.compile(r"proj|patch|dense|unembed", re.IGNORECASE)
#: Embeddings of places, not of words; with few words they can be the larger ones.
_POSITION = re.compile(r"pos|wpe|type|seg", re.IGNORECASE)
#: What leads into a layer that predicts a further token (`eh_proj`, or of twice the columns), and its own head.
_DRAFT = re.compile(r"(^|\.)(eh_proj|shared_head\..+)$")
_DRAFT_LAYERS = re.compile(r"(^|[._])mtp([._]|$)|nextn")
_GATE = re.compile(r"(^|_)(gate|router)$")
_SMALLEST_EXPERT_SIDE = 32


def module_of(name: str) -> str:
    """The module a parameter belongs to: its name without the last part."""
    return name.rpartition(".")[0]


def classify(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> dict[str, str]:
    """Role of every tensor by name: one of `LAYER_ROLES`, or norm, bias, buffer, parameter, empty."""
    infos = list(infos)
    by_name = {info.name: info for info in infos}
    expert_parents = {info.name.split(".experts.")[0] for info in infos if ".experts." in info.name}
    roles = {info.name: _by_shape(info, by_name) for info in infos}
    words = [
        by_name[name]
        for name, role in roles.items()
        if role == "embedding" and not _POSITION.search(_leaf(module_of(name)))
    ]
    vocabulary = max((info.rows for info in words), default=0)
    vocabulary_shapes = {info.shape for info in words if info.rows == vocabulary}
    tied = bool((config or {}).get("tie_word_embeddings"))
    for info in infos:
        if roles[info.name] != "linear":
            continue
        module = module_of(info.name)
        if _is_draft(module, info):
            roles[info.name] = "draft"
            continue
        # A head stands alone: what is numbered belongs to a block, whatever its shape.
        like_embedding = info.shape in vocabulary_shapes and not any(map(str.isdigit, module.split(".")))
        if like_embedding or _HEAD_LEAF.fullmatch(_leaf(module)):
            roles[info.name] = "tied head" if tied or info.shares else "head"
        elif _is_router(module, expert_parents):
            roles[info.name] = "router"
        elif ".experts." in module:
            roles[info.name] = "expert"
    for name in _transposed(roles, by_name):
        roles[name] = "conv1d"
    return roles


def _leaf(module: str) -> str:
    """The last part of a module's name; a number only counts the members of a list."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")


def _is_draft(module: str, info: TensorInfo) -> bool:
    """Whether a linear module leads into, or out of, a layer of multi-token prediction.

    Such a layer reads the last hidden state and the next token's embedding side by side.
    """
    leads_in = info.columns == 2 * info.rows and _DRAFT_LAYERS.search(module) is not None
    return leads_in or _DRAFT.search(module) is not None


def _is_router(module: str, expert_parents: Container[str]) -> bool:
    """Whether a linear module, or the small network it belongs to, chooses among experts."""
    parts = module.split(".")
    gates = (".".join(parts[:i]) for i, part in enumerate(parts) if _GATE.search(part))
    return "router" in parts or any(parent in expert_parents for parent in gates)


def _by_shape(info: TensorInfo, by_name: Mapping[str, TensorInfo]) -> str:
    module, _, parameter = info.name.rpartition(".")
    if not info.numel:
        return "empty"
    if not info.is_float:
        return "buffer"
    if parameter == "bias" or parameter.endswith("_bias"):
        return "bias"
    if _is_experts(info):
        return "experts"
    if parameter in ("gamma", "beta") and len(info.shape) == 1 and "norm" in _leaf(module).lower():
        # As TensorFlow names them, and BERT's own files still do; transformers loads them as weight and bias.
        return "norm" if parameter == "gamma" else "bias"
    if parameter != "weight":
        return "parameter"
    matrix = "embedding" if _is_embedding(module, by_name) else "linear"
    return {0: "parameter", 1: "norm", 2: matrix}.get(len(info.shape), "conv")


def _is_experts(info: TensorInfo) -> bool:
    """Whether a tensor stacks the matrices of several experts."""
    if len(info.shape) != 3:
        return False
    *path, parameter = info.name.split(".")
    if any(part.endswith("experts") for part in path):
        return True
    # A convolution over time has three dimensions too, but a short kernel.
    count, *sides = info.shape
    return parameter == "weight" and count > 1 and min(sides) >= _SMALLEST_EXPERT_SIDE and "conv" not in info.name


def _is_embedding(module: str, by_name: Mapping[str, TensorInfo]) -> bool:
    """Whether the matrix of this module is looked up by row."""
    leaf = _leaf(module)
    if f"{module}.bias" in by_name or _HEAD_LEAF.fullmatch(leaf) or _PROJECTION_LEAF.search(leaf):
        return False
    return bool(_EMBEDDING_LEAF.search(leaf))


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
    transposed = []
    for name, role in roles.items():
        module = module_of(name)
        if role != "linear" or f"{module}.bias" not in by_name:
            continue
        verdict = votes.get(_leaf(module), majority)
        if verdict[True] > verdict[False]:
            transposed.append(name)
    return transposed


def quantization_of(infos: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> str | None:
    """How a checkpoint is quantized already, or None."""
    if declared := section_of(config):
        return str(declared.get("quant_method") or _method_of(declared))
    suffixes = {
        "weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors", "qweight": "gptq or awq",
        "bitsandbytes__nf4": "bitsandbytes", "bitsandbytes__fp4": "bitsandbytes", "SCB": "bitsandbytes",
        "weight_scale_inv": "fp8",
    }  # fmt: skip
    for info in infos:
        leaf = info.name.rpartition(".")[2]
        if leaf in suffixes:
            return suffixes[leaf]
        if info.dtype == "U8" and leaf.endswith("_blocks"):
            return "mxfp4"
        if info.dtype.startswith("F8_"):
            return "fp8"
        if info.dtype in SMALL_DTYPES:
            return info.dtype
    return None


def _method_of(section: Mapping[str, Any]) -> str:
    """How weights are quantized by a configuration that does not name it, as early ones did not."""
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in section else "quantization_config"


def original_dtype(infos: Iterable[TensorInfo]) -> str:
    """The floating-point dtype that most elements have."""
    counts = Counter[str]()
    for info in infos:
        if info.dtype in FLOAT_DTYPES:
            counts[info.dtype] += info.numel
    return counts.most_common(1)[0][0] if counts else "F32"
