"""A GGUF file as a checkpoint of transformers' names: codes where its types are ours, else values.

What Q4_0 and Q8_0 store are codes and scales as `quantcli.formats.gguf` has them; what other types store is decoded by
the package gguf. Rows that llama.cpp wants in another order are put back, and norms that it wants shifted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.gguf import architectures, settings
from quantcli.checkpoint.gguf.header import GgufTensor, read_gguf_header
from quantcli.checkpoint.gguf.tokenizer import tokenizer_files
from quantcli.checkpoint.positional import PositionalFile
from quantcli.core.dtypes import DTYPE_BYTES, torch_dtype
from quantcli.core.manifest import Manifest
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError, MissingExtraError
from quantcli.formats import gguf as form
from quantcli.system.files import temporary_folder

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
#: Key of the manifest in the metadata.
MANIFEST_KEY = "quantcli.manifest"
#: Types whose values are read as they are, and their names here.
_PLAIN = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}
_CODED = {"Q4_0": "int4", "Q8_0": "int8"}
#: Types of which the package gguf makes values, but that are none of a weight.
_UNREAD = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64")

#: Files that are open, by the folder that stands for each.
_BY_FOLDER: dict[Path, GgufCheckpoint] = {}


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file. Use `open_gguf`."""

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self._metadata = header.metadata
        if isinstance(count := header.metadata.get("split.count"), int) and count > 1:
            raise InputError(f"{path} is one of {count} parts.", "Join them first with llama.cpp's llama-gguf-split.")
        self._architecture = architectures.named_architecture(header.metadata, str(path))
        self._tensors: dict[str, GgufTensor] = {}
        self._parts: dict[str, tuple[str, str]] = {}
        self._file = PositionalFile(path)
        self._gguf_path = path
        for tensor in header.tensors:
            name = architectures.hugging_face_name(self._architecture, tensor.name)
            if name is not None:
                self._tensors[name] = tensor
            else:
                self._factors = tensor
        config = self._config(header.tensors)
        self._orders = {name: architectures.row_order(self._architecture, name, config) for name in self._tensors}
        self._schemes = self._known_schemes()
        infos = [info for name, tensor in self._tensors.items() for info in self._infos_of(name, tensor)]
        told = header.metadata.get(MANIFEST_KEY)
        super().__init__(path, tuple(infos), metadata={MANIFEST_KEY: told} if isinstance(told, str) else {})
        self.config = config
        decoded = Counter(each.kind for each in self._tensors.values() if self._is_decoded(each))
        if decoded:
            kinds = ", ".join(kind for kind, _ in decoded.most_common())
            self.warnings = (f"The model was quantized before ({kinds}): what that cost stays.",)

    # What lies beside the weights.

    @property
    def folder(self) -> Path | None:
        """A folder with a config.json and the tokenizer, made when it is first asked for."""
        return self._folder

    @folder.setter
    def folder(self, value: Path | None) -> None:
        """Nothing: it is made, and not given."""

    @cached_property
    def _folder(self) -> Path:
        self._place = temporary_folder("quantcli-gguf-")
        folder = Path(self._place.name).resolve()
        files: dict[str, Any] = {"config.json": self.config}
        files |= tokenizer_files(self._metadata, str(self.path))
        for name, told in files.items():
            (folder / name).write_text(json.dumps(told), encoding="utf-8")
        _BY_FOLDER[folder] = self
        return folder

    @property
    def manifest(self) -> Manifest:
        """What quantcli recorded of how it made this file. Raises InputError where that is damaged."""
        return Manifest.parse(self.metadata.get(MANIFEST_KEY), self.path)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors are of which type, the most frequent first."""
        return dict(Counter(tensor.kind for tensor in self._tensors.values()).most_common())

    def _config(self, tensors: tuple[GgufTensor, ...]) -> dict[str, Any]:
        table = self._tensors.get("model.embed_tokens.weight")
        if table is None or len(table.shape) != 2:
            raise InputError(f"{self._gguf_path} has no table of tokens: it is damaged, or no language model.")
        tied = "lm_head.weight" not in self._tensors
        config = settings.config_of(self._architecture, self._metadata, table.shape[0], tied=tied)
        if any(tensor.name == architectures.ROPE_FACTORS for tensor in tensors):
            config["rope_parameters"] = self._scaled_rope(config)
        return config | {"quantization_config": {"quant_method": form.NAME}}

    def _scaled_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """How Llama 3.1 scales frequencies, told from what divides them. Raises InputError for anything else."""
        factors = self._values(self._factors, 0, self._factors.shape[0]).reshape(-1)
        rope = settings.rope_of_factors(self._architecture, config, factors.tolist())
        if rope is None:
            raise InputError(f"{self._gguf_path} scales rotary embeddings in a way that is not Llama 3.1's.")
        return rope

    # Tensors.

    def _known_schemes(self) -> dict[str, tuple[int | None, bool]]:
        """By name, the group size (None: a row) and whether it is symmetric, of weights whose making is recorded."""
        found: dict[str, tuple[int | None, bool]] = {}
        told = self._metadata.get(MANIFEST_KEY)
        if not isinstance(told, str):
            return found
        for name, layer in Manifest.parse(told, self._gguf_path).layers.items():
            match = re.match(r"int[48], (channel|group (\d+))(, asymmetric)?$", layer.scheme or "")
            if match:
                found[name] = (int(match[2]) if match[2] else None, match[3] is None)
        return found

    def _is_decoded(self, tensor: GgufTensor) -> bool:
        return tensor.kind not in (*_PLAIN, *_CODED) and not self._is_ours(tensor)

    def _is_ours(self, tensor: GgufTensor) -> bool:
        """Whether a tensor of Q4_1 has zero points, which those of other makers have not."""
        name = architectures.hugging_face_name(self._architecture, tensor.name)
        return tensor.kind == "Q4_1" and not self._schemes.get(name or "", (None, True))[1]

    def _infos_of(self, name: str, tensor: GgufTensor) -> list[TensorInfo]:
        path, (rows, *others) = self._gguf_path, tensor.shape
        if tensor.kind in _UNREAD:
            raise InputError(f"{path}: {tensor.name} is of type {tensor.kind}, which is none of weights.")
        order = self._orders[name]
        if order is not None and rows != 2 * order[0] * order[1]:
            raise InputError(f"{path}: {tensor.name} has {rows} rows, and its heads {2 * order[0] * order[1]}.")
        if len(others) != 1 or not (tensor.kind in _CODED or self._is_ours(tensor)):
            dtype = _PLAIN.get(tensor.kind, "F32")
            if architectures.norm_shift(self._architecture, name):
                dtype = "F32"
            count = rows * (others[0] if others else 1)
            return [TensorInfo(name, tensor.shape, dtype, count * DTYPE_BYTES[dtype], path)]
        columns = others[0]
        size, symmetric = self._schemes.get(name, (form.BLOCK, True))
        groups = columns // (size or columns)
        four = tensor.kind != "Q8_0"
        codes = TensorInfo(
            name + form.CODES, (rows, columns // 2 if four else columns), "U8" if four else "I8",
            tensor.nbytes - rows * groups * 2, path,
        )  # fmt: skip
        parts = [codes, TensorInfo(name + form.SCALES, (rows, groups), "F16", rows * groups * 2, path)]
        if not symmetric:
            parts.append(TensorInfo(name + form.ZERO_POINTS, (rows, groups), "I8", rows * groups, path))
        for part in parts:
            self._parts[part.name] = (name, part.name.removeprefix(name))
        return parts

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype; safe from several threads."""
        name, part = self._parts.get(info.name, (info.name, ""))
        tensor, order = self._tensors[name], self._orders[name]
        if order is None or stop == start:
            return self._read(info, name, part, tensor, start, stop)
        # Rows of a head stay together: whole heads are read, and turned.
        head = 2 * order[1]
        first, last = start // head, -(-stop // head)
        stored = self._read(info, name, part, tensor, first * head, last * head)
        turned = architectures.original_rows(stored, (last - first, order[1]))
        rows: Tensor = turned[start - first * head : stop - first * head].contiguous()
        return rows

    def _read(self, info: TensorInfo, name: str, part: str, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        """Rows as the file has them."""
        if not part:
            values = self._values(tensor, start, stop) - architectures.norm_shift(self._architecture, name)
            return values.to(torch_dtype(info.dtype)).reshape(stop - start, *info.shape[1:])
        codes, scales, minima = form.from_blocks(self._bytes(tensor, start, stop), tensor.kind)
        if part == form.CODES:
            return codes
        scales = self._per_group(scales, info, tensor)
        if part == form.SCALES:
            return scales
        assert minima is not None
        return self._zero_points(scales, self._per_group(minima, info, tensor), tensor)

    def _per_group(self, values: Tensor, info: TensorInfo, tensor: GgufTensor) -> Tensor:
        """One value for each group, where a group is several blocks. Raises InputError where these differ."""
        grouped = values.reshape(len(values), info.shape[1], -1)
        if not bool((grouped == grouped[:, :, :1]).all()):
            raise InputError(f"{self.path}: {tensor.name} has other groups than its manifest says: it is damaged.")
        return grouped[:, :, 0].contiguous()

    def _zero_points(self, scales: Tensor, minima: Tensor, tensor: GgufTensor) -> Tensor:
        import torch

        points = (-minima.float() / scales.float()).round() - 8
        if not bool((points.abs() <= 8).all()) or not bool(((points + 8) * -scales.float() == minima.float()).all()):
            raise InputError(f"{self.path}: {tensor.name} has no zero points, as its manifest says: it is damaged.")
        return points.to(torch.int8)

    def _bytes(self, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        width = tensor.nbytes // tensor.shape[0]
        if len(tensor.shape) == 1:
            return self._file.read_tensor(tensor.offset, tensor.nbytes).reshape(1, -1)
        return self._file.read_tensor(tensor.offset + start * width, (stop - start) * width).reshape(stop - start, -1)

    def _values(self, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        """Values of rows, in the dtype of the file where it has one of torch's, else float32."""
        import torch

        stored = self._bytes(tensor, start, stop)
        if tensor.kind in _PLAIN:
            values = stored.reshape(-1).view(torch_dtype(_PLAIN[tensor.kind]))
        else:
            values = torch.from_numpy(_dequantize(stored.numpy(), tensor.kind)).reshape(-1)
        return values[start:stop] if len(tensor.shape) == 1 else values


def _dequantize(stored: Any, kind: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", f"Reading weights of GGUF's type {kind}") from error
    try:
        return gguf.dequantize(stored, gguf.GGMLQuantizationType[kind]).copy()
    except NotImplementedError as error:
        raise InputError(f"The package gguf does not decode {kind}.", "Start from the original weights.") from error


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file; reads its header only. Raises InputError where it is damaged or of a kind that is not read."""
    return GgufCheckpoint(path)


def standing_for(folder: Path) -> GgufCheckpoint | None:
    """The file that a folder was made for in this process, if it is such a one."""
    return _BY_FOLDER.get(folder.resolve()) if _BY_FOLDER else None
