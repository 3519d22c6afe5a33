"""A MODEL as a row of a report: what it is, how large, in which format and scheme."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.roles import original_dtype, quantization_of
from quantcli.core.dtypes import NUMBER_OF_DTYPE
from quantcli.core.manifest import Manifest
from quantcli.errors import InputError
from quantcli.onnx.graph.model import OnnxModel, constants, is_onnx, open_onnx
from quantcli.reporting.report import ModelRow
from quantcli.system.user_functions import is_function, load_function

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from quantcli.models.runner import Runner


def model_sha256(model: str | Path, weights: Path | None = None) -> str:
    """The hash that statistics are bound to: of the model's files, or of a function's weights.

    ``weights`` is the state dict that a function's module is given, if any.

    Raises:
        InputError: the model is missing or damaged.
    """
    return source_sha256(open_model(model, weights))


def source_sha256(source: ModelSource) -> str:
    """As `model_sha256`, of a model that is open."""
    sha256 = source.sha256()
    if sha256 is not None:
        return sha256
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(load_function(source.path)().state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


#: Names of number formats by onnx-ir's names of dtypes.
_NUMBER_OF_ONNX = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "INT8": "int8", "UINT8": "int8",
    "INT4": "int4", "UINT4": "int4", "INT2": "int2", "UINT2": "int2",
}  # fmt: skip
_NUMBER_OF_TORCH = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "int8": "int8"}


@dataclass
class ModelSource:
    """A model before it is loaded to be run. Use `open_model`.

    ``path`` is what the user gave. One of ``checkpoint`` and ``onnx`` is set for models of those kinds.
    """

    path: str
    kind: Literal["checkpoint", "onnx", "program", "function"]
    checkpoint: Checkpoint | None = None
    onnx: OnnxModel | None = None
    weights: Path | None = None
    _code: Runner | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path | None:
        """Where configuration, tokenizer and preprocessing are looked for."""
        if self.kind == "function":
            return None
        if self.checkpoint and self.checkpoint.folder:
            return self.checkpoint.folder
        path = Path(self.path)
        return path if path.is_dir() else path.parent

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about its files."""
        return self.checkpoint.warnings if self.checkpoint else ()

    @property
    def manifest(self) -> Manifest:
        """What quantcli recorded of how it made this model; empty where it did not make it."""
        model = self.checkpoint or self.onnx
        return model.manifest if model else Manifest()

    @property
    def format(self) -> str:
        """How its weights are laid out."""
        if self.manifest.format:
            return self.manifest.format
        if self.checkpoint:
            plain = "safetensors" if self.checkpoint.files[0].suffix == ".safetensors" else "torch"
            return quantization_of(self.checkpoint.infos(), self.checkpoint.config) or plain
        return {"onnx": "onnx", "program": "torch.export"}.get(self.kind, "torch")

    @property
    def scheme(self) -> str | None:
        """The scheme it was converted with, else the number format that most of its weights have."""
        if self.manifest.scheme:
            return self.manifest.scheme
        if self.checkpoint:
            dtype = original_dtype(self.checkpoint.infos())
            return NUMBER_OF_DTYPE.get(dtype, dtype)
        if self.onnx:
            counts = Counter[str]()
            for tensor in (*constants(self.onnx.ir), *_constant_nodes(self.onnx)):
                counts[tensor.dtype.name] += tensor.size
            known = [(count, name) for name, count in counts.items() if name in _NUMBER_OF_ONNX]
            return _NUMBER_OF_ONNX[max(known)[1]] if known else None
        if self._code is None:
            return None
        counts = Counter[str]()
        for weight in self._weights_of_code():
            counts[str(weight.dtype).removeprefix("torch.")] += weight.numel()
        known = [(count, name) for name, count in counts.items() if name in _NUMBER_OF_TORCH]
        return _NUMBER_OF_TORCH[max(known)[1]] if known else "fp32"

    @property
    def size_bytes(self) -> int | None:
        """Bytes of its files; of a function's module, bytes of the weights (None before it was loaded)."""
        if self.checkpoint or self.onnx:
            return (self.checkpoint or self.onnx).size_bytes  # type: ignore[union-attr]
        if self.kind == "program":
            return Path(self.path).stat().st_size
        return None if self._code is None else sum(tensor.nbytes for tensor in self._weights_of_code())

    @property
    def float_bytes(self) -> int:
        """About what its weights take once loaded as float32; 0 where that is not known before loading."""
        if self.checkpoint:
            # transformers unpacks quantized weights to float32 on a CPU, so every form weighs the same.
            return sum(info.numel for info in self.checkpoint.infos()) * 4
        return (self.size_bytes or 0) * 2

    def sha256(self) -> str | None:
        """Hash of its files; of a function, of its ``--weights``, or None without."""
        if self.checkpoint:
            return self.checkpoint.sha256()
        if self.onnx:
            return self.onnx.sha256()
        file = Path(self.path) if self.kind == "program" else self.weights
        if file is None:
            return None
        with file.open("rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def runner(
        self,
        *,
        threads: int | None = None,
        causal: bool | None = None,
        headed: bool = False,
        shared: bool = False,
        generates: bool = False,
    ) -> Runner:
        """Load the model to be run, as `quantcli.models.runner.open_runner` does; code is loaded once and kept."""
        from quantcli.models.runner import open_runner, set_torch_threads

        if self._code is not None:
            set_torch_threads(threads)
            return self._code
        runner = open_runner(
            self.path,
            threads=threads,
            causal=causal,
            weights=self.weights,
            headed=headed,
            shared=shared,
            generates=generates,
        )
        if self.kind in ("function", "program"):
            self._code = runner
        return runner

    def _weights_of_code(self) -> list[Tensor]:
        """The tensors of a function's module or a program; none before it was loaded."""
        return [] if self._code is None else list(self._code.module.state_dict().values())  # type: ignore[attr-defined]

    def row(self, index: int, metrics: dict[str, float | None]) -> ModelRow:
        """The report's row of the model at ``index`` of the command line; the first one is the reference."""
        role = "candidate" if index else "reference"
        row = ModelRow(self.path, role, self.format, self.scheme, self.sha256(), self.size_bytes, metrics)
        row.manifest = self.manifest.to_json() if self.manifest.quantcli else None
        return row


def _constant_nodes(model: OnnxModel) -> Iterator[ir.TensorProtocol]:
    """Tensors of Constant nodes: some exporters keep weights there."""
    for node in model.ir.graph.all_nodes():
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and hasattr(attribute.value, "dtype"):
            yield attribute.value


def open_model(model: str | Path, weights: Path | None = None) -> ModelSource:
    """Look at a MODEL; reads headers only.

    Raises:
        InputError: it is missing, damaged, or of a kind that cannot be run.
    """
    text = str(model)
    if is_function(text):
        load_function(text)
        return ModelSource(text, "function", weights=weights)
    path = Path(model)
    if is_onnx(path):
        return ModelSource(text, "onnx", onnx=open_onnx(path, mapped=True))
    if path.suffix == ".pt2":
        if not path.is_file():
            raise InputError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
        return ModelSource(text, "program")
    return ModelSource(text, "checkpoint", checkpoint=open_checkpoint(path))


def size_metrics(rows: list[ModelRow]) -> None:
    """Add ``size_ratio`` to the first model, and ``size_bytes``, to the metrics of every row."""
    for row in rows:
        known = row.size_bytes is not None and rows[0].size_bytes
        row.metrics["size_ratio"] = row.size_bytes / rows[0].size_bytes if known else None  # type: ignore[operator]
        row.metrics["size_bytes"] = row.size_bytes
