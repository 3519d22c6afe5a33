"""Tiny random models of every architecture that decoders are built of, and what reads artifacts without our code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from support.graphs import with_accuracy_level

#: Sizes that all share: small enough for seconds, and heads that are queried in groups.
_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: As Qwen 2.5 is told to read longer texts, which leaves ``max_position_embeddings`` at the original length.
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
#: As Phi-4 mini reads long texts: other factors hold for every position of a text beyond the original length, and a
#: part of each head is turned.
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.1, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0], "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}  # fmt: skip

#: By name: what transformers calls the architecture, and what of it is set beside `_SIZES`.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3, "mlp_bias": True,
                         "attention_bias": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen2", {"max_position_embeddings": 32, "rope_parameters": _YARN}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 9, "head_dim": None}),
    "longrope": ("phi3", {"head_dim": None, "hidden_size": 128, "tie_word_embeddings": True,
                          "original_max_position_embeddings": 32, "rope_parameters": _LONGROPE}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 24,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


def tiny_decoder(name: str, folder: Path, **changed: Any) -> Path:
    """Save a model of `TINY` with a tokenizer, some of its settings changed."""
    import torch
    import transformers

    from support.tokenizers import save_tokenizer

    model_type, settings = TINY[name]
    known = {key: value for key, value in (_SIZES | settings | changed).items() if value is not None}
    config = transformers.CONFIG_MAPPING[model_type](**known)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases that are all ones or zeros would hide whether they are read. Blocks weigh more than
            # embeddings, or a head that is tied to these would say each token again.
            parameter.add_(torch.randn_like(parameter) * (0.3 if ".layers." in name else 0.05))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def configured_decoder(model_type: str, folder: Path, **settings: Any) -> Path:
    """Save the config.json of a small language model of any architecture, and nothing else."""
    import transformers

    config = _any_config(model_type, settings)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder


def saved_decoder(model_type: str, folder: Path, **settings: Any) -> Path:
    """Save a small random language model of any architecture with a tokenizer."""
    import torch
    import transformers

    from support.tokenizers import save_tokenizer

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_any_config(model_type, settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _any_config(model_type: str, settings: dict[str, Any]) -> Any:
    import transformers

    # Not every architecture takes a length of heads that is set apart.
    sizes = {name: value for name, value in _SIZES.items() if name != "head_dim"} | {"num_hidden_layers": 2}
    return transformers.CONFIG_MAPPING[model_type](**sizes | settings)


def greedy_in_genai(artifact: Path, prompt: list[int], count: int) -> list[int]:
    """What onnxruntime-genai says after a prompt, the likeliest token each time, its end or not."""
    import onnxruntime_genai as genai

    model = genai.Model(str(artifact))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def greedy_in_torch(model: Any, prompt: list[int], count: int, banned: list[int]) -> list[int]:
    """The same of a torch model, without a cache; ``banned`` are tokens that end a text."""
    import torch

    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].clone()
            logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def without_rounding(artifact: Path, target: Path) -> Path:
    """A copy whose products take their inputs as they are, where the artifact rounds them to int8."""
    import onnx

    shutil.copytree(artifact, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    (target / "model.onnx").write_bytes(with_accuracy_level(model, 0).SerializeToString())
    return target


def torch_with_codes(folder: Path, artifact: Path) -> Any:
    """A folder's model in torch, its weights decoded from the artifact's own constants by the operators' documents."""
    import onnx
    import torch
    import transformers
    from onnx import numpy_helper

    graph = onnx.load(artifact / "model.onnx").graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    state = dict(model.state_dict())
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            codes, scales, *points = (constants[name] for name in node.input[1:] if name)
        elif node.op_type == "GatherBlockQuantized":
            codes, scales, *points = (constants[name] for name in (node.input[0], *node.input[2:]) if name)
        else:
            continue
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        matrix = torch.from_numpy(decoded_matrix(codes.reshape(len(codes), -1), scales, points, bits))
        for name, rows, into in _modules(node.name.removesuffix(".filled"), model.config):
            if (weight := state.get(f"{name}.weight")) is not None:
                # The last block of a row may be filled up.
                weight[into].copy_(matrix[rows, : weight.shape[1]])
    return model.eval()


def decoded_matrix(codes: np.ndarray, scales: np.ndarray, points: list[np.ndarray], bits: int) -> np.ndarray:
    """Values of codes that are packed along rows, by the document of MatMulNBits."""

    def unpacked(packed: np.ndarray, count: int) -> np.ndarray:
        wide = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        return wide[:, :count].astype(np.float32)

    rows, blocks = len(codes), scales.size // len(codes)
    columns = codes.shape[1] * 8 // bits
    zero = unpacked(points[0].reshape(rows, -1), blocks) if points else np.full((rows, blocks), 2.0 ** (bits - 1))
    values = unpacked(codes, columns).reshape(rows, blocks, -1) - zero[..., None]
    return np.asarray(values * scales.reshape(rows, blocks, 1), np.float32).reshape(rows, columns)


def _modules(node: str, config: Any) -> list[tuple[str, slice, slice]]:
    """Modules of torch that a node's matrix holds rows of: which rows, and where they belong."""
    every = slice(None)
    parent, _, part = node.rpartition(".")
    if config.model_type == "phi3" and part in ("gate_proj", "up_proj"):
        half = config.intermediate_size
        return [(f"{parent}.gate_up_proj", every, slice(0, half) if part == "gate_proj" else slice(half, None))]
    if part != "qkv_proj" or config.model_type == "phi3":
        return [(node, every, every)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ends = np.cumsum([0, config.num_attention_heads, *[config.num_key_value_heads] * 2]) * head_dim
    return [(f"{parent}.{name}_proj", slice(ends[i], ends[i + 1]), every) for i, name in enumerate("qkv")]
