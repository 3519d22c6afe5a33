"""Which decoders can be built, how they differ, and what one model's configuration makes of that.

An architecture is a record of differences from Llama. Everything that is a number comes from the configuration, as
transformers reads it; everything that is a bias comes from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from quantcli.checkpoint.config_file import read_config
from quantcli.checkpoint.hugging_face import is_causal_config
from quantcli.errors import InputError
from quantcli.system.text import listed


@dataclass(frozen=True)
class Architecture:
    """How an architecture differs from Llama.

    - ``qkv``, ``gate_up``: modules of a block whose rows make queries, keys and values, or gate and up.
    - ``norm_offset``: what is added to the weights of norms.
    - ``qk_norm``: each head's queries and keys are normalized.
    - ``sandwich``: what attention and the feed-forward part return is normalized before it is added.
    - ``scaled_embedding``: embeddings are multiplied by the root of their length.
    - ``genai_type``: what onnxruntime-genai calls it.
    """

    genai_type: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    norm_offset: float = 0.0
    qk_norm: bool = False
    sandwich: bool = False
    scaled_embedding: bool = False


#: By ``model_type``.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", qk_norm=True),
    "phi3": Architecture("phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "gemma2": Architecture("gemma2", norm_offset=1.0, sandwich=True, scaled_embedding=True),
    "gemma3_text": Architecture("gemma3_text", norm_offset=1.0, qk_norm=True, sandwich=True, scaled_embedding=True),
}

#: Activations of the feed-forward part that the graph has operators for.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

#: Kinds of rotary embeddings that tables hold: each position is turned by the same angle in every text, or with
#: longrope by another one in all texts beyond one length.
_IN_TABLES = ("default", "linear", "llama3", "yarn", "longrope")
#: Elements of a head that GroupQueryAttention turns, the first of each, are a multiple of this.
_TURNED_MULTIPLE = 16


@dataclass(frozen=True)
class Decoder:
    """One model's dimensions, as its configuration gives them.

    - ``scale``: what products of queries and keys are multiplied by. ``softcap``, ``final_softcap``: 0 where there is
      none.
    - ``windows``: of each block, how many tokens are attended to, -1 for all.
    - ``rotary``: of each block, the kind of its rotary embedding, where a model has several.
    - ``short_context``: tokens beyond which a text's positions are all turned by other angles, None where they never
      are.
    """

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    activation: str
    scale: float
    softcap: float
    final_softcap: float
    embedding_scale: float
    tied: bool
    windows: tuple[int, ...]
    rotary: tuple[str | None, ...]
    short_context: int | None = None


def why_no_decoder(folder: Path) -> str | None:
    """Why no graph with a key-value cache can be built of a folder, by its config.json alone; None where one can."""
    config = read_config(folder / "config.json")
    model_type = config.get("model_type")
    if not is_causal_config(config):
        return f"{folder} is no causal language model"
    if model_type not in ARCHITECTURES:
        return f"{model_type} is no architecture that decoders are built of, which are {listed(list(ARCHITECTURES), 9)}"
    return None


def why_not_built(folder: Path) -> str | None:
    """Why no graph of fused operators can be built of a folder, by its architecture or a setting; None where one can.

    Raises:
        InputError: transformers cannot read its config.json.
        MissingExtraError: transformers is not installed.
    """
    from quantcli.models.hugging_face import load_config

    return why_no_decoder(folder) or next(iter(_unsupported(load_config(folder))), None)


def read_decoder(folder: Path) -> Decoder:
    """A folder's decoder.

    Raises:
        InputError: it is of an architecture, or has a setting, that is not built; by name.
        MissingExtraError: transformers is not installed.
    """
    from quantcli.models.hugging_face import load_config

    reason = why_no_decoder(folder)
    if reason:
        raise refused(reason)
    config = load_config(folder)
    architecture = ARCHITECTURES[config.model_type]
    for reason in _unsupported(config):
        raise refused(f"{folder}: {reason}")
    head_dim = _head_dim(config)
    scale = (getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5
    kinds = _layer_types(config)
    by_kind = _rotary_by_kind(config)
    return Decoder(
        architecture=architecture,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        context=_context(config),
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[_activation(config)],
        scale=scale,
        softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        final_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        embedding_scale=sqrt(config.hidden_size) if architecture.scaled_embedding else 1.0,
        tied=bool(config.tie_word_embeddings),
        windows=tuple(config.sliding_window if kind == "sliding_attention" else -1 for kind in kinds),
        rotary=tuple(kind if by_kind else None for kind in kinds),
        short_context=_short_context(config),
    )


#: What is left to models without a decoder; and to those that torch does not export at all.
WITHOUT_DECODER = (
    "Without a cache, for scoring alone, -o FILE.onnx --format onnx exports it; as a checkpoint, --format "
    "compressed-tensors keeps it for transformers."
)
AS_CHECKPOINT = "As a checkpoint, --format compressed-tensors keeps it for transformers."


def refused(reason: str, hint: str = WITHOUT_DECODER) -> InputError:
    """What a wish for a decoder ends with that cannot be fulfilled."""
    return InputError(f"No decoder with a key-value cache can be built: {reason}.", hint)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: Any) -> int:
    """Tokens that a model can take. With yarn, ``max_position_embeddings`` may be left at what it was trained on."""
    lengths = [int(config.max_position_embeddings)]
    for each in _rotary_settings(config):
        # Not so with llama3, whose factor is beyond the context: Llama 3.2 has 32 for 131,072 tokens after 8192.
        if each.get("rope_type") == "yarn" and each.get("factor"):
            lengths.append(int(each["factor"] * each["original_max_position_embeddings"]))
    return max(lengths)


def _short_context(config: Any) -> int | None:
    """Tokens of the texts that longrope has its short factors for; None where no text is longer."""
    (first, *_) = _rotary_settings(config)
    if first.get("rope_type") != "longrope":
        return None
    length = int(first["original_max_position_embeddings"])
    return length if length < _context(config) else None


def _layer_types(config: Any) -> list[str]:
    """What each block attends to: ``full_attention`` or ``sliding_attention``."""
    named = getattr(config, "layer_types", None)
    if named:
        return list(named)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers


def _rotary_by_kind(config: Any) -> bool:
    """Whether blocks of different kinds have rotary embeddings of their own."""
    return any(isinstance(value, Mapping) for value in (config.rope_parameters or {}).values())


def _rotary_settings(config: Any) -> list[Mapping[str, Any]]:
    """Settings of a model's rotary embeddings: one, or one of each kind of blocks."""
    parameters = config.rope_parameters or {}
    return list(parameters.values()) if _rotary_by_kind(config) else [parameters]


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _unsupported(config: Any) -> list[str]:
    """What of a configuration has no place in the graph."""
    found = []
    for each in _rotary_settings(config):
        kind = each.get("rope_type", "default")
        if kind == "dynamic":
            found.append(f"its rotary embedding is {kind}, which turns positions by other angles at every length")
        elif kind not in _IN_TABLES:
            found.append(f"its rotary embedding is {kind}, and known are {listed(list(_IN_TABLES), 9)}")
        elif kind == "longrope" and _rotary_by_kind(config):
            found.append("its rotary embedding is longrope for some of its blocks only")
        turned = int(_head_dim(config) * each.get("partial_rotary_factor", 1.0))
        if turned % _TURNED_MULTIPLE:
            found.append(
                f"its rotary embedding turns {turned} elements of each head, and GroupQueryAttention turns a multiple "
                f"of {_TURNED_MULTIPLE}"
            )
    if _activation(config) not in ACTIVATIONS:
        found.append(f"its activation is {_activation(config)}, and known are {listed(list(ACTIVATIONS), 9)}")
    kinds = set(_layer_types(config)) - {"full_attention", "sliding_attention"}
    found += [f"its blocks attend by {kind}" for kind in sorted(kinds)]
    if getattr(config, "use_bidirectional_attention", None):
        found.append("it attends to what follows as well")
    return found
