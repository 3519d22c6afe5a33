"""compressed-tensors: what llm-compressor writes and transformers, vLLM and SGLang load.

Weight-only int4 and int8 use the ``pack-quantized`` layout, int8 with quantized inputs
``int-quantized`` (checked against compressed-tensors 0.20). torch is imported only where bits are laid
out: planning does without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.scheme import INPUT_SCALE, Granularity, NumberFormat, Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec
from quantcli.errors import InputError
from quantcli.formats.base import Storage
from quantcli.formats.module_patterns import module_patterns

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compressed-tensors"
STORAGE = Storage(input_zero_points=False)

#: Layer roles the format carries. Its config targets module classes, and transformers loads only
#: quantized ``Linear`` modules.
ROLES = {
    "embedding": "transformers cannot load a quantized embedding in compressed-tensors",
    "conv": "compressed-tensors carries only linear layers",
    "conv1d": "compressed-tensors does not match transposed Conv1D layers; nf4 does",
    "experts": "compressed-tensors cannot carry fused 3-D expert weights",
}

#: A group of no layers. transformers takes all experts of a model for packed, unless the group whose pattern names
#: experts is of 8-bit floats: of those it leaves weights that have no scale as they are.
_EXPERTS_LEFT = {
    "targets": ["re:none of the experts$"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": None,
    "output_activations": None,
    "format": "float-quantized",
}

#: Parts of a ``quantization_config`` that change what codes mean.
_NOT_READ = ("transform_config", "sparsity_config")


def supports(scheme: Scheme) -> str | None:
    """Why the scheme cannot be written, or None when it can."""
    weights, inputs = scheme.weights, scheme.inputs
    if weights.dtype not in ("int4", "int8"):
        return f"{NAME} carries int4 and int8 weights, not {weights.dtype}"
    if weights.granularity.kind not in ("tensor", "channel", "group"):
        return f"{NAME} carries scales per tensor, channel or group, not per {weights.granularity.kind}"
    if scheme.unpacked and (weights.dtype != "int8" or not weights.symmetric or weights.granularity.kind == "group"):
        return f"unpacked codes are symmetric int8 with scales per tensor or channel, not {weights}"
    if weights.dynamic or weights.double_quantized:
        return f"{NAME} stores the scales of weights as they are; not {weights}"
    if not weights.symmetric and weights.granularity.kind == "tensor":
        return f"{NAME} carries zero points per channel or group, not per tensor"
    if inputs is None:
        return None
    if inputs.dtype != "int8" or inputs.granularity.kind != ("token" if inputs.dynamic else "tensor"):
        return f"{NAME} carries inputs as int8, dynamic per token or with one fixed scale per tensor; not {inputs}"
    if not inputs.symmetric:
        return f"{NAME} carries symmetric inputs only"
    if weights.dtype != "int8" or weights.granularity.kind == "group" or not weights.symmetric:
        return f"int8 inputs need symmetric int8 weights per tensor or channel, not {weights}"
    return None


def carries(role: str) -> str | None:
    """Why layers of this role stay as they are, or None when they are quantized."""
    return ROLES.get(role)


def fits(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """None: a matrix of any shape can be laid out."""
    return None


def together(schemes: Iterable[Scheme]) -> str | None:
    """None: every scheme has its own entry in the configuration."""
    return None


def _is_packed(scheme: Scheme) -> bool:
    return scheme.inputs is None and not scheme.unpacked


def codes_name(weight: str, scheme: Scheme) -> str:
    """Name of the tensor that holds the codes of ``weight``."""
    return f"{weight}_packed" if _is_packed(scheme) else weight


def _input_scale(weight: str) -> str:
    return weight.removesuffix("weight") + INPUT_SCALE


def layout(weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
    """Every tensor that stands for ``weight`` ``[rows, columns]``."""
    rows, columns = shape
    number_format = scheme.weights
    kind, size = number_format.granularity.kind, number_format.granularity.size
    scales = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // (size or 1))}[kind]
    specs = {f"{weight}_scale": TensorSpec(scale_dtype, scales)}
    if not _is_packed(scheme):
        if scheme.is_static:
            specs[_input_scale(weight)] = TensorSpec(scale_dtype, (1,))
        return {weight: TensorSpec("I8", shape)} | specs
    per_word = 32 // number_format.bits
    specs[f"{weight}_packed"] = TensorSpec("I32", (rows, -(-columns // per_word)))
    specs[f"{weight}_shape"] = TensorSpec("I64", (2,))
    if not number_format.symmetric:
        specs[f"{weight}_zero_point"] = TensorSpec("I32", (-(-rows // per_word), scales[1]))
    return specs


def codes_offset(row: int, columns: int, scheme: Scheme) -> int:
    """Bytes of the stored codes that lie before a row."""
    if not _is_packed(scheme):
        return row * columns
    return row * -(-columns * scheme.weights.bits // 32) * 4


def encode_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Stored form of a slab of rows, int8 ``[rows, columns]``."""
    if not _is_packed(scheme):
        return codes
    from quantcli.core import packing

    if scheme.weights.bits == 4:
        return packing.pack_int4_low_nibble_first(codes)
    return packing.pack_int8_in_int32(codes)


def decode_codes(stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `encode_codes`: int8 ``[rows, columns]``."""
    if not _is_packed(scheme):
        return stored
    from quantcli.core import packing

    if scheme.weights.bits == 4:
        return packing.unpack_int4_low_nibble_first(stored, columns)
    return packing.unpack_int8_from_int32(stored, columns)


def encode_scales(weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str) -> dict[str, Tensor]:
    """Every other tensor of the layer; ``tensor.codes`` is not looked at."""
    import torch

    from quantcli.core.dtypes import torch_dtype

    scale = tensor.scale.to(torch_dtype(scale_dtype))
    if tensor.number_format.granularity.kind == "tensor":
        scale = scale.reshape(1)
    encoded = {f"{weight}_scale": scale}
    if tensor.input_scale is not None:
        encoded[_input_scale(weight)] = tensor.input_scale.reshape(1).to(torch_dtype(scale_dtype))
    if _is_packed(scheme):
        encoded[f"{weight}_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
    if tensor.zero_point is not None:
        # Zero points are packed along the rows, so the packed words run down a column.
        encoded[f"{weight}_zero_point"] = encode_codes(tensor.zero_point.T.contiguous(), scheme).T.contiguous()
    return encoded


def decode_scales(
    weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point of a layer, as `QuantizedTensor` holds them."""
    scale = load(f"{weight}_scale").float()
    if scheme.weights.granularity.kind == "tensor":
        scale = scale.reshape(1, 1)
    if scheme.weights.symmetric:
        return scale, None
    packed = load(f"{weight}_zero_point").T.contiguous()
    return scale, decode_codes(packed, shape[0], scheme).T.contiguous()


def find(
    infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
) -> dict[str, tuple[tuple[int, int], Scheme]]:
    """Shape and scheme of every quantized weight, by its name; ``section`` is the ``quantization_config``.

    Shapes tell bits and granularity; how inputs are quantized is taken from the section.

    Raises:
        InputError: codes that are not 4- or 8-bit integers, columns in an order of their own, or a part that is
            missing.
    """
    refuse_unread(section)
    if section.get("kv_cache_scheme"):
        raise InputError("The model's quantization_config has a kv_cache_scheme, which is not read.")
    found = {}
    for name, info in infos.items():
        weight, mark, part = name.rpartition("weight")
        if not mark or part not in ("_packed", "_scale", ""):
            continue
        weight += mark
        if part != "_scale":
            if f"{weight}_scale" not in infos and (part or info.dtype == "I8"):
                raise InputError(f"{weight}_scale is missing: without it {name} means nothing.")
            continue
        if f"{weight}_g_idx" in infos:
            raise InputError(f"The groups of {weight} follow the order of activations (actorder); that is not read.")
        group = _group_of(weight.removesuffix(".weight"), section)
        if f"{weight}_packed" in infos:
            found[weight] = _find_packed(weight, infos, load, group or {})
        elif weight in infos and infos[weight].dtype == "I8" and len(infos[weight].shape) == 2:
            found[weight] = _find_plain(weight, infos, group)
        else:
            stored = infos[weight].dtype if weight in infos else "a form that is not known"
            raise InputError(f"{weight} is stored as {stored}.", f"Of {NAME}, int4 and int8 codes are read.")
    return found


def refuse_unread(section: Mapping[str, Any]) -> None:
    """Raise InputError where a ``quantization_config`` has a part without which codes are misread."""
    for key in _NOT_READ:
        part = section.get(key)
        # Files that are not sparse may say so.
        if part and not (isinstance(part, Mapping) and part.get("format") == "dense"):
            raise InputError(f"The model's quantization_config has a {key}, which is not read.")


def _find_packed(
    weight: str, infos: Mapping[str, TensorInfo], load: Callable[[str], Tensor], group: Mapping[str, Any]
) -> tuple[tuple[int, int], Scheme]:
    packed, shape = infos[f"{weight}_packed"], infos.get(f"{weight}_shape")
    if packed.dtype != "I32" or shape is None or shape.shape != (2,):
        raise InputError(f"{weight} is packed in {packed.dtype}, or lacks its shape.", "int4 and int8 codes are read.")
    if group.get("input_activations"):
        raise InputError(f"{weight} is packed, and its inputs are quantized as well; that is not read.")
    rows, columns = load(shape.name).tolist()
    fitting = [bits for bits in (4, 8) if packed.shape == (rows, -(-columns * bits // 32))]
    if not fitting:
        raise InputError(
            f"{packed.name} {list(packed.shape)} does not hold {rows} x {columns} codes of 4 or 8 bits.",
            "The file is damaged, or holds codes of other bits.",
        )
    # A row of four columns or fewer fills one word, whatever its bits are.
    stated = (group.get("weights") or {}).get("num_bits")
    bits = stated if stated in fitting else fitting[-1]
    granularity = _granularity(infos[f"{weight}_scale"].shape, (rows, columns))
    size = (group.get("weights") or {}).get("group_size")
    if granularity.kind == "channel" and size == columns:
        granularity = Granularity("group", columns)
    if granularity.kind == "group" and size not in (None, granularity.size):
        raise InputError(f"{weight} has a scale for every {granularity.size} columns; config.json says {size}.")
    symmetric = f"{weight}_zero_point" not in infos
    return (rows, columns), Scheme(NumberFormat(f"int{bits}", granularity, symmetric))


def _find_plain(
    weight: str, infos: Mapping[str, TensorInfo], group: Mapping[str, Any] | None
) -> tuple[tuple[int, int], Scheme]:
    if f"{weight}_zero_point" in infos:
        raise InputError(f"{weight} is int8 with zero points, and not packed; that is not read.")
    if group is None:
        raise InputError(
            f"{weight} is int8 and not packed, and no config.json says how its layer's inputs are quantized.",
            "Give the folder with its config.json.",
        )
    rows, columns = infos[weight].shape
    granularity = _granularity(infos[f"{weight}_scale"].shape, (rows, columns))
    inputs = _inputs(group["input_activations"]) if group.get("input_activations") else None
    return (rows, columns), Scheme(NumberFormat("int8", granularity), inputs, unpacked=inputs is None)


def _granularity(scales: tuple[int, ...], shape: tuple[int, int]) -> Granularity:
    if len(scales) < 2:
        return Granularity("tensor")
    return Granularity("channel") if scales[1] == 1 else Granularity("group", max(1, shape[1] // max(1, scales[1])))


def _inputs(arguments: Mapping[str, Any]) -> NumberFormat:
    granularity = Granularity("token" if arguments.get("strategy") == "token" else "tensor")
    symmetric, dynamic = bool(arguments.get("symmetric", True)), bool(arguments.get("dynamic", False))
    return NumberFormat(f"int{arguments.get('num_bits', 8)}", granularity, symmetric, dynamic)


def _group_of(module: str, section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry of a ``quantization_config`` that a module falls under: by its name, else by its class."""
    groups: list[Mapping[str, Any]] = list((section.get("config_groups") or {}).values())
    named = [group for group in groups if any(_means(target, module) for target in group.get("targets", ()))]
    general = [group for group in groups if "Linear" in group.get("targets", ())]
    return next(iter([*named, *general]), None)


def _means(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _arguments(number_format: NumberFormat) -> dict[str, Any]:
    granularity = number_format.granularity
    arguments: dict[str, Any] = {
        "num_bits": number_format.bits,
        "type": "int",
        "strategy": granularity.kind,
        "symmetric": number_format.symmetric,
        "dynamic": number_format.dynamic,
    }
    if granularity.kind == "group":
        arguments["group_size"] = granularity.size
    return arguments


def _layout_name(scheme: Scheme) -> str:
    return "pack-quantized" if _is_packed(scheme) else "int-quantized"


def _regexes(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    return [f"re:{pattern}$" for pattern in module_patterns(names, everything)]


def with_experts_left(section: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` of a model none of whose experts, which the file holds one by one, is quantized."""
    return section | {"config_groups": {"experts_left": _EXPERTS_LEFT} | section["config_groups"]}


def config(schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` of a model: scheme per quantized module, and the modules left out.

    Names are module names (without ``.weight``); ``dtype`` is not used by this format. The most
    common scheme targets ``Linear``, every other one the names it applies to.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    # The most general target comes last: compressed-tensors warns of targets that find nothing left.
    ordered = sorted(groups, key=lambda scheme: len(groups[scheme]))
    everything = [*schemes, *left]
    config_groups = {}
    for index, scheme in enumerate(ordered):
        targets = ["Linear"] if index == len(ordered) - 1 else _regexes(groups[scheme], everything)
        config_groups[f"group_{index}"] = {
            "targets": targets,
            "weights": _arguments(scheme.weights),
            "input_activations": _arguments(scheme.inputs) if scheme.inputs else None,
            "output_activations": None,
            "format": _layout_name(scheme),
        }
    layouts = {_layout_name(scheme) for scheme in ordered}
    return {
        "quant_method": NAME,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": _regexes(left, everything),
        "config_groups": config_groups,
    }
