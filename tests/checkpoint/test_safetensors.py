"""safetensors headers: what the reference library says of good files, and a refusal for every bad one."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

import quantcli
from quantcli.checkpoint.safetensors import SafetensorsReader, build_header, read_header
from quantcli.core.dtypes import DTYPE_BYTES, torch_dtype
from quantcli.core.tensors import TensorSpec
from quantcli.errors import InputError

SHAPES = ((), (0,), (1,), (5,), (3, 0), (2, 3), (7, 3, 2))
F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(TensorSpec, st.sampled_from(list(DTYPE_BYTES)), shapes),
    min_size=1,
    max_size=8,
)


def tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with all its bytes different where there are few of them."""
    nbytes = TensorSpec(dtype, shape).nbytes
    raw = torch.arange(nbytes).remainder(2 if dtype == "BOOL" else 251).to(torch.uint8)
    return raw.view(torch_dtype(dtype)).reshape(shape)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are alike to the last bit (NaN equals itself)."""
    assert left.dtype == right.dtype and left.shape == right.shape
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: bytes, or what becomes JSON; ``length`` is what the file claims of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def refusal(path: Path) -> str:
    """The message with which a file is refused; it always names the file."""
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


@pytest.fixture
def saved(path: Path) -> dict[str, torch.Tensor]:
    """Every dtype in every shape, in a file that the reference wrote."""
    tensors = {f"{dtype}.{shape}": tensor(dtype, shape) for dtype in DTYPE_BYTES for shape in SHAPES}
    save_file(tensors, path, metadata={"format": "pt", "é": "\n"})
    return tensors


def test_header_says_what_the_reference_says(path: Path, saved: dict[str, torch.Tensor]) -> None:
    header = read_header(path)
    with safe_open(path, "pt") as reference:
        assert [info.name for info in header.infos] == list(reference.offset_keys())
        assert header.metadata == reference.metadata()
        for info in header.infos:
            piece = reference.get_slice(info.name)
            assert (info.dtype, list(info.shape)) == (piece.get_dtype(), piece.get_shape())
            assert info.nbytes == saved[info.name].nbytes and info.file == path and info.shares is None


def test_rows_are_the_references_slices(path: Path, saved: dict[str, torch.Tensor]) -> None:
    reader = SafetensorsReader(path)
    with safe_open(path, "pt") as reference:
        for info in reader.header.infos:
            assert same_bytes(reader.read_rows(info, 0, info.rows), saved[info.name])
            ranges = [(a, b) for a in range(info.rows) for b in range(a, info.rows + 1)] if info.numel else []
            for start, stop in ranges if info.shape else []:
                expected = reference.get_slice(info.name)[start:stop]
                assert same_bytes(reader.read_rows(info, start, stop), expected)
    reader.close()
    reader.close()


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12)])
def test_dtypes_that_torch_does_not_have_are_named(path: Path, dtype: str, nbytes: int) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, nbytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    reader = SafetensorsReader(path)
    (info,) = reader.header.infos
    assert (info.dtype, info.nbytes) == (dtype, nbytes)
    with pytest.raises(InputError, match=rf"a in .*m\.safetensors is {dtype}, which torch .* has no dtype for"):
        reader.read_rows(info, 0, 4)
    report = quantcli.inspect(path)
    assert report.models[0].format == dtype and report.layers[0].details["dtype"] == dtype
    with pytest.raises(InputError, match=f"quantized as {dtype}, which quantcli does not read"):
        quantcli.convert(path, path.with_name("out.safetensors"), scheme="bf16")


def test_file_cut_after_it_was_opened(path: Path) -> None:
    save_file({"a": torch.zeros(100)}, path)
    reader = SafetensorsReader(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"m\.safetensors ends at byte"):
        reader.read_rows(reader.header.infos[0], 0, 100)


@given(specs)
@example({dtype: TensorSpec(dtype, (1,)) for dtype in DTYPE_BYTES})
@settings(deadline=None, max_examples=60)
def test_built_header_is_the_references(wanted: dict[str, TensorSpec]) -> None:
    tensors = {name: tensor(spec.dtype, spec.shape) for name, spec in wanted.items()}
    reference = save(tensors)
    header, offsets, size = build_header(wanted, {})
    assert (header, size) == (reference[: len(header)], len(reference))
    for name, start in offsets.items():
        data = reference[start : start + wanted[name].nbytes]
        assert data == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("reserve", [0, 1, 7, 8, 4096])
def test_reserve_is_room_for_metadata(path: Path, reserve: int) -> None:
    wanted = {"b": TensorSpec("BF16", (3,)), "a": TensorSpec("F32", (2, 2))}
    bare, _, _ = build_header(wanted, {"k": ""})
    header, offsets, size = build_header(wanted, {"k": ""}, reserve)
    assert len(header) % 8 == 0 and len(header) - len(bare.rstrip()) >= reserve
    filled, _, _ = build_header(wanted, {"k": "x" * reserve})
    assert len(filled) <= len(header)
    path.write_bytes(header + bytes(size - len(header)))
    assert read_header(path).offsets == offsets
    with safe_open(path, "pt") as reference:
        assert reference.get_tensor("a").shape == (2, 2)


def test_every_truncation_is_refused(path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "is not a valid safetensors file" in refusal(path)


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    """A header with one tensor; by default a good one for 8 bytes of data."""
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (json.dumps(entry()).encode("utf-16"), "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "lacks dtype, shape or data_offsets"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a name occurs twice"),
        (b'{"\\ud800":%b}' % json.dumps(F32_PAIR).encode(), "surrogates not allowed"),
        ({"a": []}, "tensor 'a' lacks dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "lacks dtype, shape or data_offsets"),
        (entry(dtype="F3"), "unknown dtype 'F3'"),
        (entry(dtype=["F32"]), "unknown dtype ['F32']"),
        (entry(dtype=None), "unknown dtype None"),
        (entry(shape=[-2]), "impossible shape [-2]"),
        (entry(shape=[2.0]), "impossible shape [2.0]"),
        (entry(shape=[True, 2]), "impossible shape [True, 2]"),
        (entry(shape="2"), "impossible shape '2'"),
        (entry(shape=[1 << 62, 1 << 62]), "impossible shape"),
        (entry(shape=[1 << 32, 1 << 32, 0], data_offsets=[0, 0]), "impossible shape"),
        (entry(shape=[1] * 65), "impossible shape"),
        (entry(shape=[3]), "spans 8 bytes, but F32 [3] needs 12"),
        (entry(shape=[1]), "spans 8 bytes, but F32 [1] needs 4"),
        (entry(dtype="F64"), "spans 8 bytes, but F64 [2] needs 16"),
        (entry(data_offsets=[8, 0]), "spans -8 bytes"),
        (entry(data_offsets=[-8, 0]), "impossible offsets [-8, 0]"),
        (entry(data_offsets=[0, 8.0]), "impossible offsets [0, 8.0]"),
        (entry(data_offsets=[False, 8]), "impossible offsets [False, 8]"),
        (entry(data_offsets=[0, 8, 8]), "impossible offsets [0, 8, 8]"),
        (entry(data_offsets=[4, 12]), "bytes 4 to 12 leaves a gap"),
        (entry(shape=[1 << 40], data_offsets=[0, 1 << 42]), "truncated"),
        (entry(shape=[1], data_offsets=[0, 4]), "followed by unknown bytes"),
        ({}, "followed by unknown bytes"),
        (entry() | {"b": F32_PAIR}, "'b' at bytes 0 to 8 overlaps"),
        (entry() | {"b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, "overlaps"),
        (entry() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, "leaves a gap"),
        (entry() | {"__metadata__": {"a": 1}}, "__metadata__ does not map strings to strings"),
        (entry() | {"__metadata__": []}, "__metadata__ does not map strings to strings"),
        (entry() | {"__metadata__": False}, "__metadata__ does not map strings to strings"),
    ],
)
def test_bad_header(path: Path, header: Any, reason: str) -> None:
    write(path, header, bytes(8))
    assert reason in refusal(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_a_name_given_twice(path: Path) -> None:
    """The reference lets the last one win."""
    pair = json.dumps(F32_PAIR).encode()
    assert "a name occurs twice" in refusal(write(path, b'{"a":%b,"a":%b}' % (pair, pair), bytes(8)))


@pytest.mark.parametrize("length", [0, 1, 60, 10_000, 99_000_000, 1 << 40, (1 << 64) - 1])
def test_header_length_that_lies(path: Path, length: int) -> None:
    write(path, entry(), bytes(8), length)
    assert "is not a valid safetensors file" in refusal(path)


def test_null_metadata_is_none(path: Path) -> None:
    assert read_header(write(path, entry() | {"__metadata__": None}, bytes(8))).metadata == {}


@pytest.mark.parametrize(
    ("header", "length"),
    [(entry(), 99_000_000), (entry(shape=[1 << 40], data_offsets=[0, 1 << 42]), None)],
    ids=["header", "tensor"],
)
def test_nothing_is_allocated_for_a_lie(path: Path, header: Any, length: int | None) -> None:
    write(path, header, bytes(8), length)
    tracemalloc.start()
    refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_accepted_the_reference_accepts(path: Path, data: st.DataObject) -> None:
    good = save({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.int8)}, {"format": "pt"})
    header, body = bytearray(good[8:-11]), good[-11:]
    for _ in range(data.draw(st.integers(1, 3))):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(header))] * 2)))
        patch = data.draw(st.sampled_from([b"", b"0", b"9", b"-", b" ", b'"', b",", b"[", b"}", b"\\u00e9", b"\xff"]))
        header[first : min(last, first + 3)] = patch
    write(path, bytes(header), body)
    try:
        infos = read_header(path).infos
    except InputError:
        return
    with safe_open(path, "pt") as reference:
        assert [info.name for info in infos] == list(reference.offset_keys())
