"""Artifacts of small models over all schemes, formats and algorithms, as one hash a case.

Two commits whose hashes are equal write the same bytes. Models and data come from numpy's generator with fixed seeds,
and are written by safetensors, by torch.save and by onnx's helper, so that no library's initialisation matters.
Everything goes through quantcli's public functions: the cases run with any commit, whatever its modules are called.

    PYTHONPATH=COMMIT python tests/support/golden.py --write FILE.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np

#: Schemes by name: presets, and spelled out where no preset has the kind.
SCHEMES: dict[str, Any] = {
    name: name for name in ("fp16", "bf16", "int8", "int8-dynamic", "int8-static", "int4", "nf4", "nf4-double")
} | {
    "int4-asymmetric": {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}},
    "int8-groups": {"weights": {"dtype": "int8", "granularity": "group", "group_size": 32}},
    "int8-asymmetric": {"weights": {"dtype": "int8", "granularity": "group", "group_size": 32, "symmetric": False}},
    "int8-tensor": {"weights": {"dtype": "int8"}},
    "int4-channels": {"weights": {"dtype": "int4", "granularity": "channel"}},
}
FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors")
#: Chains of algorithms that look at data, with few steps where they train.
CHAINS: dict[str, list[Any]] = {
    "gptq": ["gptq"],
    "awq": ["awq"],
    "smoothquant": ["smoothquant"],
    "autoround": [{"autoround": {"iterations": 4, "batch_size": 4}}],
    "awq-gptq": ["awq", {"gptq": {"damping": 0.02}}],
    "gptq-tune": ["gptq", {"tune": {"epochs": 1, "batch_size": 4}}],
    "gptq-qat": ["gptq", {"qat": {"steps": 4, "batch_size": 4, "held_out": 0.25, "evaluate_every": 2}}],
}
W4A8 = {"weights": {"dtype": "int4", "granularity": "channel"}, "inputs": {"dtype": "int8", "symmetric": False}}
#: What a runtime's or this program's version, or the way an input file is written, changes: not what is compared.
_VOLATILE = re.compile(
    rb'(\\?"(?:quantcli|transformers|onnxruntime|input_sha256)\\?": ?\\?")(?:\d+\.[0-9.a-z+]*|[0-9a-f]{64})'
)

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 64, 96, 128, 2


@dataclass(frozen=True)
class Case:
    """Something to write, by name.

    ``products``: the bytes follow from matrix products of floats, which processors and their libraries round
    differently. ``slow``: takes more than a moment.
    """

    name: str
    write: Callable[[Path, Path], object]
    products: bool = False
    slow: bool = False


# Models and data


def build(root: Path) -> None:
    """Write every model and every file of data into a folder."""
    from safetensors.numpy import save_file

    for typed in (False, True):
        end = "" if typed else "-untyped"
        _folder(root / f"llama{end}", _llama(1), _llama_config() if typed else {})
        _folder(
            root / f"tied{end}",
            _without_head(_llama(2)),
            _llama_config(tied=True) if typed else {"tie_word_embeddings": True},
        )
        _folder(root / f"bert{end}", _bert(3), _bert_config() if typed else {})
    _folder(root / "gpt2-untyped", _gpt2(4), {"tie_word_embeddings": True})
    _folder(root / "mixtral-untyped", _mixtral(5), {})
    _folder(root / "float16-untyped", {name: part.astype(np.float16) for name, part in _llama(6).items()}, {})
    save_file(_llama(7), root / "bare.safetensors", {"format": "pt"})
    large = _Tensors(9)
    large.linear("large", 1100, 1024)
    save_file(large, root / "large.safetensors", {"format": "pt"})
    _pickle(root / "state.pt", _bert(8))
    _cnn(root / "cnn.onnx")
    _encoder(root / "encoder.onnx")
    _half(root / "half.onnx")
    generator = np.random.default_rng(100)
    np.savez(root / "tokens.npz", input_ids=generator.integers(0, VOCABULARY, (12, 16)))
    np.savez(root / "pictures.npz", x=generator.standard_normal((24, 3, 16, 16)).astype(np.float32))
    np.savez(root / "rows.npz", x=generator.standard_normal((24, 64)).astype(np.float16))


def _folder(place: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    place.mkdir(parents=True)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))


class _Tensors(dict[str, np.ndarray]):
    """Random weights by name: normal, some channels and single values far out, as in trained networks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = np.random.default_rng(seed)

    def weight(self, name: str, *shape: int) -> None:
        values = self._generator.standard_normal(shape) * 0.05
        values[self._generator.random(shape) < 0.01] *= 6
        self[name] = values.astype(np.float32)

    def vector(self, name: str, size: int, around: float = 0.0) -> None:
        self[name] = (around + self._generator.standard_normal(size) * 0.05).astype(np.float32)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        self.weight(f"{name}.weight", outputs, inputs)
        if bias:
            self.vector(f"{name}.bias", outputs)

    def norm(self, name: str, size: int, *, bias: bool = True) -> None:
        self.vector(f"{name}.weight", size, 1.0)
        if bias:
            self.vector(f"{name}.bias", size)


def _attention_of_llama(tensors: _Tensors, prefix: str) -> None:
    for name, outputs in {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "o_proj": HIDDEN}.items():
        tensors.linear(f"{prefix}.self_attn.{name}", outputs, HIDDEN, bias=False)
    tensors.norm(f"{prefix}.input_layernorm", HIDDEN, bias=False)
    tensors.norm(f"{prefix}.post_attention_layernorm", HIDDEN, bias=False)


def _llama(seed: int) -> dict[str, np.ndarray]:
    tensors = _Tensors(seed)
    tensors.weight("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        _attention_of_llama(tensors, prefix)
        tensors.linear(f"{prefix}.mlp.gate_proj", INTERMEDIATE, HIDDEN, bias=False)
        tensors.linear(f"{prefix}.mlp.up_proj", INTERMEDIATE, HIDDEN, bias=False)
        tensors.linear(f"{prefix}.mlp.down_proj", HIDDEN, INTERMEDIATE, bias=False)
    tensors.norm("model.norm", HIDDEN, bias=False)
    tensors.linear("lm_head", VOCABULARY, HIDDEN, bias=False)
    return tensors


def _without_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: part for name, part in tensors.items() if name != "lm_head.weight"}


def _mixtral(seed: int) -> dict[str, np.ndarray]:
    tensors = _Tensors(seed)
    tensors.weight("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    _attention_of_llama(tensors, "model.layers.0")
    experts = "model.layers.0.block_sparse_moe"
    tensors.linear(f"{experts}.gate", 4, HIDDEN, bias=False)
    for index in range(4):
        tensors.linear(f"{experts}.experts.{index}.w1", INTERMEDIATE, HIDDEN, bias=False)
        tensors.linear(f"{experts}.experts.{index}.w2", HIDDEN, INTERMEDIATE, bias=False)
        tensors.linear(f"{experts}.experts.{index}.w3", INTERMEDIATE, HIDDEN, bias=False)
    tensors.norm("model.norm", HIDDEN, bias=False)
    tensors.linear("lm_head", VOCABULARY, HIDDEN, bias=False)
    return tensors


def _bert(seed: int) -> dict[str, np.ndarray]:
    tensors = _Tensors(seed)
    tensors.weight("embeddings.word_embeddings.weight", VOCABULARY, HIDDEN)
    tensors.weight("embeddings.position_embeddings.weight", 64, HIDDEN)
    tensors.weight("embeddings.token_type_embeddings.weight", 2, HIDDEN)
    tensors.norm("embeddings.LayerNorm", HIDDEN)
    for index in range(LAYERS):
        prefix = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            tensors.linear(f"{prefix}.attention.self.{name}", HIDDEN, HIDDEN)
        tensors.linear(f"{prefix}.attention.output.dense", HIDDEN, HIDDEN)
        tensors.norm(f"{prefix}.attention.output.LayerNorm", HIDDEN)
        tensors.linear(f"{prefix}.intermediate.dense", INTERMEDIATE, HIDDEN)
        tensors.linear(f"{prefix}.output.dense", HIDDEN, INTERMEDIATE)
        tensors.norm(f"{prefix}.output.LayerNorm", HIDDEN)
    tensors.linear("pooler.dense", HIDDEN, HIDDEN)
    return tensors


def _gpt2(seed: int) -> dict[str, np.ndarray]:
    """Its layers are stored ``[inputs, outputs]``."""
    tensors = _Tensors(seed)
    tensors.weight("wte.weight", VOCABULARY, HIDDEN)
    tensors.weight("wpe.weight", 64, HIDDEN)
    tensors.norm("h.0.ln_1", HIDDEN)
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
    for name, (inputs, outputs) in shapes.items():
        tensors.weight(f"h.0.{name}.weight", inputs, outputs)
        tensors.vector(f"h.0.{name}.bias", outputs)
    tensors.norm("ln_f", HIDDEN)
    return tensors


def _llama_config(*, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "hidden_act": "silu",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip


def _bert_config() -> dict[str, Any]:
    return {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": HIDDEN, "hidden_act": "gelu",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "dtype": "float32",
    }  # fmt: skip


def _pickle(place: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    torch.save({name: torch.from_numpy(part) for name, part in tensors.items()}, place)


def _save_graph(place: Path, nodes: list[Any], given: Any, returned: Any, constants: dict[str, np.ndarray]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "golden", [given], [returned], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, place)


def _cnn(place: Path) -> None:
    """Two convolutions with batch norms, pooled, and a Gemm."""
    from onnx import TensorProto, helper

    tensors = _Tensors(20)
    nodes, last = [], "x"
    for index, (inputs, outputs) in enumerate([(3, 16), (16, 32)]):
        tensors.weight(f"conv{index}.weight", outputs, inputs, 3, 3)
        norm = [f"bn{index}.{part}" for part in ("scale", "bias", "mean", "variance")]
        for name, around in zip(norm, (1.0, 0.0, 0.0, 0.0), strict=True):
            tensors.vector(name, outputs, around)
        tensors[norm[3]] = np.abs(tensors[norm[3]]) + np.float32(0.5)
        nodes += [
            helper.make_node(
                "Conv", [last, f"conv{index}.weight"], [f"c{index}"], f"conv{index}",
                kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1 + index] * 2,
            ),
            helper.make_node("BatchNormalization", [f"c{index}", *norm], [f"b{index}"], f"bn{index}"),
            helper.make_node("Relu", [f"b{index}"], [f"r{index}"], f"relu{index}"),
        ]  # fmt: skip
        last = f"r{index}"
    tensors.linear("fc", 10, 32)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    _save_graph(place, nodes, given, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10]), tensors)


def _encoder(place: Path) -> None:
    """A transformer's layer over looked-up tokens, with one head."""
    from onnx import TensorProto, helper

    tensors = _Tensors(21)
    tensors.weight("embeddings.table", 512, HIDDEN)
    tensors["root"] = np.array(HIDDEN**0.5, np.float32)
    for name, inputs, outputs in [
        ("query", 64, 64), ("key", 64, 64), ("value", 64, 64), ("out", 64, 64), ("up", 64, 96), ("down", 96, 64)
    ]:  # fmt: skip
        tensors.weight(f"{name}.weight", inputs, outputs)
        tensors.vector(f"{name}.bias", outputs)
    nodes = [helper.make_node("Gather", ["embeddings.table", "input_ids"], ["looked"], "lookup")]

    def norm(name: str, value: str) -> str:
        tensors.norm(name, HIDDEN)
        nodes.append(helper.make_node("LayerNormalization", [value, f"{name}.weight", f"{name}.bias"], [name], name))
        return name

    def linear(name: str, value: str) -> str:
        nodes.append(helper.make_node("MatMul", [value, f"{name}.weight"], [f"{name}.product"], f"{name}.matmul"))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [name], f"{name}.add"))
        return name

    hidden = norm("norm0", "looked")
    query, key, value = (linear(name, hidden) for name in ("query", "key", "value"))
    nodes += [
        helper.make_node("Transpose", [key], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", [query, "turned"], ["products"], "scores"),
        helper.make_node("Div", ["products", "root"], ["scaled"], "scale"),
        helper.make_node("Softmax", ["scaled"], ["shares"], "softmax"),
        helper.make_node("MatMul", ["shares", value], ["mixed"], "mix"),
    ]
    linear("out", "mixed")
    nodes.append(helper.make_node("Add", ["out", hidden], ["residual0"], "residual0"))
    hidden = norm("norm1", "residual0")
    linear("up", hidden)
    nodes.append(helper.make_node("Relu", ["up"], ["bent"], "relu"))
    linear("down", "bent")
    nodes.append(helper.make_node("Add", ["down", hidden], ["residual1"], "residual1"))
    last = norm("norm2", "residual1")
    given = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "s"])
    _save_graph(place, nodes, given, helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", "s", 64]), tensors)


def _half(place: Path) -> None:
    """Two Gemms in half precision."""
    from onnx import TensorProto, helper

    tensors = _Tensors(22)
    tensors.linear("first", 128, 64)
    tensors.linear("second", 32, 128)
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["h"], "first", transB=1),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "second.weight", "second.bias"], ["y"], "second", transB=1),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 64])
    returned = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 32])
    _save_graph(place, nodes, given, returned, {name: part.astype(np.float16) for name, part in tensors.items()})


# Cases


def _convert(model: str, suffix: str = "", **wishes: Any) -> Callable[[Path, Path], object]:
    """Converts a model; a dict is a recipe, and data is one of the files beside the models."""

    def write(root: Path, out: Path) -> object:
        import quantcli

        given = dict(wishes)
        given |= {key: root / given[key] for key in ("data", "calibration") if key in given}
        if "recipe" in given:
            given["recipe"] = recipe = out.parent / "recipe.yaml"
            recipe.write_text(json.dumps(wishes["recipe"]))
        return quantcli.convert(root / model, out.with_name(out.name + suffix), **given)

    return write


def _calibrate(model: str, data: str, method: str) -> Callable[[Path, Path], object]:
    def write(root: Path, out: Path) -> object:
        import quantcli

        statistics = out.with_name(out.name + ".safetensors")
        return quantcli.calibrate(root / model, output=statistics, data=str(root / data), method=method)

    return write


def _through(first: dict[str, Any], second: dict[str, Any], suffix: str = "") -> Callable[[Path, Path], object]:
    """Converts, and converts what came of it; both artifacts count."""

    def write(root: Path, out: Path) -> object:
        _convert(**first)(root, out)
        between = root / "between"
        shutil.copytree(out, between)
        try:
            return _convert(model="between", suffix=suffix, **second)(root, out.with_name(out.name + "-second"))
        finally:
            shutil.rmtree(between)

    return write


def cases() -> Iterator[Case]:
    """All cases, by groups."""
    yield from _without_data()
    yield from _containers()
    yield from _graphs()
    yield from _graphs_with_data()
    yield from _with_data()
    yield from _exported()


def _without_data() -> Iterator[Case]:
    for name, scheme in SCHEMES.items():
        for format in FORMATS:
            recipe = {"scheme": scheme, "format": format}
            # In awq all groups are of one size.
            recipe |= {"group_size": 32} if (name, format) == ("int4", "awq") else {}
            yield Case(f"llama {name} as {format}", _convert("llama-untyped", recipe=recipe))
        for model in ("tied", "bert", "gpt2", "mixtral", "float16"):
            yield Case(f"{model} {name}", _convert(f"{model}-untyped", recipe={"scheme": scheme}))
        yield Case(f"bare file {name}", _convert("bare.safetensors", ".safetensors", recipe={"scheme": scheme}))
    for name in ("int4", "nf4", "bf16", "int8"):
        yield Case(f"state dict {name}", _convert("state.pt", ".safetensors", scheme=name))
    # More values than are worked on at a time.
    for name in ("int4", "int4-asymmetric", "int8", "int8-tensor", "nf4-double", "bf16"):
        yield Case(f"large {name}", _convert("large.safetensors", ".safetensors", recipe={"scheme": SCHEMES[name]}))
    yield Case("bare file to a folder", _convert("bare.safetensors", scheme="int4"))
    for algorithm in ("rtn", "mse"):
        for name in ("int4", "int8", "nf4", "int4-asymmetric"):
            recipe = {"scheme": SCHEMES[name], "algorithm": algorithm}
            yield Case(f"llama {name} by {algorithm}", _convert("llama-untyped", recipe=recipe))
    for size in (16, 32, 64):
        yield Case(f"llama int4 groups of {size}", _convert("llama-untyped", scheme="int4", group_size=size))
    for rest in ("keep", "fp16", "bf16"):
        yield Case(f"llama int8 rest {rest}", _convert("llama-untyped", scheme="int8", rest=rest))
    yield Case("llama int4 skip", _convert("llama-untyped", scheme="int4", skip=["*.down_proj", "*.layers.0.*"]))
    yield Case("llama in shards", _convert("llama-untyped", recipe={"scheme": "int4", "max_shard_size": 40_000}))
    rules = [{"match": "*.down_proj", "scheme": "int8"}, {"match": ["*.q_proj", "*.k_proj"], "algorithm": "rtn"}]
    for format in FORMATS[:3]:
        recipe = {"scheme": "int4", "group_size": 32, "format": format, "rules": rules}
        yield Case(f"llama rules {format}", _convert("llama-untyped", recipe=recipe))
    head = {"scheme": "int4", "rules": [{"match": "lm_head", "scheme": "int8"}]}
    yield Case("llama head", _convert("llama-untyped", recipe=head))
    for target in ("vllm", "sglang"):
        yield Case(f"llama int4 {target}", _convert("llama", scheme="int4", group_size=32, target=target))


def _containers() -> Iterator[Case]:
    codes = {"int4": 32, "int4-asymmetric": None, "int8": None, "int8-groups": None}
    for name, size in codes.items():
        for before in FORMATS[:3]:
            for after in FORMATS[:3]:
                if before != after:
                    wishes = {"scheme": SCHEMES[name], "format": before} | ({"group_size": size} if size else {})
                    first = {"model": "float16-untyped", "recipe": wishes}
                    yield Case(f"{name} {before} to {after}", _through(first, {"format": after}))
    for name, format in [("int4", "gptq"), ("int4", "awq"), ("int8", "compressed-tensors"), ("nf4", "bitsandbytes")]:
        wishes = {"scheme": name, "format": format} | ({"group_size": 32} if name == "int4" else {})
        for scheme in ("bf16", "fp16"):
            first = {"model": "llama-untyped", "recipe": wishes}
            yield Case(f"{name} {format} to {scheme}", _through(first, {"scheme": scheme}))


def _graphs() -> Iterator[Case]:
    for model in ("cnn", "encoder", "half"):
        for name, scheme in SCHEMES.items():
            yield Case(f"{model} {name}", _convert(f"{model}.onnx", ".onnx", recipe={"scheme": scheme}))
    for algorithm in ("rtn", "mse"):
        yield Case(
            f"encoder int4 by {algorithm}", _convert("encoder.onnx", ".onnx", scheme="int4", algorithm=algorithm)
        )
    for size in (16, 32):
        yield Case(f"encoder int4 groups of {size}", _convert("encoder.onnx", ".onnx", scheme="int4", group_size=size))
    yield Case("encoder skip", _convert("encoder.onnx", ".onnx", scheme="int8-dynamic", skip=["out.*", "up.*"]))
    yield Case("cnn fp16 rest", _convert("cnn.onnx", ".onnx", scheme="int8", rest="fp16"))
    tables = {"scheme": "int8-dynamic", "rules": [{"match": "*embeddings*", "scheme": "int4", "group_size": 32}]}
    yield Case("encoder rules", _convert("encoder.onnx", ".onnx", recipe=tables))
    yield Case("encoder older runtime", _convert("encoder.onnx", ".onnx", scheme="int4", target="onnxruntime==1.22"))


_DATA = {"cnn": "pictures.npz", "encoder": "tokens.npz", "half": "rows.npz"}


def _graphs_with_data() -> Iterator[Case]:
    for model in ("cnn", "encoder"):
        for method in ("minmax", "percentile", "entropy", "mse"):
            write = _calibrate(f"{model}.onnx", _DATA[model], method)
            yield Case(f"{model} statistics {method}", write, products=True)
    for model, data in _DATA.items():
        for name in ("int8-static", "int8-dynamic", "int4"):
            wishes = {"scheme": name, "data": data}
            yield Case(f"{model} {name} data", _convert(f"{model}.onnx", ".onnx", **wishes), products=True)
            chosen = _convert(f"{model}.onnx", ".onnx", **wishes, algorithm="gptq")
            yield Case(f"{model} {name} by gptq", chosen, products=True)
    w4a8 = _convert("cnn.onnx", ".onnx", recipe={"scheme": W4A8}, data="pictures.npz")
    yield Case("cnn w4a8", w4a8, products=True)
    qat = {"qat": {"steps": 4, "batch_size": 8, "held_out": 0.25, "evaluate_every": 2}}
    for model, name, scheme in [
        ("cnn", "w4a8", W4A8), ("cnn", "int8-static", "int8-static"), ("encoder", "int4", "int4"),
        ("encoder", "int8-dynamic", "int8-dynamic"),
    ]:  # fmt: skip
        write = _convert(f"{model}.onnx", ".onnx", recipe={"scheme": scheme, "steps": [qat]}, data=_DATA[model])
        yield Case(f"{model} {name} by qat", write, products=True, slow=True)


def _with_data() -> Iterator[Case]:
    chosen = [("llama", "int4", chain) for chain in CHAINS] + [
        ("llama", "int4-asymmetric", "gptq"), ("llama", "int4-asymmetric", "autoround"), ("llama", "int8", "awq"),
        ("llama", "int8", "gptq-tune"), ("llama", "int8-dynamic", "smoothquant"), ("llama", "int8-dynamic", "gptq"),
        ("llama", "int8-static", "autoround"), ("bert", "int4", "awq-gptq"), ("bert", "int8-static", "smoothquant"),
        ("bert", "int8-static", "gptq-qat"),
    ]  # fmt: skip
    for model, name, chain in chosen:
        recipe = {"scheme": SCHEMES[name], "steps": CHAINS[chain], "target": "vllm"}
        recipe |= {"group_size": 32} if name == "int4" else {}
        write = _convert(model, recipe=recipe, data="tokens.npz")
        yield Case(f"{model} {name} by {chain}", write, products=True, slow=True)
    for format in ("gptq", "awq"):
        recipe = {"scheme": "int4", "group_size": 32, "steps": ["gptq"], "target": "vllm", "format": format}
        write = _convert("llama", recipe=recipe, data="tokens.npz")
        yield Case(f"llama int4 as {format} by gptq", write, products=True, slow=True)
    recipe = {"scheme": "int4", "group_size": 32, "target": "vllm"}
    yield Case("tied int4 data", _convert("tied", recipe=recipe, data="tokens.npz"), products=True, slow=True)


def _exported() -> Iterator[Case]:
    """Through the exporter."""
    for model, name in [("llama", "int4"), ("bert", "int8-dynamic"), ("bert", "nf4")]:
        write = _convert(model, ".onnx", scheme=name, format="onnx")
        yield Case(f"{model} {name} exported", write, products=True, slow=True)
    first = {"model": "llama", "recipe": {"scheme": "int4", "group_size": 32, "format": "awq", "target": "vllm"}}
    yield Case("int4 awq to onnx", _through(first, {"format": "onnx"}, ".onnx"), products=True, slow=True)


# Running


def run(case: Case, root: Path) -> str:
    """SHA-256 of all that a case writes, file names included; the error's name where it is refused."""
    with tempfile.TemporaryDirectory(dir=root) as place:
        parent = Path(place)
        try:
            case.write(root, parent / "out")
        except Exception as error:
            # Refusals are quantcli's own; anything else is a defect of it or of the case.
            if not type(error).__module__.startswith("quantcli"):
                raise
            return f"refused: {type(error).__name__}"
        written = hashlib.sha256()
        for path in sorted(parent.rglob("*")):
            if path.is_file() and path.name != "recipe.yaml":
                content = _VOLATILE.sub(rb"\1", path.read_bytes())
                written.update(f"{path.relative_to(parent).as_posix()} {len(content)}\n".encode())
                written.update(content)
        return written.hexdigest()


def use_float32() -> None:
    """Let products of floats be computed in float32 and by one thread, whatever the processor offers."""
    import torch

    torch.cpu.get_capabilities = dict
    torch.set_num_threads(1)


def processor() -> str:
    """What decides how a product of floats is rounded: the processor, and the libraries that multiply.

    Cores count, too: the gradients of a graph in training are added up thread by thread (`encoder int4 by qat` differs
    between one core and two).
    """
    import onnxruntime
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    told = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    versions = [f"torch {torch.__version__}", f"onnxruntime {onnxruntime.__version__}", f"numpy {np.__version__}"]
    return ", ".join(
        [
            platform.machine(),
            model,
            torch.backends.cpu.get_cpu_capability(),
            f"{len(os.sched_getaffinity(0))} cores",
            *told,
            *versions,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    wishes = parser.parse_args()
    # Beside this file lie modules named like libraries.
    sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    use_float32()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        build(root)
        hashes = {}
        for case in cases():
            if wishes.only in case.name:
                began = time.monotonic()
                hashes[case.name] = run(case, root)
                print(f"{time.monotonic() - began:6.2f} s  {case.name}: {hashes[case.name]}", file=sys.stderr)
    document = {"processor": processor(), "cases": hashes}
    wishes.write.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
