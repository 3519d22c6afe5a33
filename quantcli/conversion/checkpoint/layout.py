"""The shape of an output on disk: which tensors, in which files, with which configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.hugging_face import is_diffusers, weights_stem
from quantcli.checkpoint.positional import PositionalFile
from quantcli.checkpoint.roles import module_of
from quantcli.checkpoint.safetensors import build_header
from quantcli.core.dtypes import TORCH_NAMES
from quantcli.core.manifest import MANIFEST, MANIFEST_KEY, Manifest
from quantcli.core.tensors import TensorSpec
from quantcli.errors import UsageError
from quantcli.planning.plan import LayerPlan, Plan, left_linear_modules, quantization_config
from quantcli.system.files import write_text

#: Formats that diffusers loads for its own models.
_OF_DIFFUSERS = ("safetensors", "bitsandbytes")
#: Room in a single file's header for what a layer's manifest entry gains once its error is known.
_RESERVE_PER_LAYER = 400
_RESERVE = 4096


@dataclass(frozen=True)
class Destination:
    """Where one output tensor lies."""

    file: PositionalFile
    offset: int


@dataclass
class Layout:
    """Files and tensors of an output. ``single_file`` is its name where the output is one file.

    ``stem`` is what files in a folder are called, by the library that loads them.
    """

    single_file: str | None
    shards: dict[str, dict[str, TensorSpec]]
    layer_specs: dict[str, dict[str, TensorSpec]]
    metadata: dict[str, str]
    nbytes: int = 0
    headers: dict[str, tuple[bytes, dict[str, int], int]] = field(default_factory=dict)
    stem: str = "model"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the output."""
        return {name: spec for shard in self.shards.values() for name, spec in shard.items()}

    def create_files(self, out: Path) -> dict[str, Destination]:
        """Write every header and reserve every file; returns where each tensor goes."""
        destinations: dict[str, Destination] = {}
        for shard, (header, offsets, size) in self.headers.items():
            file = PositionalFile(out / shard, write=True)
            file.write(0, header)
            file.resize(size)
            destinations |= {name: Destination(file, offset) for name, offset in offsets.items()}
        if len(self.shards) > 1:
            weight_map = {name: shard for shard, specs in self.shards.items() for name in specs}
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(out / f"{self.stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return destinations

    def config(self, plan: Plan, original: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """config.json of the output, or None where the input has none."""
        if original is None:
            return None
        config = copy.deepcopy(dict(original))
        dtype = TORCH_NAMES[plan.dtype]
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        if "dtype" not in config and "torch_dtype" not in config and not is_diffusers(config):
            config["dtype"] = dtype
        section = quantization_config(plan)
        if section and is_diffusers(config):
            section["llm_int8_skip_modules"] = _left_in_diffusers(plan)
        return config | {"quantization_config": section} if section else config

    def write_manifest(self, out: Path, manifest: Manifest) -> None:
        """quantcli.json in a folder; in a single file its metadata, for which room was kept."""
        if self.single_file is None:
            text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
            write_text(out / MANIFEST, text + "\n")
            return
        reserved = len(self.headers[self.single_file][0])
        text = json.dumps(manifest.to_json(), separators=(",", ":"), allow_nan=False)
        metadata = self.metadata | {MANIFEST_KEY: text}
        header, _, _ = build_header(self.shards[self.single_file], metadata)
        padding = reserved - len(header)
        if padding < 0:
            raise AssertionError(f"the manifest outgrew its room by {-padding} bytes")
        body = header[8:].ljust(reserved - 8)
        file = PositionalFile(out / self.single_file, write=True)
        file.write(0, len(body).to_bytes(8, "little") + body)
        file.close()


def plan_layout(plan: Plan, checkpoint: Checkpoint, target: Path) -> Layout:
    """Decide files and tensors of an output. Raises UsageError where ``target`` cannot be a file."""
    wants_file = target.suffix == ".safetensors"
    if wants_file and checkpoint.folder is not None:
        raise UsageError(
            f"{checkpoint.path} is a folder, so the output is a folder too; {target} names a file.",
            hint="Leave out the suffix .safetensors.",
        )
    if is_diffusers(checkpoint.config) and plan.format not in _OF_DIFFUSERS:
        raise UsageError(
            f"{checkpoint.path} is a model of diffusers, which does not load weights stored as {plan.format}.",
            "Use --scheme nf4, fp16 or bf16.",
        )
    if is_diffusers(checkpoint.config):
        _left_in_diffusers(plan)
    layer_specs = {layer.info.name: _layer_specs(layer, plan) for layer in plan.layers}
    shards = _fill_shards(layer_specs.values(), None if wants_file else plan.recipe.max_shard_size)
    metadata = checkpoint.metadata | {"format": "pt"}
    metadata.pop(MANIFEST_KEY, None)
    stem = weights_stem(checkpoint.config)
    layout = Layout(target.name if wants_file else None, {}, layer_specs, metadata, stem=stem)
    reserve = 0
    if wants_file:
        recipe = len(json.dumps(plan.recipe.model_dump(mode="json")))
        names = sum(2 * len(name.encode()) + _RESERVE_PER_LAYER for name in layer_specs)
        reserve = 2 * recipe + names + _RESERVE
    for number, specs in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        name = layout.single_file or name
        layout.shards[name] = specs
        layout.headers[name] = build_header(specs, metadata, reserve)
        layout.nbytes += layout.headers[name][2]
    return layout


def _left_in_diffusers(plan: Plan) -> list[str]:
    """Modules that diffusers (0.42 was read) is to leave: by plain names, where transformers has patterns.

    It leaves what is called so, whatever is within it, and what ends in a name without dots. Raises UsageError where
    that would leave a quantized module as well.
    """
    names = {module_of(layer.info.name) for layer in plan.layers}
    quantized = [module_of(layer.info.name) for layer in plan.layers if layer.has_codes]
    left = [name for name in dict.fromkeys(left_linear_modules(plan)) if name in names]
    for name in left:
        for other in quantized:
            if other.rpartition(".")[2] == name or f"{name}." in other:
                globs = dict.fromkeys(f"--skip '*{each}'" for each in (name, other.rpartition(".")[2]))
                raise UsageError(
                    f"{name} stays unquantized, and diffusers would take {other} for unquantized as well.",
                    f"Leave both: {' '.join(globs)}",
                )
    return left


def _layer_specs(layer: LayerPlan, plan: Plan) -> dict[str, TensorSpec]:
    if layer.dropped:
        return {}
    if layer.has_codes and layer.scheme is not None:
        form = formats.quantized_format(plan.format)
        return form.layout(layer.info.name, layer.matrix_shape, layer.scheme, plan.scale_dtype)
    return {layer.info.name: TensorSpec(layer.dtype, layer.info.shape)}


def _fill_shards(layers: Any, capacity: int | None) -> list[dict[str, TensorSpec]]:
    """Tensors in order, a layer's together, into files of at most ``capacity`` bytes."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for specs in layers:
        size = sum(spec.nbytes for spec in specs.values())
        if capacity is not None and shards[-1] and filled + size > capacity:
            shards.append({})
            filled = 0
        shards[-1].update(specs)
        filled += size
    return shards
