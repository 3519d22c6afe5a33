"""The manifest: what an artifact says of itself, of its source, and of how it was made and verified.

A checkpoint's folder holds it in ``quantcli.json``, a single file and an ONNX graph in their metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantcli.errors import InputError
from quantcli.system.text import first_line

#: Name of the manifest's file in a folder.
MANIFEST = "quantcli.json"
#: Key of the manifest in the metadata of a safetensors file and of an ONNX graph.
MANIFEST_KEY = "quantcli"


class _Entries(BaseModel):
    """Keys of a JSON object, in the order in which they are written; those that are not known here are kept."""

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    def to_json(self) -> dict[str, Any]:
        """The object without what is None."""
        return {key: value for key, value in self if value is not None}


class ManifestLayer(_Entries):
    """One weight: its ``scheme``, or the ``reason`` why it has none.

    - ``node``, ``mode``: of an ONNX graph's weight, the node that reads it, and how the node computes.
    - ``algorithm``, ``note``: what chose the codes in the end, and what is to be said of that.
    - ``sqnr_db``: signal to quantization noise of the weight; None where nothing was lost or measured.
    - ``dtype``: safetensors' name of what a checkpoint's tensor without a scheme is stored as.
    """

    node: str | None = None
    mode: str | None = None
    scheme: str | None = None
    algorithm: str | None = None
    note: str | None = None
    sqnr_db: float | None = None
    dtype: str | None = None
    reason: str | None = None


class Manifest(_Entries):
    """What is known of an artifact; empty where quantcli did not make it.

    - ``quantcli``: the version that made it. ``input_sha256``: hash of the weights that it was made from.
    - ``recipe``: what was asked for, defaults included.
    - ``source``: where the codes or values come from, if the input was quantized already.
    - ``calibration``, ``calibration_fingerprint``: counts of the data, and a sketch of it without the data.
    - ``reproducible``: where each algorithm that took part, and ``ranges`` from data, give the same bytes again.
    - ``layers``: by name of the tensor.
    - ``verified``: what was checked of the artifact, and with which result.
    """

    quantcli: str | None = None
    input_sha256: str | None = None
    format: str | None = None
    scheme: str | None = None
    algorithm: str | None = None
    recipe: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    calibration_fingerprint: Mapping[str, Any] | None = None
    reproducible: dict[str, str] | None = None
    layers: dict[str, ManifestLayer] = {}
    verified: dict[str, Any] | None = None

    @classmethod
    def parse(cls, text: str | None, path: Path) -> Manifest:
        """The manifest in the metadata of a model at ``path``. Raises InputError where it is damaged."""
        try:
            loaded = json.loads(text) if text is not None else None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, error) from error
        return cls.of(loaded, path) if isinstance(loaded, dict) else cls()

    @classmethod
    def of(cls, loaded: dict[str, Any], path: Path) -> Manifest:
        """The manifest that a JSON object is. Raises InputError where a value is of another kind than it should be."""
        try:
            return cls.model_validate(loaded)
        except ValidationError as error:
            raise _damaged(path, error) from error

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `of` reads."""
        layers = {name: layer.to_json() for name, layer in self.layers.items()}
        return super().to_json() | {"layers": layers}

    def layer_schemes(self) -> dict[str, int]:
        """How many layers have which scheme, the most frequent first."""
        return dict(Counter(layer.scheme for layer in self.layers.values() if layer.scheme).most_common())


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} holds a damaged quantcli manifest: {first_line(error)}.")
