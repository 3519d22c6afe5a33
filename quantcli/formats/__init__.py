"""Formats: each lays codes out in bits as some runtime reads them. One file each, and one entry here."""

from __future__ import annotations

from typing import cast

from quantcli.core import plugins
from quantcli.core.plugins import Entry
from quantcli.formats.base import Checked, Format, QuantizedFormat

FORMATS: dict[str, Entry] = {
    "compressed-tensors": Entry("quantcli.formats.compressed_tensors", "int8, int4; transformers, vLLM and SGLang"),
    "gptq": Entry("quantcli.formats.gptq", "int8, int4; transformers, vLLM and SGLang"),
    "awq": Entry("quantcli.formats.awq", "int4; transformers, vLLM and SGLang"),
    "bitsandbytes": Entry("quantcli.formats.bitsandbytes", "nf4; transformers"),
    "safetensors": Entry("quantcli.formats.safetensors", "fp16, bf16; whatever loads the original"),
    "gguf": Entry("quantcli.formats.gguf", "int8, int4, fp16, bf16; llama.cpp"),
    "onnx": Entry("quantcli.formats.onnx", "int8, int4, fp16; ONNX Runtime and onnxruntime-genai"),
}


def output_format(name: str) -> Format:
    """The format of this name. Raises UsageError for an unknown one."""
    return cast(Format, plugins.load(FORMATS, "format", name))


def quantized_format(name: str) -> QuantizedFormat:
    """The format of this name, which must be one that holds codes; shapes and dtypes of what it returns are checked."""
    return cast(QuantizedFormat, Checked(output_format(name)))
