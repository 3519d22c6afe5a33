"""Formats: round trips in slabs, and equality with what compressed-tensors and bitsandbytes themselves do."""

from __future__ import annotations

import re
from dataclasses import replace
from math import gcd
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from hypothesis import given, settings
from hypothesis import strategies as st
from support.artifacts import CHECKPOINT_SCHEMES
from torch import Tensor
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from quantcli.algorithms import rtn
from quantcli.core import nf4, numerics
from quantcli.core.dtypes import TORCH_NAMES, torch_dtype
from quantcli.core.scheme import PRESETS, Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorSpec
from quantcli.formats import awq, bitsandbytes, compressed_tensors, gptq, safetensors
from quantcli.formats.base import Format, QuantizedFormat
from quantcli.formats.module_patterns import module_patterns

TENSOR, CHANNEL, GROUP = Granularity("tensor"), Granularity("channel"), Granularity("group", 12)
DYNAMIC = NumberFormat("int8", Granularity("token"), dynamic=True)
PACKED = [
    Scheme(NumberFormat(dtype, granularity, symmetric))
    for dtype in ("int4", "int8")
    for granularity in (TENSOR, CHANNEL, GROUP)
    for symmetric in (True, False)
    if symmetric or granularity != TENSOR
]
WITH_INPUTS = [Scheme(NumberFormat("int8", granularity), DYNAMIC) for granularity in (TENSOR, CHANNEL)]
BLOCKS = [Scheme(NumberFormat("nf4", Granularity("block", size))) for size in (32, 64)]
NESTED = [replace(scheme, weights=replace(scheme.weights, double_quantized=True)) for scheme in BLOCKS]

#: gptq has no zero point at the lowest code; awq has groups alone.
RAISED = [
    Scheme(replace(scheme.weights, raised=not scheme.weights.symmetric))
    for scheme in PACKED
    if scheme.weights.granularity != TENSOR
]
INT4_GROUPS = [Scheme(NumberFormat("int4", GROUP, symmetric)) for symmetric in (True, False)]

UNGROUPED = [scheme for scheme in [*PACKED, *WITH_INPUTS] if scheme.weights.granularity != GROUP]
CASES: list[tuple[QuantizedFormat, Scheme, tuple[int, int]]] = [
    *((compressed_tensors, scheme, (13, 36)) for scheme in PACKED),
    *((compressed_tensors, scheme, (13, 37)) for scheme in UNGROUPED),
    *((gptq, scheme, (24, 48)) for scheme in RAISED),
    *((awq, scheme, (24, 36)) for scheme in INT4_GROUPS),
    *((bitsandbytes, scheme, shape) for scheme in [*BLOCKS, *NESTED] for shape in [(10, 96), (192, 5), (300, 64)]),
]
each_case = pytest.mark.parametrize(
    ("form", "scheme", "shape"), CASES, ids=lambda value: getattr(value, "NAME", str(value))
)
each_scale_dtype = pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])


def quantized(shape: tuple[int, int], scheme: Scheme, dtype: str = "F32") -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    return rtn.run(weight, scheme.weights, torch_dtype(dtype))


def dequantized(tensor: QuantizedTensor) -> Tensor:
    codes = numerics.in_groups(tensor.codes, tensor.number_format)
    restored = numerics.dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format)
    return restored.reshape(tensor.shape)


def row_ranges(form: QuantizedFormat, shape: tuple[int, ...], scheme: Scheme) -> list[tuple[int, int]]:
    """Ranges of a few rows that cut no block."""
    step = 5 if form.STORAGE.by_rows else shape[0]
    if scheme.weights.granularity.kind == "block":
        size = scheme.weights.granularity.size or 1
        step = size // gcd(size, shape[1])
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def stored_layer(
    form: QuantizedFormat, tensor: QuantizedTensor, scheme: Scheme, dtype: str = "F32"
) -> dict[str, Tensor]:
    """All tensors of a layer named ``weight``, its codes written slab by slab, the last one first."""
    name = form.codes_name("weight", scheme)
    spec = form.layout("weight", tensor.shape, scheme, dtype)[name]
    data = bytearray(b"\xa5" * spec.nbytes)
    for start, stop in reversed(row_ranges(form, tensor.shape, scheme)):
        part = form.encode_codes(tensor.codes[start:stop], scheme).numpy().tobytes()
        offset = form.codes_offset(start, tensor.shape[1], scheme)
        data[offset : offset + len(part)] = part
    assert len(data) == spec.nbytes
    codes = torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
    return {name: codes} | form.encode_scales("weight", tensor, scheme, dtype)


@each_case
def test_codes_round_trip_in_slabs(form: QuantizedFormat, scheme: Scheme, shape: tuple[int, int]) -> None:
    tensor = quantized(shape, scheme)
    stored = stored_layer(form, tensor, scheme)[form.codes_name("weight", scheme)]
    data = stored.reshape(-1).view(torch.uint8)
    for start, stop in row_ranges(form, shape, scheme):
        first, last = (form.codes_offset(row, shape[1], scheme) for row in (start, stop))
        slab = data[first:last].view(stored.dtype).reshape(-1, *stored.shape[1:])
        assert torch.equal(form.decode_codes(slab, shape[1], scheme), tensor.codes[start:stop])
    assert torch.equal(form.decode_codes(stored, shape[1], scheme), tensor.codes)


@each_scale_dtype
@each_case
def test_scales_round_trip(form: QuantizedFormat, scheme: Scheme, shape: tuple[int, int], dtype: str) -> None:
    tensor = quantized(shape, scheme, dtype)
    stored = form.encode_scales("weight", tensor, scheme, dtype)
    scale, zero_point = form.decode_scales("weight", shape, scheme, stored.__getitem__)
    wanted = tensor.scale
    if scheme.weights.double_quantized:
        wanted = nf4.dequantize_scales(*nf4.quantize_scales(tensor.scale))
    assert scale.dtype == torch.float32
    assert torch.equal(scale, wanted)
    if tensor.zero_point is None:
        assert zero_point is None
    else:
        assert zero_point is not None and zero_point.dtype == torch.int8
        assert torch.equal(zero_point, tensor.zero_point)


@each_scale_dtype
@each_case
def test_layout_is_what_is_written(form: QuantizedFormat, scheme: Scheme, shape: tuple[int, int], dtype: str) -> None:
    tensor = quantized(shape, scheme, dtype)
    layout = form.layout("weight", shape, scheme, dtype)
    name = form.codes_name("weight", scheme)
    codes = form.encode_codes(tensor.codes, scheme)
    assert (codes.dtype, codes.nbytes) == (torch_dtype(layout[name].dtype), layout[name].nbytes)
    assert form.codes_offset(shape[0], shape[1], scheme) == layout.pop(name).nbytes
    names = {torch_dtype(name): name for name in TORCH_NAMES}
    others = form.encode_scales("weight", tensor, scheme, dtype)
    assert {key: TensorSpec(names[part.dtype], tuple(part.shape)) for key, part in others.items()} == layout
    assert all(part.is_contiguous() for part in others.values())


@each_scale_dtype
@pytest.mark.parametrize("scheme", [*PACKED, *WITH_INPUTS], ids=str)
def test_compressed_tensors_reads_and_writes_the_same(scheme: Scheme, dtype: str) -> None:
    tensor = quantized((13, 36), scheme, dtype)
    config = QuantizationConfig.model_validate(compressed_tensors.config({"layer": scheme}, [], dtype))
    theirs = config.config_groups["group_0"]
    compressor = IntQuantizationCompressor if scheme.inputs else PackedQuantizationCompressor
    stored = stored_layer(compressed_tensors, tensor, scheme, dtype)
    # Each value is rounded once, to the dtype of the scales: the product itself is exact in float32.
    wanted = dequantized(tensor).to(torch_dtype(dtype))
    assert torch.equal(compressor.decompress(dict(stored), theirs)["weight"], wanted)
    state = {"weight": dequantized(tensor), "weight_scale": stored["weight_scale"].float()}
    if tensor.zero_point is not None:
        state["weight_zero_point"] = tensor.zero_point
    written = compressor.compress(state, theirs)
    written["weight_scale"] = stored["weight_scale"]
    assert written.keys() == stored.keys()
    for name, part in written.items():
        assert part.dtype == stored[name].dtype
        assert torch.equal(part, stored[name]), name


@each_scale_dtype
@pytest.mark.parametrize("shape", [(10, 96), (300, 64)], ids=str)
@pytest.mark.parametrize("scheme", [*BLOCKS, *NESTED], ids=str)
def test_bitsandbytes_reads_the_same(scheme: Scheme, shape: tuple[int, int], dtype: str) -> None:
    tensor = quantized(shape, scheme)
    stored = stored_layer(bitsandbytes, tensor, scheme, dtype)
    if scheme.weights.double_quantized:
        tensor.scale, _ = bitsandbytes.decode_scales("weight", shape, scheme, stored.__getitem__)
    packed = stored.pop("weight")
    state = bnb.QuantState.from_dict(stored, torch.device("cpu"))
    assert (state.nested, state.dtype) == (scheme.weights.double_quantized, torch_dtype(dtype))
    wanted = dequantized(tensor).to(torch_dtype(dtype))
    # A row for each block: with AVX-512, bitsandbytes 0.50 reads its own files wrongly where blocks span rows.
    state.shape = torch.Size((tensor.codes.numel() // state.blocksize, state.blocksize))
    found = bnb.dequantize_4bit(packed, state).reshape(shape)
    # One ulp: which kernel rounds depends on the processor.
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(wanted.dtype).eps, atol=0)


@pytest.mark.parametrize("scheme", [BLOCKS[1], NESTED[1]], ids=str)
def test_bitsandbytes_writes_the_same(scheme: Scheme) -> None:
    tensor = quantized((300, 64), scheme)
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) + 0.1
    nested = scheme.weights.double_quantized
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    stored = stored_layer(bitsandbytes, tensor, scheme)
    assert torch.equal(stored.pop("weight"), packed)
    theirs = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    assert theirs.keys() == stored.keys()
    for name in theirs.keys() - {"weight.quant_state.bitsandbytes__nf4"}:
        # Second-level codes may differ where two are almost equally near; test_numerics bounds that.
        same = (theirs[name] == stored[name]).float().mean()
        assert same == 1 or (nested and name == "weight.absmax" and same > 0.99), name
    ours = bnb.QuantState.from_dict(stored, torch.device("cpu")).as_dict()
    plain = {name: value for name, value in state.as_dict().items() if not isinstance(value, Tensor)}
    assert {name: ours[name] for name in plain} == plain


def test_the_largest_bitsandbytes_state_fits_its_room() -> None:
    scheme = replace(NESTED[0], weights=replace(NESTED[0].weights, granularity=Granularity("block", 4096)))
    scale = torch.tensor([-1.1754943508222875e-38])
    tensor = QuantizedTensor(torch.empty(0), scale, None, (10**12, 10**12), scheme.weights)
    state = bitsandbytes.encode_scales("weight", tensor, scheme, "BF16")["weight.quant_state.bitsandbytes__nf4"]
    assert state.shape == (bitsandbytes.STATE_BYTES,)
    assert bytes(state.tolist()).rstrip(b" ").endswith(b"}")


def unpacked(packed: Tensor, bits: int, order: list[int]) -> Tensor:
    """Unsigned fields of every word, in Python's integers: the last axis grows."""
    words = [[[word >> bits * i & (1 << bits) - 1 for i in order] for word in row] for row in packed.tolist()]
    return torch.tensor(words).flatten(1)


@pytest.mark.parametrize(("form", "scheme", "shape"), [case for case in CASES if not case[0].STORAGE.by_rows], ids=str)
def test_transposed_formats_store_what_their_definition_says(
    form: QuantizedFormat, scheme: Scheme, shape: tuple[int, int]
) -> None:
    tensor = quantized(shape, scheme, "F16")
    stored = stored_layer(form, tensor, scheme, "F16")
    bits = scheme.weights.bits
    if form is awq:
        order, stored_less = [0, 4, 1, 5, 2, 6, 3, 7], 0
        codes = unpacked(stored["qweight"], 4, order)
    else:
        order, stored_less = list(range(32 // bits)), 1
        codes = unpacked(stored["qweight"].T, bits, order).T
        assert stored["g_idx"].tolist() == [i // (scheme.weights.granularity.size or 48) for i in range(48)]
    zero_points = unpacked(stored["qzeros"], bits, order) + stored_less
    middle = 1 << (bits - 1)
    assert torch.equal(codes.T - middle, tensor.codes.long())
    assert torch.equal(stored["scales"], tensor.scale.T.half())
    if tensor.zero_point is None:
        assert (zero_points == middle).all()
    else:
        assert torch.equal(zero_points.T - middle, tensor.zero_point.long())
        assert zero_points.unique().numel() > 2


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_gptq_never_gets_a_zero_point_that_it_cannot_store(dtype: str) -> None:
    positive = torch.rand(8, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    scheme = Scheme(NumberFormat(dtype, GROUP, symmetric=False))
    lowest = rtn.run(positive, scheme.weights, torch.float16)
    assert lowest.zero_point is not None and (lowest.zero_point == numerics.code_range(scheme.weights)[0]).all()
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq.encode_scales("weight", lowest, scheme, "F16")
    raised = Scheme(replace(scheme.weights, raised=True))
    tensor = rtn.run(positive, raised.weights, torch.float16)
    assert tensor.zero_point is not None and (tensor.zero_point == lowest.zero_point + 1).all()
    # Nothing is clipped: the error stays within half a step, or what fp16 leaves of it.
    error = (dequantized(tensor) - positive).reshape(8, 2, 12).abs().amax(-1)
    assert (error <= tensor.scale * 0.51).all()
    gptq.encode_scales("weight", tensor, raised, "F16")


@pytest.mark.parametrize(
    ("form", "scheme", "shape", "reason"),
    [
        (gptq, RAISED[0], (12, 48), "8 values into a word"),
        (gptq, RAISED[0], (16, 44), "16 x 44"),
        (gptq, Scheme(NumberFormat("int8", CHANNEL)), (18, 48), "4 values"),
        (gptq, Scheme(NumberFormat("int8", CHANNEL)), (12, 48), None),
        (awq, INT4_GROUPS[0], (12, 48), "8 outputs"),
        (awq, INT4_GROUPS[0], (16, 36), None),
        (compressed_tensors, RAISED[0], (13, 37), None),
        (bitsandbytes, BLOCKS[0], (13, 64), "multiples of 32, not 13"),
        (bitsandbytes, BLOCKS[0], (32, 37), "not 37"),
        (bitsandbytes, BLOCKS[0], (32, 64), None),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_have_a_reason(
    form: QuantizedFormat, scheme: Scheme, shape: tuple[int, int], reason: str | None
) -> None:
    found = form.fits(shape, scheme)
    assert found is None if reason is None else reason in (found or "")


def test_awq_knows_one_group_size() -> None:
    other = Scheme(NumberFormat("int4", Granularity("group", 24)))
    assert awq.together(INT4_GROUPS) is None
    assert "12 and 24" in (awq.together([*INT4_GROUPS, other]) or "")
    assert gptq.together([*RAISED]) is None


LEAVES = ("q_proj", "down_proj", "mlp.gate", "mlp.gate_proj")
MODULES = [f"model.layers.{layer}.{leaf}" for layer in (0, 1, 10) for leaf in LEAVES]


def test_compressed_tensors_config() -> None:
    int4, int8 = PRESETS["int4"], PRESETS["int8-dynamic"]
    left = ["lm_head", *(name for name in MODULES if name.endswith("mlp.gate"))]
    schemes = {name: int8 if name.endswith("down_proj") else int4 for name in MODULES if name not in left}
    config = compressed_tensors.config(schemes, left, "BF16")
    parsed = QuantizationConfig.model_validate(config)
    assert (parsed.format, parsed.quantization_status, config["quant_method"]) == (
        "mixed-precision",
        "compressed",
        "compressed-tensors",
    )
    eight, four = parsed.config_groups["group_0"], parsed.config_groups["group_1"]
    # The general target comes last.
    assert four.targets == ["Linear"]
    assert (four.weights.num_bits, four.weights.group_size, four.weights.strategy) == (4, 128, "group")
    assert (four.format, four.input_activations) == ("pack-quantized", None)
    assert (eight.weights.num_bits, eight.weights.strategy, eight.format) == (8, "channel", "int-quantized")
    assert (eight.input_activations.num_bits, eight.input_activations.strategy) == (8, "token")
    assert eight.input_activations.dynamic and not eight.weights.dynamic
    for name in [*MODULES, "lm_head"]:
        assert any(match_name(name, target) for target in parsed.ignore) == (name in left)
        assert any(match_name(name, target) for target in eight.targets) == (schemes.get(name) == int8)
    assert AutoQuantizationConfig.from_dict(dict(config)).quantization_config.ignore == parsed.ignore


def test_compressed_tensors_config_of_one_layout_names_it() -> None:
    assert compressed_tensors.config({"a": PACKED[0], "b": PACKED[1]}, [], "F32")["format"] == "pack-quantized"
    assert compressed_tensors.config({"a": WITH_INPUTS[0]}, [], "F32")["format"] == "int-quantized"


def excluded_by_transformers(name: str, section: dict[str, Any]) -> bool:
    return not should_convert_module(name, AutoQuantizationConfig.from_dict(dict(section)).modules_to_not_convert)


def test_awq_config() -> None:
    # "layers" stands for a head's name that some models have, and that here is a part of every layer's name.
    left = ["lm_head", "layers", *(name for name in MODULES if name.endswith("mlp.gate"))]
    quantized_modules = [name for name in MODULES if name not in left]
    section = awq.config(dict.fromkeys(quantized_modules, PRESETS["int4"]), left, "F16")
    parsed = AutoQuantizationConfig.from_dict(dict(section))
    assert (parsed.bits, parsed.group_size, parsed.zero_point, parsed.format) == (4, 128, True, "gemm")
    for name in [*MODULES, "lm_head"]:
        assert excluded_by_transformers(name, section) == (name in left), name


def test_gptq_config_of_one_scheme() -> None:
    section = gptq.config(dict.fromkeys(MODULES, PRESETS["int4"]), ["lm_head"], "F16")
    assert {key: section[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
    }  # fmt: skip
    parsed = AutoQuantizationConfig.from_dict(dict(section))
    assert (parsed.bits, parsed.group_size, parsed.format) == (4, 128, "gptq")
    assert "modules_in_block_to_quantize" not in section and "block_name_to_quantize" not in section
    assert gptq.config({"a.0.b": Scheme(INT8)}, [], "F16")["group_size"] == -1


def test_gptq_config_lists_exceptions_for_both_families_of_readers() -> None:
    left = ["lm_head", *(name for name in MODULES if name.endswith("mlp.gate"))]
    int8 = Scheme(INT8)
    schemes = {n: int8 if n.endswith("down_proj") else PRESETS["int4"] for n in MODULES if n not in left}
    section = gptq.config(schemes, left, "F16")
    # What vLLM and gptqmodel do: the first pattern that matches from the start.
    for name in [*MODULES, "lm_head"]:
        rule = next((key for key in section["dynamic"] if re.match(key[2:], name)), None)
        if name in left:
            assert rule and rule.startswith("-:"), name
        elif schemes[name] == int8:
            assert section["dynamic"][rule] == {"bits": 8, "group_size": -1, "sym": True}
        else:
            assert rule is None, name
    # What optimum does: of the linear layers in the blocks, those whose name ends so.
    (endings,) = section["modules_in_block_to_quantize"]
    for name in MODULES:
        assert any(name.endswith(ending) for ending in endings) == (name in schemes), name


def test_gptq_config_names_unusual_blocks_and_layers_outside_of_them() -> None:
    schemes = dict.fromkeys(["encoder.layer.0.query", "encoder.layer.11.query"], PRESETS["int4"])
    assert gptq.config(schemes, ["embeddings"], "F16")["block_name_to_quantize"] == "encoder.layer"
    everywhere = gptq.config({**schemes, "pooler.dense": PRESETS["int4"]}, ["encoder.layer.1.query"], "F16")
    assert everywhere["block_name_to_quantize"] == ""
    (endings,) = everywhere["modules_in_block_to_quantize"]
    assert any("encoder.layer.11.query".endswith(end) for end in endings)
    assert not any("encoder.layer.1.query".endswith(end) for end in endings)


@pytest.mark.parametrize("scheme", [BLOCKS[1], NESTED[1]], ids=str)
def test_bitsandbytes_config(scheme: Scheme) -> None:
    left = ["lm_head", *(name for name in MODULES if name.endswith("mlp.gate"))]
    config = bitsandbytes.config({name: scheme for name in MODULES if name not in left}, left, "BF16")
    parsed = AutoQuantizationConfig.from_dict(dict(config))
    assert parsed.quantization_method() == "nf4"
    assert (parsed.load_in_4bit, parsed.load_in_8bit) == (True, False)
    assert parsed.bnb_4bit_use_double_quant == scheme.weights.double_quantized
    assert (parsed.bnb_4bit_compute_dtype, parsed.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
    for name in [*MODULES, "lm_head"]:
        assert should_convert_module(name, parsed.llm_int8_skip_modules) == (name not in left)
        # Older transformers match prefixes.
        assert any(re.match(pattern, name) for pattern in parsed.llm_int8_skip_modules) == (name in left)


@pytest.mark.parametrize(
    ("names", "others", "patterns"),
    [
        (["model.layers.0.q", "model.layers.11.q"], ["model.layers.0.q_norm"], [r".*layers\.\d+\.q"]),
        (["model.layers.0.q"], ["model.layers.1.q", "model.layers.10.q"], [r".*layers\.0\.q"]),
        (["encoder.layers.0.q"], ["decoder.layers.0.q"], [r".*encoder\.layers\.\d+\.q"]),
        (["encoder.layers.0.q"], ["encoder.layers.1.q", "decoder.layers.0.q"], [r".*encoder\.layers\.0\.q"]),
        (["lm_head", "model.embed"], ["model.layers.0.q"], [r".*lm_head", r".*model\.embed"]),
        (["a.b"], ["x.a.b"], [r"a\.b"]),
        (["model.h.0.q", "model.h.1.q", "lm_head"], [], [r".*h\.\d+\.q", r".*lm_head"]),
        ([], ["model.layers.0.q"], []),
    ],
)
def test_module_patterns(names: list[str], others: list[str], patterns: list[str]) -> None:
    assert module_patterns(names, [*others, *names]) == patterns


@pytest.mark.parametrize("loaded", ["layers.7.mlp.gate", "model.layers.7.mlp.gate", "base.model.layers.7.mlp.gate"])
def test_module_patterns_match_whatever_prefix_a_class_gives(loaded: str) -> None:
    (pattern,) = module_patterns(["model.layers.0.mlp.gate"], ["model.layers.0.mlp.gate", "model.layers.0.mlp.gate_up"])
    assert re.fullmatch(pattern, loaded)
    assert not re.fullmatch(pattern, loaded + "_up")


module_names = st.lists(st.sampled_from(["a", "b", "a+", "0", "1", "10"]), min_size=1, max_size=4).map(".".join)


@settings(deadline=None)
@given(st.sets(module_names, max_size=12), st.data())
def test_module_patterns_are_exact(everything: set[str], data: st.DataObject) -> None:
    names = [name for name in sorted(everything) if data.draw(st.booleans())]
    patterns = module_patterns(names, everything)
    assert [name for name in sorted(everything) if any(re.fullmatch(p, name) for p in patterns)] == names


INT8, INT4, NF4 = NumberFormat("int8", CHANNEL), NumberFormat("int4", GROUP), BLOCKS[1].weights
REFUSED: list[tuple[Format, Scheme, str]] = [
    (compressed_tensors, PRESETS["nf4"], "int4 and int8 weights, not nf4"),
    (compressed_tensors, PRESETS["bf16"], "int4 and int8 weights, not bf16"),
    (compressed_tensors, Scheme(NumberFormat("int4", Granularity("block", 64))), "not per block"),
    (compressed_tensors, Scheme(NumberFormat("int8", symmetric=False)), "zero points per channel or group"),
    (compressed_tensors, Scheme(replace(INT8, dynamic=True)), "not int8, channel, dynamic"),
    (compressed_tensors, Scheme(replace(INT4, double_quantized=True)), "double-quantized"),
    (compressed_tensors, Scheme(INT8, replace(DYNAMIC, dynamic=False)), "one fixed scale per tensor"),
    (compressed_tensors, Scheme(INT8, replace(DYNAMIC, granularity=TENSOR)), "per token"),
    (compressed_tensors, Scheme(INT8, replace(DYNAMIC, dtype="int4")), "inputs as int8"),
    (compressed_tensors, Scheme(INT8, replace(DYNAMIC, symmetric=False)), "symmetric inputs only"),
    (compressed_tensors, Scheme(INT4, DYNAMIC), "int8 inputs need symmetric int8 weights"),
    (compressed_tensors, Scheme(replace(INT8, granularity=GROUP), DYNAMIC), "per tensor or channel"),
    (compressed_tensors, Scheme(replace(INT8, symmetric=False), DYNAMIC), "need symmetric int8"),
    (bitsandbytes, PRESETS["int4"], "nf4 weights, not int4"),
    (bitsandbytes, Scheme(NumberFormat("nf4", CHANNEL)), "in blocks of 32, 64"),
    (bitsandbytes, Scheme(NumberFormat("nf4", Granularity("block", 48))), "not block 48"),
    (bitsandbytes, Scheme(replace(NF4, symmetric=False)), "symmetric"),
    (bitsandbytes, Scheme(replace(NF4, dynamic=True)), "dynamic"),
    (bitsandbytes, Scheme(NF4, DYNAMIC), "keeps inputs"),
    (gptq, PRESETS["nf4"], "int4 and int8 weights, not nf4"),
    (gptq, Scheme(NumberFormat("int8")), "per channel or group, not per tensor"),
    (gptq, Scheme(replace(INT4, double_quantized=True)), "double-quantized"),
    (gptq, PRESETS["int8-dynamic"], "keeps inputs"),
    (awq, PRESETS["int8"], "int4 weights, not int8"),
    (awq, Scheme(NumberFormat("int4", CHANNEL)), "per group, not per channel"),
    (awq, Scheme(replace(INT4, dynamic=True)), "dynamic"),
    (awq, Scheme(INT4, DYNAMIC), "keeps inputs"),
    (safetensors, PRESETS["int8"], "fp16 and bf16, not int8"),
    (safetensors, Scheme(NumberFormat("bf16"), DYNAMIC), "keeps inputs"),
]


@pytest.mark.parametrize(("form", "scheme", "reason"), REFUSED)
def test_refused_schemes_have_a_reason(form: Format, scheme: Scheme, reason: str) -> None:
    assert reason in (form.supports(scheme) or "")


def test_supported_schemes() -> None:
    assert all(form.supports(scheme) is None for form, scheme, _ in CASES)
    assert all(safetensors.supports(PRESETS[name]) is None for name in ("fp16", "bf16"))
    for name in CHECKPOINT_SCHEMES:
        scheme = PRESETS[name]
        assert [form.supports(scheme) for form in (compressed_tensors, bitsandbytes, safetensors)].count(None) == 1, (
            name
        )


@pytest.mark.parametrize(
    ("form", "refused"),
    [
        (compressed_tensors, {"embedding", "conv", "conv1d", "experts"}),
        (gptq, {"embedding", "conv", "conv1d", "experts", "head"}),
        (awq, {"embedding", "conv", "conv1d", "experts", "head"}),
        (bitsandbytes, {"embedding", "conv", "experts"}),
        (safetensors, set()),
    ],
    ids=lambda value: getattr(value, "NAME", ""),
)
def test_roles_that_a_format_leaves_have_a_reason(form: Format, refused: set[str]) -> None:
    roles = ("linear", "conv1d", "conv", "embedding", "head", "router", "experts")
    assert {role for role in roles if form.carries(role)} == refused
    assert all(len(form.carries(role) or "") > 20 for role in refused)
