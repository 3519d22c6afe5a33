"""What an artifact says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

MANIFEST = "quantcli.json"

#: Key under which an ONNX file of ours carries its manifest.
MANIFEST_KEY = "quantcli"

#: Key of a fingerprint in an artifact's manifest.
FINGERPRINT_KEY = "calibration_fingerprint"


def layer_schemes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """How many layers of one of our artifacts have which scheme, the most frequent first."""
    schemes = (entry.get("scheme") for entry in manifest.get("layers", {}).values())
    return dict(Counter(scheme for scheme in schemes if scheme).most_common())
