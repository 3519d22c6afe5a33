"""A tiny random model of any architecture that the installed transformers has, by rules over names of settings."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support import tiny_by_hand

#: Kinds of models: the mapping of transformers that lists them.
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "vl": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "ctc": "MODEL_FOR_CTC_MAPPING",
    "encoder": "MODEL_FOR_TEXT_ENCODING_MAPPING",
}
VOCAB, HIDDEN, TOKENS, SAMPLES = 320, 128, 16, 8
MAX_PARAMETERS = 12_000_000

#: Settings by name (all of it), and what becomes of them; the first that fits is taken.
_RULES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?|n_vocab", VOCAB),
    (r"num_key_value_heads|n_kv_heads?|(\w+_)?num_(kv|key_value)_heads|num_kv|multi_query_group_num", 2),
    (r"num_global_key_value_heads|attention_groups|num_attention_groups", 2),
    (r"qk_rope_head_dim|rotary_dim|qk_rope_dim|rope_head_dim", 16),
    (r"(\w+_)?(kv|q|o)_lora_rank|\w+_lora_rank\w*|\w+_low_rank_dim|lora_rank", 64),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_nheads", 8),
    (r"(\w+_)?(head_dim|d_head|head_size|headdim)(_\w+)?|d_kv|attention_key_size|kv_channels|qk_nope_head_dim", 32),
    (r"linear_num_key_heads", 2),
    (r"(\w+_)?(num_)?(attention_|linear_value_|linear_num_value_|num_)?heads|n_heads?|(\w+_)?attention_heads", 4),
    (r"linear_num_value_heads|num_linear_heads|index_n_heads|(\w+_)?num_heads|(\w+_)?n_heads", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(\w+_)?(num|n)_(\w+_)?experts|moe_num_experts|ffn_num_experts|num_experts\w*tokens", 4),
    (r"(\w+_)?(experts?_per_tok(en)?|top_?k(_experts?)?|moe_k)|num_experts_per_\w+|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_groups?|router_n_groups?", 1),
    (r"(moe|expert|shared_expert)\w*(intermediate|ffn|inner)\w*(size|dim)|moe_\w*intermediate_size\w*", 128),
    (r"(\w+_)?intermediate_(size|dim)(_\w+)?|(\w+_)?ffn_(dim|hidden_size)|d_ff|n_inner|(\w+_)?mlp_dim|d_inner", 256),
    (r"(\w+_)?feed_?forward_(\w+)|ffn_hidden_dim|ff_expansion_size|linear_units|attention_inner_dim", 256),
    (r"(attn|expert|attention)_layer_period|full_attention_interval|attn_every_n_layers", 2),
    (r"(attn|expert|attention)_layer_offset", 1),
    (r"(\w+_)?first_k_dense_replace|num_dense_layers|first_dense_layers|num_kv_shared_layers", 1),
    (r"(\w+_)?layers_per_block", 1),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_\w*layers", 0),
    (r"(\w+_)?(num|n)?_?(\w+_)?(layers?|blocks|depth)", 2),
    (r"hidden_size_per_layer_input|(\w+_)?(image|crop|input)_size", 32),
    (r"(\w+_)?patch_size", 8),
    (
        r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|model_dim|embedding_size|emb_dim)(_\w+)?",
        HIDDEN,
    ),
    (
        r"(\w+_)?(proj|projection|projector|out|output|lru)_(dim|width|size|hidden_size)|conv_dim|embedding_dim|dim|width",
        HIDDEN,
    ),
    (r"(mamba_|ssm_)?(d_state|state_size|ssm_state_size)", 16),
    (r"(\w+_)?chunk_size\w*", 16),
    (r"(\w+_)?(max_\w*position\w*|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length)", 256),
    (r"sliding_window|attention_window\w*|window_size|attention_chunk_size|local_attention", 32),
    (r"num_mel_bins|feature_size", 80),
)
#: What is tried where the rules alone give no model that runs: heads that do not share keys, no size of a head.
_OVERRIDES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": None},
    {"num_attention_heads": 8, "num_key_value_heads": 8, "objects": True},
    # Heads of 128: of positions in three axes, whose shares are fixed.
    {"hidden_size": 4 * HIDDEN, "head_dim": None, "objects": True},
)
#: Settings that an architecture does not run without, where it has them, beside what the rules give.
_NEEDED: tuple[dict[str, Any], ...] = (
    # Of two layers one attends, where others are the rule.
    {"layers_block_type": ["mamba", "attention"], "attn_layer_indices": [1]},
    {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    {"layer_types": ["mamba", "attention"]},
    {"layer_types": ["full_attention", "full_attention"]},
    {"head_dim": 32},
    {"num_heads": 8},
    {"num_key_value_heads": 4},
    {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": HIDDEN // 2,
    },
    {"mamba_d_ssm": 2 * HIDDEN},
    {"hidden_size_per_layer_input": 0},
    {"default_language": "en_XX"},
    {"is_decoder": True, "axial_pos_embds": False},
    {"is_encoder_decoder": False},
)
#: Settings that are numbers of tokens, and have to lie within the vocabulary.
_SPECIAL = re.compile(r"\w*(token_id|token_index|_tok_id|token_ids|_start_id|_end_id|_id)")
_KEPT = re.compile(r"layer_norm\w*|use_\w+|num_labels|num_channels|in_channels|output_\w+|return_\w+|tie_\w+")


class NotBuiltError(Exception):
    """No tiny model of this architecture could be made, and why."""


def architectures() -> dict[str, str]:
    """``kind:model_type`` -> the name of the model's class, one kind for each class of model. Imports no model.

    Those of the kind ``hand`` are written down by hand, and have no name here.
    """
    import transformers.models.auto.modeling_auto as auto

    found: dict[str, tuple[str, bool]] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(auto, f"{mapping}_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            # Of several types with one class, the one that the class was made for.
            own = re.sub("[-_]", "", model_type) == re.split("For|LMHead|Model", name)[0].lower()
            if name not in found or (own and not found[name][1]):
                found[name] = (found[name][0].partition(":")[0] if name in found else kind) + f":{model_type}", own
    return {case: name for name, (case, _) in found.items()} | {f"hand:{case}": "" for case in tiny_by_hand.CASES}


def build(case: str, folder: Path) -> dict[str, Any]:
    """Save a tiny model in a folder, and data for it beside it (``data.npz``).

    Args:
        case: one of `architectures`.
        folder: to be made.

    Returns:
        Its parameters' number, its class, and the names of the inputs of a forward pass.

    Raises:
        NotBuiltError: with what was said at the first of several tries that came furthest.
    """
    import torch
    import transformers

    name, model_type = architectures()[case], case.partition(":")[2]
    if not name:
        return _build_by_hand(model_type, folder)
    try:
        model_class: Any = getattr(transformers, name)
        config_class: Any = transformers.CONFIG_MAPPING[model_type]
    except (AttributeError, KeyError, ImportError) as error:
        raise NotBuiltError(f"no class: {error}") from error
    config_class = getattr(model_class, "config_class", None) or config_class
    why: dict[str, str] = {}
    for config in _configs(config_class):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
            if size > MAX_PARAMETERS:
                why.setdefault("size", f"{size / 1e6:.0f} M parameters are left")
                continue
            torch.manual_seed(0)
            model = model_class._from_config(config).float().eval()
            _refill(model)
        except Exception as error:
            why.setdefault("class", _said(error))
            continue
        try:
            inputs = _inputs(model)
        except Exception as error:
            why.setdefault("forward", _said(error))
            continue
        return _saved(model, inputs, folder)
    raise NotBuiltError(why.get("forward") or why.get("class") or why.get("size") or "no configuration")


def _build_by_hand(case: str, folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    try:
        name, config, inputs = tiny_by_hand.CASES[case]()
        model = getattr(transformers, name)(config).float().eval()
        _refill(model)
        outputs(model, inputs)
    except Exception as error:
        raise NotBuiltError(_said(error)) from error
    return _saved(model, inputs, folder)


def _saved(model: Any, inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    # What a forward pass swallows among its other arguments (FNet's mask) is no input of the model.
    taken = inspect.signature(model.forward).parameters
    inputs = {name: values for name, values in inputs.items() if name in taken} or inputs
    model.save_pretrained(folder)
    _save_data(inputs, folder.with_name("data.npz"))
    size = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": size, "class": type(model).__name__, "inputs": sorted(inputs)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _configs(config_class: type) -> Iterator[Any]:
    """Smaller configurations, the likeliest first."""
    for lists in ("derived", "cut"):
        for overrides in _OVERRIDES + (_NEEDED if lists == "derived" else ()):
            try:
                yield _shrunk(config_class, lists, overrides)
            except Exception:
                # The next try is the answer; build() says that there was none.
                continue


def _shrunk(config_class: type, lists: str, overrides: Mapping[str, Any], default: Any = None) -> Any:
    default = config_class() if default is None else default
    values = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    wanted: dict[str, Any] = {}
    layers = {v for k, v in values.items() if isinstance(v, int) and re.fullmatch(r"(\w+_)?(layers?|depth)", k)}
    special = iter(range(VOCAB - 2, 10, -1))
    for key, value in values.items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            part = _shrunk(type(value), lists, overrides, value)
            wanted[key] = part if overrides.get("objects") else part.to_dict()
        elif isinstance(value, dict) and sum(value.get("mrope_section") or [0]) > 16:
            sizes = [size * 16 // sum(value["mrope_section"]) for size in value["mrope_section"]]
            wanted[key] = value | {"mrope_section": [16 - sum(sizes[1:]), *sizes[1:]]}
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            smaller = _smaller(key, value, special)
            if smaller is not None:
                wanted[key] = smaller
        elif isinstance(value, (list, tuple)) and len(value) in layers and len(value) > 2 and lists == "cut":
            wanted[key] = _cut(list(value))
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            if _SPECIAL.fullmatch(key) and max(value) >= VOCAB:
                wanted[key] = [next(special)]
            elif re.search(r"hidden_sizes|embed_dims|depths|channels|dims", key):
                wanted[key] = [min(v, 2) if "depth" in key else min(v, 64 * (i + 1)) for i, v in enumerate(value)]
    for key, value in overrides.items():
        if key in wanted and value is None:
            wanted.pop(key)
        elif key in wanted or (key in values and overrides in _NEEDED):
            wanted[key] = value
    for key, value in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        known = values.get(key)
        if (isinstance(known, int) and known >= VOCAB) or (key in values and known is None and key == "pad_token_id"):
            wanted[key] = value
    return config_class(**wanted)


def _smaller(key: str, value: int, special: Iterator[int]) -> int | None:
    if _SPECIAL.fullmatch(key):
        return next(special) if value >= VOCAB and key not in ("pad_token_id", "bos_token_id", "eos_token_id") else None
    if _KEPT.fullmatch(key) or value <= 1:
        return None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, key):
            return min(small, value)
    return None


def _cut(values: list[Any]) -> list[Any]:
    """Two of them, of different kinds where there are some."""
    other = next((v for v in values if v != values[0]), values[-1])
    return [values[0], other]


def _refill(model: Any) -> None:
    """Values of every parameter: small, random, finite, and none of them all the same."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 0.5 / max(parameter[0].numel(), 1) ** 0.5 if "embed" not in name else 0.5)
            elif not bool(torch.isfinite(parameter).all()):
                parameter.normal_(0, 0.1)


def _inputs(model: Any) -> dict[str, Any]:
    """The first inputs with which a forward pass works, those of the model's own kind first."""
    made = []
    for make in (_text, _text_to_text, _pixels, _sound, _features):
        made.append(make(model.config))
    made.sort(key=lambda inputs: model.main_input_name not in inputs)
    first: Exception | None = None
    for inputs in made:
        try:
            logits = outputs(model, inputs)
        except Exception as error:
            first = first or error
            continue
        if logits and all(bool(value.isfinite().all()) for value in logits.values()):
            return inputs
        first = first or ValueError("outputs are not finite, or there are none")
    raise first or ValueError("no forward pass")


def outputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Every floating point tensor that a forward pass returns, caches left out, in float32."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**{key: value[:2] for key, value in inputs.items()})
    items = found.items() if hasattr(found, "items") else [("output", found)]
    named = {}
    for name, value in items:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 and "past" not in name:
            named[name] = value.float()
    return named


def _find(config: Any, *names: str) -> Any:
    """A setting of the configuration, or of one within it."""
    for name in names:
        if isinstance(getattr(config, name, None), (int, list, tuple)):
            return getattr(config, name)
    for value in vars(config).values():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found = _find(value, *names)
            if found is not None:
                return found
    return None


def _ids(config: Any) -> Any:
    import torch

    words = min(_find(config, "vocab_size") or VOCAB, VOCAB)
    return torch.randint(5, words // 2, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))


def _text(config: Any) -> dict[str, Any]:
    import torch

    return {"input_ids": _ids(config), "attention_mask": torch.ones(SAMPLES, TOKENS, dtype=torch.int64)}


def _text_to_text(config: Any) -> dict[str, Any]:
    return _text(config) | {"decoder_input_ids": _ids(config).flip(0)}


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _pixels(config: Any) -> dict[str, Any]:
    size = _find(config, "image_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {"pixel_values": _noise(SAMPLES, _find(config, "num_channels") or 3, height, width)}


def _sound(config: Any) -> dict[str, Any]:
    return {"input_values": _noise(SAMPLES, 4000)}


def _features(config: Any) -> dict[str, Any]:
    bins = _find(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
    frames = 2 * (_find(config, "max_source_positions") or 64)
    return {"input_features": _noise(SAMPLES, bins, frames), "decoder_input_ids": _ids(config)}


def _save_data(inputs: Mapping[str, Any], file: Path) -> None:
    import numpy

    numpy.savez(file, **{name: value.numpy() for name, value in inputs.items()})
