"""The STATS file: safetensors with the used bins of all tensors in a row, and their provenance in the metadata.

Arrays: ``bins`` uint16 and ``counts`` (uint32, or int64 where that is too small), of all tensors one after the
other; ``sizes`` int64 ``[tensors, 4]``: bins, channels (0: none), NaN, infinities; ``extremes`` float32
``[tensors, 2]``; ``channel_minimum``, ``channel_maximum`` and ``channel_mean`` float32. The metadata has one key,
``quantcli``, whose JSON holds the tensors' names in order: safetensors writes several keys in any order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from quantcli.calibration.observers import TensorStats
from quantcli.calibration.ranges import METHODS
from quantcli.checkpoint.safetensors import read_header
from quantcli.errors import InputError
from quantcli.system.files import explain, whole_file
from quantcli.version import __version__

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
_KEY = "quantcli"
_DTYPES = {
    "bins": ("U16",),
    "counts": ("U32", "I64"),
    "sizes": ("I64",),
    "extremes": ("F32",),
    "channel_minimum": ("F32",),
    "channel_maximum": ("F32",),
    "channel_mean": ("F32",),
}
_NUMPY = {"U16": "<u2", "U32": "<u4", "I64": "<i8", "F32": "<f4"}


@dataclass(frozen=True)
class Provenance:
    """Where statistics come from: hashes of the model and of the samples used, and how these were chosen.

    ``fingerprint`` tells whether other data has samples in common (see `quantcli.data.fingerprint`).
    """

    method: str
    samples: int
    seed: int
    model_sha256: str
    data_sha256: str
    fingerprint: Mapping[str, Any] | None = None


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["calibration statistics"]
    format_version: Literal[1]
    quantcli: str
    method: str
    samples: int
    seed: int
    model_sha256: str
    data_sha256: str
    fingerprint: dict[str, Any] | None = None
    tensors: list[str]


def write(path: Path, provenance: Provenance, stats: Mapping[str, TensorStats]) -> None:
    """Write a STATS file beside its place, then rename it. Raises InputError where that fails."""
    import numpy as np
    from safetensors.numpy import save

    tensors = list(stats.values())
    counts = _joined([t.counts for t in tensors], np.int64)
    low = [t.channel_minimum for t in tensors if t.channel_minimum is not None]
    high = [t.channel_maximum for t in tensors if t.channel_maximum is not None]
    mean = [t.channel_mean for t in tensors if t.channel_mean is not None]
    arrays = {
        "bins": _joined([t.bins for t in tensors], np.uint16),
        "counts": counts.astype(np.uint32) if counts.max(initial=0) < 1 << 32 else counts,
        "sizes": np.array(
            [
                [len(t.bins), 0 if t.channel_minimum is None else len(t.channel_minimum), t.nans, t.infinities]
                for t in tensors
            ],
            np.int64,
        ).reshape(-1, 4),
        "extremes": np.array([[t.minimum or 0.0, t.maximum or 0.0] for t in tensors], np.float32).reshape(-1, 2),
        "channel_minimum": _joined(low, np.float32),
        "channel_maximum": _joined(high, np.float32),
        "channel_mean": _joined(mean, np.float32),
    }
    metadata = _Metadata(
        kind="calibration statistics",
        format_version=1,
        quantcli=__version__,
        tensors=list(stats),
        **asdict(provenance),
    )
    content = save(arrays, {_KEY: json.dumps(metadata.model_dump(), ensure_ascii=False)})
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise explain(error, path) from error


def read(path: Path) -> tuple[Provenance, dict[str, TensorStats]]:
    """Read a STATS file. Raises InputError where it is missing, damaged, or something else."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    try:
        header = read_header(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    metadata = _metadata(path, header.metadata.get(_KEY))
    infos = {info.name: info for info in header.infos}
    if infos.keys() != _DTYPES.keys() or any(infos[name].dtype not in dtypes for name, dtypes in _DTYPES.items()):
        raise _damaged(path, "its arrays are not those of calibration statistics")
    arrays: dict[str, np.ndarray] = {}
    for name, info in infos.items():
        flat = np.fromfile(path, _NUMPY[info.dtype], info.numel, offset=header.offsets[name])
        arrays[name] = flat.reshape(info.shape)
    try:
        tensors = _tensors(arrays, metadata.tensors)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return Provenance(*(getattr(metadata, field.name) for field in fields(Provenance))), tensors


def _metadata(path: Path, text: str | None) -> _Metadata:
    try:
        document = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its metadata is not JSON") from error
    if not isinstance(document, dict) or document.get("kind") != "calibration statistics":
        raise InputError(f"{path} holds no calibration statistics.", "quantcli calibrate writes such a file.")
    if document.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has version {document.get('format_version')} of the format, this quantcli reads {FORMAT_VERSION}.",
            "Run quantcli calibrate anew.",
        )
    try:
        metadata = _Metadata.model_validate(document)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(path, f"its metadata has no valid {where}") from error
    if metadata.method not in METHODS:
        raise _damaged(path, f"its method {metadata.method!r} is unknown")
    return metadata


def _tensors(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, TensorStats]:
    """The tensors' statistics from the joined arrays. Raises ValueError where these contradict each other."""
    import numpy as np

    sizes, extremes, bins, counts = (arrays[name] for name in ("sizes", "extremes", "bins", "counts"))
    if sizes.shape != (len(names), 4) or extremes.shape != (len(names), 2) or len(set(names)) != len(names):
        raise ValueError(f"it names {len(names)} tensors and describes {len(sizes)}")
    # Each is bounded by a file's size before they are summed, so that no sum overflows.
    if (sizes < 0).any() or (sizes[:, 0] > 1 << 16).any() or (sizes[:, 1] > arrays["channel_minimum"].size).any():
        raise ValueError("its sizes are impossible")
    ends = np.cumsum(sizes[:, :2], axis=0) if len(names) else np.zeros((1, 2), np.int64)
    lengths = {name: array.shape for name, array in arrays.items()}
    total, channels = ends[-1].tolist()
    if lengths["bins"] != (total,) or lengths["counts"] != (total,):
        raise ValueError("its histograms have other sizes than it says")
    if any(lengths[f"channel_{what}"] != (channels,) for what in ("minimum", "maximum", "mean")):
        raise ValueError("its channels have other numbers than it says")
    if (counts <= 0).any() or ((bins & 0x7FFF) >= 0x7F80).any() or not np.isfinite(extremes).all():
        raise ValueError("its histograms hold impossible values")
    tensors: dict[str, TensorStats] = {}
    for name, (end, channel_end), (n_bins, n_channels, nans, infinities), (low, high) in zip(
        names, ends.tolist(), sizes.tolist(), extremes.tolist(), strict=True
    ):
        own, channel = slice(end - n_bins, end), slice(channel_end - n_channels, channel_end)
        if (np.diff(bins[own].astype(np.int64)) <= 0).any() or low > high:
            raise ValueError(f"the histogram of {name} is not in order")
        tensors[name] = TensorStats(
            bins[own],
            counts[own].astype(np.int64),
            low if n_bins else None,
            high if n_bins else None,
            nans,
            infinities,
            arrays["channel_minimum"][channel] if n_channels else None,
            arrays["channel_maximum"][channel] if n_channels else None,
            arrays["channel_mean"][channel] if n_channels else None,
        )
    return tensors


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    import numpy as np

    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a valid file of calibration statistics: {why}.", "Run quantcli calibrate anew.")
