"""What language models are called in GGUF: names of tensors, settings, and the order of rows, in both directions.

Checked against llama.cpp's conversion (gguf 0.19) and its loader. A setting that llama.cpp computes with and has no key
for is required to be what it takes; anything else is refused by name, since it would run as another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.errors import InputError

#: Settings by their key in GGUF, below the architecture's name: the name in config.json, and whether it is a number
#: with a fraction.
_COMMON: dict[str, tuple[str, bool]] = {
    "vocab_size": ("vocab_size", False),
    "context_length": ("max_position_embeddings", False),
    "embedding_length": ("hidden_size", False),
    "block_count": ("num_hidden_layers", False),
    "feed_forward_length": ("intermediate_size", False),
    "attention.head_count": ("num_attention_heads", False),
    "attention.head_count_kv": ("num_key_value_heads", False),
    "attention.key_length": ("head_dim", False),
    "attention.value_length": ("head_dim", False),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", True),
    "rope.freq_base": ("rope_theta", True),
}
_SLIDING = {"attention.sliding_window": ("sliding_window", False)}
_CAPPED = {
    "attn_logit_softcapping": ("attn_logit_softcapping", True),
    "final_logit_softcapping": ("final_logit_softcapping", True),
}

#: Tensors outside of blocks, and those of a block, by their names in GGUF.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = {**_ATTENTION, **_GATED, "ffn_norm": "post_attention_layernorm"}
_GEMMA = {
    **_ATTENTION, **_GATED, "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PHI3 = {
    "attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

#: Tensors that files hold beside weights, and that a runtime computes by itself.
_COMPUTED = re.compile(r"(\.rotary_emb\.inv_freq|\.masked_bias)$")
#: The tensor with what divides the frequencies of rotary embeddings.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    - ``name``: llama.cpp's. ``model_types``: transformers', the first being the one that is written in a config.json.
    - ``blocks``: names of a block's tensors, GGUF's to transformers'. ``settings``: likewise of settings.
    - ``permuted``: rows of queries and keys are stored in pairs, as llama.cpp turns them.
    - ``shift``: what is added to weights of norms. ``fixed``: settings that must be so, with what transformers takes
      where config.json does not say. ``pattern``: of how many layers one attends to everything, the others to a window.
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    blocks: Mapping[str, str]
    settings: Mapping[str, tuple[str, bool]]
    activation: str = "silu"
    permuted: bool = False
    shift: float = 0.0
    pattern: int = 0
    tied: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), "LlamaForCausalLM", _LLAMA, _COMMON, permuted=True),
    Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", _LLAMA, _COMMON),
    Architecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", _LLAMA | _HEAD_NORMS, _COMMON, fixed=_NO_BIAS),
    Architecture("phi3", ("phi3",), "Phi3ForCausalLM", _PHI3, _COMMON | _SLIDING, fixed=_NO_BIAS),
    Architecture(
        "gemma2", ("gemma2",), "Gemma2ForCausalLM", _GEMMA, _COMMON | _SLIDING | _CAPPED, "gelu_pytorch_tanh",
        shift=1.0, pattern=2, tied=True, fixed=_NO_BIAS,
    ),
    Architecture(
        "gemma3", ("gemma3_text",), "Gemma3ForCausalLM", _GEMMA | _HEAD_NORMS, _COMMON | _SLIDING, "gelu_pytorch_tanh",
        shift=1.0, pattern=6, tied=True,
        fixed={**_NO_BIAS, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
)  # fmt: skip
GEMMAS = ("gemma2", "gemma3")


def architecture_of(config: Mapping[str, Any] | None, name: str) -> Architecture:
    """The architecture of a config.json. Raises InputError for one that is not written; ``name``: the model's."""
    model_type = (config or {}).get("model_type")
    found = next((each for each in ARCHITECTURES if model_type in each.model_types), None)
    if found is None:
        raise InputError(
            f"{name} is a model of type {model_type}, and GGUF is written for {_known()}.",
            "Use --format compressed-tensors, or llama.cpp's own converter.",
        )
    return found


def _known() -> str:
    return ", ".join(model_type for each in ARCHITECTURES for model_type in each.model_types)


def named_architecture(metadata: Mapping[str, Any], name: str) -> Architecture:
    """The architecture that a file says it holds. Raises InputError for one that is not read."""
    told = metadata.get("general.architecture")
    found = next((each for each in ARCHITECTURES if each.name == told), None)
    if found is None:
        raise InputError(
            f"{name} holds a model of GGUF's architecture {told}.",
            f"Read are {', '.join(each.name for each in ARCHITECTURES)}; start from the original weights otherwise.",
        )
    return found


def heads_of(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and the size of a head, by a config.json."""
    heads = int(settings["num_attention_heads"])
    own = settings.get("head_dim") or int(settings["hidden_size"]) // heads
    return heads, int(settings.get("num_key_value_heads") or heads), int(own)


def gguf_name(architecture: Architecture, name: str) -> str | None:
    """GGUF's name of a tensor of transformers'; None for what a runtime computes. Raises InputError for others."""
    if _COMPUTED.search(name):
        return None
    module, _, leaf = name.rpartition(".")
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    if module in outside and leaf == "weight":
        return f"{outside[module]}.{leaf}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    inside = {theirs: ours for ours, theirs in architecture.blocks.items()}
    if match and match[2] in inside and leaf in ("weight", "bias"):
        return f"blk.{match[1]}.{inside[match[2]]}.{leaf}"
    raise InputError(f"{name} is no tensor that llama.cpp's {architecture.name} has.", "The model is of another kind.")


def hugging_face_name(architecture: Architecture, name: str) -> str | None:
    """The inverse of `gguf_name`; None for factors of frequencies, which config.json tells."""
    if name == ROPE_FACTORS:
        return None
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{leaf}"
    match = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)", stem)
    if match and match[2] in architecture.blocks:
        return f"model.layers.{match[1]}.{architecture.blocks[match[2]]}.{leaf}"
    raise InputError(f"{name} is no tensor that a model of GGUF's {architecture.name} is known to have.")


def row_order(architecture: Architecture, name: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads, and half the size of a head, of a tensor whose rows llama.cpp wants turned; None where as they are.

    Rotary embeddings turn value i of a head together with value i + half in transformers, with value i + 1 here: of
    a head's rows, those of the second half stand between those of the first.
    """
    if not architecture.permuted or not re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name):
        return None
    heads, key_heads, size = heads_of(settings)
    return (heads if ".q_proj." in name else key_heads), size // 2


def stored_rows(values: Any, order: tuple[int, int] | None) -> Any:
    """Rows of a whole tensor (of torch or numpy) as llama.cpp wants them."""
    if order is None:
        return values
    heads, half = order
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def original_rows(values: Any, order: tuple[int, int] | None) -> Any:
    """The inverse of `stored_rows`."""
    if order is None:
        return values
    heads, half = order
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def norm_shift(architecture: Architecture, name: str) -> float:
    """What llama.cpp wants added to a tensor: Gemma multiplies by one more than a norm's weight."""
    return architecture.shift if name.endswith("norm.weight") else 0.0
