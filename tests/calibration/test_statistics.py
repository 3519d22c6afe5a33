"""The STATS file: what is written is read, equal bytes for equal statistics, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantcli.calibration.observers import Observer
from quantcli.calibration.statistics import CalibrationStats
from quantcli.calibration.statistics_file import Provenance
from quantcli.errors import InputError

PROVENANCE = Provenance("mse", 3, 11, "a" * 64, "b" * 64)


def statistics(scale: float = 1.0) -> CalibrationStats:
    rng = np.random.default_rng(5)
    tensors = {}
    arrays = {
        "image": rng.standard_normal((2, 3, 8, 8)),
        "näme/with:odd.signs": rng.standard_normal((4, 20)) * 1e-3,
        "nan": np.full((2, 2), np.nan),
        "empty": np.zeros((0, 4)),
        "zero": np.zeros((2, 4)),
        "vector": np.array([np.inf, 2.0, -7.0]),
    }
    for name, values in arrays.items():
        observer = Observer()
        observer.update(values * scale)
        tensors[name] = observer.result()
    return CalibrationStats(PROVENANCE, tensors)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    stats, path = statistics(), tmp_path / "new folder" / "stats.safetensors"
    stats.save(path)
    loaded = CalibrationStats.load(path)
    assert loaded.provenance == PROVENANCE
    assert (loaded.method, loaded.samples, loaded.seed) == ("mse", 3, 11)
    assert (loaded.model_sha256, loaded.data_sha256) == ("a" * 64, "b" * 64)
    assert list(loaded.tensors) == list(stats.tensors)
    for name, ours in stats.tensors.items():
        theirs = loaded[name]
        for key in ("minimum", "maximum", "nans", "infinities", "elements"):
            assert getattr(ours, key) == getattr(theirs, key), (name, key)
        for key in ("bins", "counts", "channel_minimum", "channel_maximum", "channel_mean"):
            left, right = getattr(ours, key), getattr(theirs, key)
            assert (left is None) == (right is None)
            assert left is None or (left.dtype == right.dtype and np.array_equal(left, right, equal_nan=True))
        assert stats.range(name) == loaded.range(name)
        assert stats.range(name, "minmax") == loaded.range(name, "minmax") == ours.range("minmax")
    assert stats.range("image") != stats.range("image", "minmax")
    assert loaded.warnings() == stats.warnings() and len(stats.warnings()) == 4
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]


def test_equal_statistics_give_equal_bytes_that_safetensors_reads(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    statistics().save(one)
    statistics().save(two)
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, "np") as file:
        metadata = json.loads(file.metadata()["quantcli"])
    assert metadata["model_sha256"] == "a" * 64 and metadata["tensors"][0] == "image"
    assert not {"time", "path"} & metadata.keys()


def test_counts_above_four_billion_are_kept(tmp_path: Path) -> None:
    stats = statistics()
    stats["image"].counts[0] = 1 << 40
    stats.save(tmp_path / "stats")
    assert CalibrationStats.load(tmp_path / "stats")["image"].counts[0] == 1 << 40


def test_statistics_of_another_model_are_refused() -> None:
    statistics().require_model("a" * 64)
    with pytest.raises(InputError, match=r"belong to another model: its hash is aaaa.*this model's is cccc"):
        statistics().require_model("c" * 64)
    with pytest.raises(InputError, match=r"hold nothing about elsewhere\. Run quantcli calibrate"):
        statistics().range("elsewhere")


def test_the_ratio_of_a_tensor_is_that_of_its_values() -> None:
    stats = statistics()
    assert 35 < (stats.sqnr_db("image", *stats.range("image")) or 0) < 60
    assert stats.sqnr_db("zero", 0, 0) is None


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        statistics().save(tmp_path / "file" / "stats.safetensors")


def damaged(path: Path, **changes: Any) -> Path:
    """A valid file with arrays replaced, or keys of its metadata."""
    statistics().save(path)
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["quantcli"])
    for key, value in changes.items():
        if key in arrays:
            arrays[key] = value(arrays[key].copy())
        else:
            metadata[key] = value
    arrays |= changes.pop("extra", {})
    metadata.pop("extra", None)
    save_file(arrays, path, {"quantcli": json.dumps(metadata)})
    return path


def _set(index: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "something"}, "holds no calibration statistics"),
        ({"format_version": 2}, "has version 2 of the format, this quantcli reads 1"),
        ({"method": "magic"}, "its method 'magic' is unknown"),
        ({"samples": "3"}, "no valid samples"),
        ({"surprise": 1}, "no valid surprise"),
        ({"tensors": ["image"]}, "names 1 tensors and describes 6"),
        ({"tensors": ["a", "a", "b", "c", "d", "e"]}, "names 6 tensors"),
        ({"extra": {"more": np.zeros(1)}}, "not those of calibration statistics"),
        ({"counts": lambda a: a.astype(np.float32)}, "not those of calibration statistics"),
        ({"counts": _set(0, 0)}, "impossible values"),
        ({"bins": _set(-1, 0x7F80)}, "impossible values"),
        ({"extremes": _set((0, 0), np.nan)}, "impossible values"),
        ({"extremes": _set((0, 0), 1e9)}, "histogram of image is not in order"),
        ({"bins": lambda a: a[::-1].copy()}, "is not in order"),
        ({"sizes": _set((0, 0), -1)}, "sizes are impossible"),
        ({"sizes": _set((0, 1), 1 << 62)}, "sizes are impossible"),
        ({"sizes": _set((0, 0), 5)}, "other sizes than it says"),
        ({"sizes": _set((0, 1), 2)}, "other numbers than it says"),
        ({"sizes": lambda a: a[:, :3].copy()}, "describes 6"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationStats.load(damaged(tmp_path / "stats", **changes))


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        CalibrationStats.load(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a file"):
        CalibrationStats.load(tmp_path)
    save_file({"weight": np.zeros(4)}, tmp_path / "weights")
    with pytest.raises(InputError, match=r"holds no calibration statistics\. quantcli calibrate writes"):
        CalibrationStats.load(tmp_path / "weights")
    save_file({"weight": np.zeros(4)}, tmp_path / "weights", {"quantcli": "{"})
    with pytest.raises(InputError, match="metadata is not JSON"):
        CalibrationStats.load(tmp_path / "weights")
    statistics().save(tmp_path / "stats")
    whole = (tmp_path / "stats").read_bytes()
    (tmp_path / "stats").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a valid safetensors file"):
        CalibrationStats.load(tmp_path / "stats")


def test_observers_that_are_merged_have_seen_what_one_would() -> None:
    """In any order, and to the bit: so ranks share a calibration."""
    values = np.random.default_rng(3).standard_normal((6, 4, 5)).astype(np.float32)
    values[1, 2, 3], values[4, 0, 0] = np.nan, np.inf
    whole, merged = Observer(), Observer()
    whole.update(values)
    parts = [Observer() for _ in range(3)]
    for part, piece in zip(parts, np.split(values, 3), strict=True):
        part.update(piece)
    for part in reversed(parts):
        merged.merge(part)
    one, other = whole.result(), merged.result()
    finite = values[np.isfinite(values)]
    assert (other.minimum, other.maximum) == (finite.min(), finite.max())
    assert (other.elements, other.nans, other.infinities) == (values.size, 1, 1)
    for field in ("bins", "counts", "channel_minimum", "channel_maximum", "channel_mean"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
