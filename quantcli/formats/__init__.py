"""Formats: each lays codes out in bits as some runtime reads them. Listed in `quantcli.formats.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quantcli.formats.base import Format, QuantizedFormat
from quantcli.system.text import lookup

if TYPE_CHECKING:
    pass

FORMATS = {
    "compressed-tensors": "quantcli.formats.compressed_tensors",
    "gptq": "quantcli.formats.gptq",
    "awq": "quantcli.formats.awq",
    "bitsandbytes": "quantcli.formats.bitsandbytes",
    "safetensors": "quantcli.formats.safetensors",
}


def output_format(name: str) -> Format:
    """The format of this name. Raises UsageError for an unknown one."""
    return cast(Format, lookup(FORMATS, "format", name))


def quantized_format(name: str) -> QuantizedFormat:
    """The format of this name, which must be one that holds codes."""
    return cast(QuantizedFormat, lookup(FORMATS, "format", name))
