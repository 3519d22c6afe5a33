"""What language models are called in GGUF: names of tensors, settings, and the order of rows, in both directions.

Checked against llama.cpp's conversion (gguf 0.19) and its loader. A setting that llama.cpp computes with and has no key
for is required to be what it takes; anything else is refused by name, since it would run as another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
_GEMMAS = ("gemma2", "gemma3")
#: Gemma 3's base of frequencies in layers that attend to a window: no key, llama.cpp knows it.
_LOCAL_BASE = 10000.0


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


# Names ---------------------------------------------------------------------------------------------------------------


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


def source_rows(rows: Sequence[int], order: tuple[int, int]) -> list[int]:
    """Where some rows of the original lie among the stored ones."""
    _, half = order
    return [row // (2 * half) * 2 * half + row % half * 2 + row // half % 2 for row in rows]


def norm_shift(architecture: Architecture, name: str) -> float:
    """What llama.cpp wants added to a tensor: Gemma multiplies by one more than a norm's weight."""
    return architecture.shift if name.endswith("norm.weight") else 0.0


# Settings ------------------------------------------------------------------------------------------------------------


def settings_of(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Metadata of a config.json, without the architecture's name in front.

    Raises:
        InputError: a setting that llama.cpp computes otherwise, by name.
    """
    settings = {**config, "rope_theta": _rope(architecture, config).get("rope_theta")}
    heads, key_heads, size = heads_of(config)
    settings |= {"num_key_value_heads": key_heads, "head_dim": size}
    _require(architecture, config)
    found: dict[str, int | float | str] = {"rope.dimension_count": size}
    if architecture.name == "phi3":
        share = _rope(architecture, config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        found["rope.dimension_count"] = int(size * share)
    for key, (name, fraction) in architecture.settings.items():
        value = settings.get(name)
        if value is not None:
            found[key] = float(value) if fraction else int(value)
    return found | _scaling(architecture, config)


def rope_factors(architecture: Architecture, config: Mapping[str, Any]) -> list[float] | None:
    """What divides each frequency of rotary embeddings as Llama 3.1 scales them; None where nothing does."""
    from math import pi

    rope = _rope(architecture, config)
    if rope.get("rope_type") != "llama3":
        return None
    _, _, size = heads_of(config)
    low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
    factors = []
    for place in range(0, size, 2):
        wavelength = 2 * pi * rope["rope_theta"] ** (place / size)
        share = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = 1 / ((1 - share) / rope["factor"] + share) if high <= wavelength <= low else 1.0
        factors.append(float(rope["factor"]) if wavelength > low else smooth)
    return factors


def _rope(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """How frequencies are made, in the keys of transformers 5; of Gemma 3, in layers that attend to everything."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in given:
        local = (given.get("sliding_attention") or {}).get("rope_theta", _LOCAL_BASE)
        _require_equal("rope_parameters.sliding_attention.rope_theta", local, _LOCAL_BASE)
        given = given["full_attention"]
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **given}
    rope["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if architecture.name == "gemma3" and "rope_local_base_freq" in config:
        _require_equal("rope_local_base_freq", config["rope_local_base_freq"], _LOCAL_BASE)
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise InputError(
            f"config.json scales rotary embeddings as {rope['rope_type']}, which is not written to GGUF.",
            "Written are default, linear, yarn and llama3.",
        )
    return rope


def _scaling(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int | float | str]:
    rope = _rope(architecture, config)
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    found: dict[str, int | float | str] = {
        "rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])
    }  # fmt: skip
    if rope["rope_type"] == "yarn":
        for name, default in {"beta_fast": 32.0, "beta_slow": 1.0}.items():
            _require_equal(f"rope_parameters.{name}", rope.get(name) or default, default)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            _require_equal(f"rope_parameters.{name}", rope.get(name), None)
        length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["rope.scaling.original_context_length"] = int(length)
    return found


def _require(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise InputError where a model computes otherwise than llama.cpp does for its architecture."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    known = {architecture.activation, "gelu_pytorch_tanh" if architecture.name in _GEMMAS else "silu"}
    if activation not in known:
        _require_equal("hidden_act", activation, architecture.activation)
    for name, value in architecture.fixed.items():
        _require_equal(name, config.get(name, value), value)
    heads, _, size = heads_of(config)
    if architecture.name in _GEMMAS:
        scale = config.get("query_pre_attn_scalar", 256)
        # llama.cpp knows the one size of Gemma whose scale is another by its number of layers.
        largest = {"gemma2": 46, "gemma3": 62}[architecture.name] == config.get("num_hidden_layers")
        _require_equal("query_pre_attn_scalar", scale, int(config["hidden_size"]) // heads if largest else size)
        _require_equal("use_bidirectional_attention", bool(config.get("use_bidirectional_attention")), False)
    if architecture.pattern and config.get("layer_types"):
        expected = [
            "full_attention" if (layer + 1) % architecture.pattern == 0 else "sliding_attention"
            for layer in range(int(config["num_hidden_layers"]))
        ]
        if list(config["layer_types"]) != expected:
            raise InputError(
                f"config.json has layers that attend to everything elsewhere than every {architecture.pattern}th "
                f"layer, where llama.cpp's {architecture.name} has them."
            )


def _require_equal(name: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise InputError(
            f"config.json has {name} {value}, and llama.cpp computes with {expected}: it would run as another model."
        )


def window_warning(architecture: Architecture, config: Mapping[str, Any]) -> str | None:
    """What is to be said where a model attends to a window, and llama.cpp does not look at that."""
    window, used = config.get("sliding_window"), config.get("use_sliding_window", True)
    longest = config.get("max_position_embeddings") or 0
    if architecture.pattern or not window or not used or window >= longest:
        return None
    return f"llama.cpp attends to all tokens, and the model to the last {window}: beyond these they differ."


def config_of(architecture: Architecture, metadata: Mapping[str, Any], rows: int, *, tied: bool) -> dict[str, Any]:
    """A config.json for the metadata of a file.

    Args:
        architecture: the file's.
        metadata: all of it.
        rows: of the table of tokens, which the vocabulary is as large as.
        tied: whether the head is the table of tokens.

    Raises:
        InputError: a setting is missing, or is not a number that it could be.
    """
    settings: dict[str, Any] = {}
    for key, (name, fraction) in architecture.settings.items():
        value = metadata.get(f"{architecture.name}.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 31:
            raise InputError(f"The file's setting {architecture.name}.{key} is {value!r}: it is damaged.")
        settings[name] = float(value) if fraction else int(value)
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps")
    for name in needed:
        if name not in settings:
            raise InputError(f"The file does not tell the model's {name}: it is damaged.")
    heads, key_heads, size = heads_of(settings)
    if heads % key_heads:
        raise InputError(f"The file has {heads} heads of queries and {key_heads} of keys: it is damaged.")
    activation = "hidden_activation" if architecture.name in _GEMMAS else "hidden_act"
    settings |= {"num_key_value_heads": key_heads, "head_dim": size, activation: architecture.activation}
    if architecture.name in _GEMMAS:
        settings["query_pre_attn_scalar"] = size
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_types[0],
        "dtype": "float32",
        "tie_word_embeddings": tied,
        **_special_tokens(metadata, rows),
        **settings,
        "vocab_size": rows,
        "rope_parameters": _rope_parameters(architecture, metadata, settings),
    }


def _special_tokens(metadata: Mapping[str, Any], rows: int) -> dict[str, int]:
    named = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in named.items()}
    return {name: value for name, value in found.items() if isinstance(value, int) and 0 <= value < rows}


def _rope_parameters(
    architecture: Architecture, metadata: Mapping[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    get: Callable[[str], Any] = lambda key: metadata.get(f"{architecture.name}.rope.{key}")  # noqa: E731
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta", 10000.0)}
    kind = get("scaling.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(get("scaling.factor") or 1.0)}
        if kind == "yarn" and get("scaling.original_context_length"):
            rope["original_max_position_embeddings"] = int(get("scaling.original_context_length"))
    elif kind not in (None, "none"):
        raise InputError(f"The file scales rotary embeddings as {kind!r}, which is not read.")
    turned, size = get("dimension_count"), settings["head_dim"]
    if turned and turned != size:
        rope["partial_rotary_factor"] = turned / size
    if architecture.name == "gemma3":
        local = {"rope_type": "default", "rope_theta": _LOCAL_BASE}
        return {"full_attention": rope, "sliding_attention": local}
    return rope
