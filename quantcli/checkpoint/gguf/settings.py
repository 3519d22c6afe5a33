"""What a config.json says, as GGUF's metadata, and back.

A setting that llama.cpp computes with and has no key for is required to be what it takes; anything else is refused by
name, since it would run as another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quantcli.checkpoint.gguf.architectures import GEMMAS, Architecture, heads_of
from quantcli.errors import InputError

#: Gemma 3's base of frequencies in layers that attend to a window: no key, llama.cpp knows it.
_LOCAL_BASE = 10000.0
#: How far numbers may be from each other that are the same.
_ROUNDED = 1e-4


def settings_of(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Metadata of a config.json, without the architecture's name in front.

    Raises:
        InputError: a setting that llama.cpp computes otherwise, by name.
    """
    settings = {**config, "rope_theta": _rope(architecture, config).get("rope_theta")}
    _, key_heads, size = heads_of(config)
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
    factors, told = rope_factors(architecture, config), {**config, "rope_parameters": _rope(architecture, config)}
    if factors and rope_of_factors(architecture, told, factors) is None:
        raise InputError(
            "config.json scales rotary embeddings as llama3 in a way that what divides the frequencies, all that GGUF "
            "holds of it, does not tell again."
        )
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


def rope_of_factors(
    architecture: Architecture, config: Mapping[str, Any], factors: Sequence[float]
) -> dict[str, Any] | None:
    """The inverse of `rope_factors`: how Llama 3.1 scales frequencies, told from what divides them alone.

    None where it is not told: frequencies are divided in another way, or too few are scaled in part.
    """
    from math import isclose, pi

    theta, whole = _rope(architecture, config)["rope_theta"], max(factors)
    rope = {
        **config["rope_parameters"], "rope_type": "llama3", "factor": whole, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    # Of a frequency in between, the share that stays grows with it along a line. Files hold rounded numbers.
    between = [
        (theta ** (-place / len(factors)) / (2 * pi), (1 / factor - 1 / whole) / (1 - 1 / whole))
        for place, factor in enumerate(factors)
        if 1 + _ROUNDED < factor < whole * (1 - _ROUNDED)
    ]
    if len(between) > 1 and theta != 1:
        (first, above), (last, below) = between[0], between[-1]
        slope = (above - below) / (first - last)
        distance = 1 / (slope * first - above) if slope * first != above else 0.0
        rope |= {
            "high_freq_factor": round(1 + distance, 3),
            "original_max_position_embeddings": round(slope * distance),
        }
    elif between:
        frequency, share = between[0]
        rope["original_max_position_embeddings"] = round((1 + 3 * share) / frequency)
    if rope["high_freq_factor"] <= 1 or rope["original_max_position_embeddings"] < 1:
        return None
    made = rope_factors(architecture, {**config, "rope_parameters": rope}) or []
    alike = len(made) == len(factors) and all(map(partial(isclose, rel_tol=_ROUNDED), made, factors))
    return rope if alike else None


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
    known = {architecture.activation, "gelu_pytorch_tanh" if architecture.name in GEMMAS else "silu"}
    if activation not in known:
        _require_equal("hidden_act", activation, architecture.activation)
    for name, value in architecture.fixed.items():
        _require_equal(name, config.get(name, value), value)
    heads, _, size = heads_of(config)
    if architecture.name in GEMMAS:
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
            f"config.json has {name} {value}, and llama.cpp computes with {expected}: it would run as another model.",
            "--format compressed-tensors keeps it for transformers.",
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
    activation = "hidden_activation" if architecture.name in GEMMAS else "hidden_act"
    settings |= {"num_key_value_heads": key_heads, "head_dim": size, activation: architecture.activation}
    if architecture.name in GEMMAS:
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
