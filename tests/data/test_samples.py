"""Samples from every kind of DATA, and what is said where it does not fit."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.tokenizers import tokenizer

from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, batches, load_samples
from quantcli.errors import InputError, UsageError

FLOAT, INT64, INT32 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)
IMAGE = (Port("image", FLOAT, ("batch", 2, 3)),)
PAIR = (Port("a", FLOAT, (None, 4)), Port("b", INT64, ("n", "m")))
RNG = np.random.default_rng(3)


def load(data: object, ports: tuple[Port, ...] = IMAGE, **options: Any) -> Samples:
    folder = options.pop("folder", None)
    return load_samples(DataRequest(str(data), **options), ports, folder=folder)


def arrays(samples: Samples, name: str = "image") -> np.ndarray:
    return np.concatenate([sample.inputs[name] for sample in samples])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    values = RNG.standard_normal((10, 2, 3)).astype(np.float32)
    save(tmp_path / "data.npz", image=np.asfortranarray(values), labels=np.arange(10, dtype=np.uint8))
    samples = load(tmp_path / "data.npz")
    assert len(samples) == 10 and samples.labels and samples.fixed_batch is None and not samples.warnings
    for _ in range(2):  # samples can be iterated over again
        assert np.array_equal(arrays(samples), values)
        assert [sample.label for sample in samples] == list(range(10))
    assert all(sample.inputs["image"].shape == (1, 2, 3) for sample in samples)
    chosen = load(tmp_path / "data.npz", samples=4)
    assert [sample.label for sample in chosen] == [0, 2, 5, 7]
    assert len({samples.sha256, chosen.sha256}) == 2
    np.savez(tmp_path / "other.npz", image=values.astype(np.float64), labels=np.arange(10))
    assert load(tmp_path / "other.npz").sha256 == samples.sha256  # the same samples, from another file


def test_what_follows_from_token_ids_is_made_where_arrays_lack_it(tmp_path: Path) -> None:
    def ports(**shapes: tuple[Any, ...]) -> tuple[Port, ...]:
        return tuple(Port(name, INT64, shape) for name, shape in shapes.items())

    ids, tokens = RNG.integers(0, 9, (3, 5)), ("batch", "sequence")
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    wanted = ports(input_ids=tokens, attention_mask=tokens, token_type_ids=tokens, position_ids=tokens)
    for name in ("ids.npy", "ids.npz"):
        last = list(load(tmp_path / name, wanted))[-1].inputs
        assert last["input_ids"].tolist() == [ids[-1].tolist()]
        assert last["attention_mask"].tolist() == [[1] * 5] and last["token_type_ids"].tolist() == [[0] * 5]
        assert last["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    given = np.tril(np.ones((3, 5), np.int64))
    np.savez(tmp_path / "masked.npz", input_ids=ids, attention_mask=given)
    assert np.array_equal(arrays(load(tmp_path / "masked.npz", wanted), "attention_mask"), given)
    for other in (
        ports(input_ids=tokens, attention_mask=("batch", "total")),
        (*ports(input_ids=tokens, position_ids=tokens), Port("past_key_values.0.key", FLOAT, ("batch", 2, "past", 4))),
    ):
        with pytest.raises(InputError, match="got nothing"):
            load(tmp_path / "ids.npz", other)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_samples_that_hold_no_finite_numbers_are_told(tmp_path: Path, spoilt: float) -> None:
    for number in range(3):
        values = RNG.standard_normal((2, 2, 3)).astype(np.float32)
        values[1, 0, 2] = spoilt if number else 0
        np.savez(tmp_path / f"{number}.npz", image=values)
    samples = load(tmp_path)
    assert not samples.warnings
    for _ in range(2):  # what is read twice is counted once
        arrays(samples.spread(len(samples)))
    (warning,) = samples.warnings
    assert f"2 samples hold NaN or infinite values: Sample 1 of {tmp_path / '1.npz'}, in the input image" in warning
    assert samples.only(0).warnings == [warning]  # told of the whole source


def test_one_array_needs_no_name(tmp_path: Path) -> None:
    values = RNG.standard_normal((5, 2, 3))
    np.save(tmp_path / "x.npy", values)
    np.savez(tmp_path / "x.npz", values)
    for name in ("x.npy", "x.npz"):
        samples = load(tmp_path / name)
        assert np.array_equal(arrays(samples), values.astype(np.float32)) and not samples.labels


def test_an_optional_input_may_be_absent(tmp_path: Path) -> None:
    ids, mask = np.arange(12).reshape(3, 4), np.ones((3, 4), int)
    ports = (Port("ids", INT64, ("n", "m")), Port("mask", INT64, ("n", "m"), optional=True))
    np.savez(tmp_path / "bare.npz", ids=ids)
    np.save(tmp_path / "bare.npy", ids)
    np.savez(tmp_path / "whole.npz", ids=ids, mask=mask)
    for name in ("bare.npz", "bare.npy"):
        assert [list(sample.inputs) for sample in load(tmp_path / name, ports)] == [["ids"]] * 3
    assert np.array_equal(arrays(load(tmp_path / "whole.npz", ports), "mask"), mask)
    np.savez(tmp_path / "odd.npz", ids=ids, mask=mask.astype(float))
    with pytest.raises(InputError, match="mask: int64 n x m is expected, got float64 3 x 4"):
        load(tmp_path / "odd.npz", ports)
    np.savez(tmp_path / "none.npz", mask=mask)
    with pytest.raises(InputError, match="ids: int64 n x m is expected, got nothing"):
        load(tmp_path / "none.npz", ports)


def test_large_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (10**8, 2, 3))  # 2.4 GB, sparse on disk
    tracemalloc.start()
    samples = load(path, samples=2)
    assert arrays(samples).shape == (2, 2, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_folder_of_files_with_samples_and_batches(tmp_path: Path) -> None:
    values = RNG.standard_normal((6, 2, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", image=values[0], labels=np.array(7))
    np.savez(tmp_path / "b.npz", image=values[1:1], labels=np.zeros(0, int))
    np.savez(tmp_path / "c.npz", image=values[1:5], labels=np.arange(4))
    np.savez(tmp_path / "d.npz", image=values[5:], labels=np.array([9]))
    samples = load(tmp_path)
    assert np.array_equal(arrays(samples), values)
    assert [sample.label for sample in samples] == [7, 0, 1, 2, 3, 9]
    assert np.array_equal(arrays(load(tmp_path, samples=3)), values[[0, 2, 4]])
    np.save(tmp_path / "e.npy", values)
    with pytest.raises(InputError, match=r"e\.npy has no labels, and others in .* do"):
        load(tmp_path)


def test_ragged_samples_are_not_stacked(tmp_path: Path) -> None:
    ports = (Port("ids", INT64, ("batch", "length")),)
    for number, length in enumerate((3, 3, 3, 5, 5, 3)):
        np.save(tmp_path / f"{number}.npy", np.full((1, length), number, np.int32))
    found = [(feeds["ids"].shape, feeds["ids"].dtype, labels) for feeds, labels in batches(load(tmp_path, ports), 2)]
    shapes = [(2, 3), (1, 3), (2, 5), (1, 3)]
    assert found == [(shape, INT64, [None] * shape[0]) for shape in shapes]


def test_states_and_scalars_have_an_axis_of_samples_before_them(tmp_path: Path) -> None:
    ports = (Port("x", FLOAT, ("batch", 4)), Port("state", FLOAT, (2, "batch", 3)), Port("rate", INT64, ()))
    state = RNG.standard_normal((5, 2, 1, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 1, 4), np.float32), state=state, rate=np.arange(5))
    samples = load(tmp_path / "d.npz", ports)
    assert samples.fixed_batch == 1
    for index, (feeds, _) in enumerate(batches(samples, 4)):
        assert feeds["x"].shape == (1, 4) and feeds["rate"].shape == () and feeds["rate"] == index
        assert np.array_equal(feeds["state"], state[index])


def test_no_fewer_samples_than_a_model_takes_at_a_time(tmp_path: Path) -> None:
    """A limit, such as a command's default, is none of the model's."""
    ports = (Port("x", np.dtype(np.float32), (200, 3)),)
    np.savez(tmp_path / "d.npz", x=np.zeros((600, 3), np.float32))
    request = DataRequest(str(tmp_path / "d.npz"))
    limited = load_samples(request.at_most(128), ports, folder=None)
    assert (len(limited), len(limited.spread(8))) == (200, 200)
    assert len(load_samples(request.at_most(450), ports, folder=None)) == 400
    np.savez(tmp_path / "d.npz", x=np.zeros((150, 3), np.float32))
    with pytest.raises(InputError, match="has 150 samples, and the model takes 200 at a time"):
        load_samples(request.at_most(128), ports, folder=None)


def test_a_model_with_a_fixed_batch_gets_batches_of_that_size(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((10, 2, 3), np.float32))
    samples = load(tmp_path / "x.npy", (Port("image", FLOAT, (4, 2, 3)),))
    assert [feeds["image"].shape[0] for feeds, _ in batches(samples, 1)] == [4, 4]
    assert samples.warnings == ["The model takes 4 samples at a time; the last 2 are left."]
    with pytest.raises(InputError, match="has 3 samples, and the model takes 4 at a time"):
        load(tmp_path / "x.npy", (Port("image", FLOAT, (4, 2, 3)),), samples=3)


@pytest.mark.parametrize(
    ("given", "wanted", "values", "expected"),
    [
        (np.float64, np.float32, [1.5], [1.5]),
        (np.float32, np.float16, [1.5, np.inf], [1.5, np.inf]),
        (np.float32, ml_dtypes.bfloat16, [1.5], [1.5]),
        (np.int32, np.int64, [-3], [-3]),
        (np.int64, np.int32, [2**31 - 1], [2**31 - 1]),
        (np.uint8, np.int64, [255], [255]),
        (np.int64, np.int32, [2**31], "values in image that int32 cannot hold; they are int64"),
        (np.int64, np.uint8, [-1], "values in image that uint8 cannot hold"),
        (np.float32, np.float16, [70000.0], "values in image that float16 cannot hold"),
        (np.float64, np.float32, [1e300], "values in image that float32 cannot hold"),
        (np.int64, np.float32, [1], r"image: float32 n is expected, got int64 1\."),
        (np.uint8, np.float32, [1], r"image: float32 n is expected, got uint8 1\."),
        (np.float32, np.int64, [1.0], r"image: int64 n is expected, got float32 1\."),
        (np.int64, np.bool_, [1], "image: bool n is expected, got int64 1"),
    ],
)
def test_conversions_keep_what_values_mean(
    tmp_path: Path, given: type, wanted: type, values: list[Any], expected: Any
) -> None:
    np.save(tmp_path / "x.npy", np.array(values, given))
    ports = (Port("image", np.dtype(wanted), ("n",)),)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            list(load(tmp_path / "x.npy", ports))
    else:
        found = arrays(load(tmp_path / "x.npy", ports))
        assert found.dtype == np.dtype(wanted) and found.tolist() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.zeros((3, 5), "f4"), "c": np.zeros(3, "u1")},
         r"a: float32 \? x 4 is expected, got float32 3 x 5; b: int64 n x m is expected, got nothing; "
         r"c is no input, got uint8 3\. The first axis counts samples"),
        ({"a": np.zeros((3, 4), "f4"), "b": np.zeros((2, 4), "i8")}, "different numbers of samples: a 3, b 2"),
        ({"a": np.zeros((0, 4), "f4"), "b": np.zeros((0, 4), "i8")}, "holds no samples: its arrays are empty"),
        ({"a": np.zeros(4, "f4"), "b": np.zeros((1, 4), "i8")}, "a: float32 . x 4 is expected, got float32 4;"),
        ({"a": np.zeros((3, 4), "f4"), "b": np.zeros((3, 4), "i8"), "labels": np.zeros(2, int)},
         "labels of int64 2; expected are integers, one for each of the 3 samples"),
        ({"a": np.zeros((3, 4), "f4"), "b": np.zeros((3, 4), "i8"), "labels": np.zeros(3)}, "labels of float64 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_shown_beside_what_is_expected(
    tmp_path: Path, content: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "d.npz", PAIR)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, image=np.zeros((3, 2, 3)))
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"PK nonsense"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable numpy file"):
            load(path)
    np.save(tmp_path / "x.npy", np.zeros((3, 2, 3)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-8])
    with pytest.raises(InputError, match="not a readable numpy file"):
        load(tmp_path / "x.npy")
    for suffix, save in ((".npy", np.save), (".npz", np.savez)):
        save(tmp_path / f"objects{suffix}", np.array([{}], object))
        with pytest.raises(InputError, match="holds Python objects, which are never loaded"):
            load(tmp_path / f"objects{suffix}")


def test_data_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist\. DATA is a"):
        load(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no samples: neither arrays nor images\. DATA is a"):
        load(tmp_path)
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(InputError, match="is of no known kind"):
        load(tmp_path / "x.csv")
    with pytest.raises(UsageError, match="--samples 0"):
        load(tmp_path, samples=0)
    np.save(tmp_path / "x.npy", np.zeros((3, 2, 3)))
    with pytest.raises(UsageError, match="--seq-len is for text"):
        load(tmp_path / "x.npy", seq_len=8)
    with pytest.raises(InputError, match=r"is one array, and the model has 2 inputs\. Give a \.npz with a, b"):
        load(tmp_path / "x.npy", PAIR)


MODULE = """
import numpy as np
def batched():
    for start in (0, 3):
        yield {"image": np.full((3, 2, 3), start, "f8"), "labels": [start, 1, 2]}
def pairs():
    import torch
    for label in range(4):
        yield {"image": torch.full((2, 3), label)}, label
def state():
    yield {"a": np.zeros((1, 4), "f4"), "b": np.zeros((2, 5), "i8")}
def nothing():
    return []
def wrong():
    yield {"picture": np.zeros((1, 2, 3), "f4")}
def plain():
    yield np.zeros((1, 2, 3))
def broken():
    yield {"image": np.zeros((1, 2, 3))}
    raise RuntimeError("out of luck")
def some():
    yield {"image": np.zeros((1, 2, 3))}, 1
    yield {"image": np.zeros((1, 2, 3))}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_samples.py").write_text(
        MODULE.replace("torch.full((2, 3), label)", "torch.full((2, 3), 1. * label)")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_samples", raising=False)
    return "my_samples"


def test_functions(module: str) -> None:
    samples = load(f"{module}:batched")
    assert len(samples) == 6 and samples.labels
    assert arrays(samples)[:, 0, 0].tolist() == [0, 0, 0, 3, 3, 3] and arrays(samples).dtype == np.float32
    assert [sample.label for sample in samples] == [0, 1, 2, 3, 1, 2]
    assert [sample.label for sample in load(f"{module}:batched", samples=4)] == [0, 1, 2, 3]
    samples = load(f"{module}:pairs")
    assert arrays(samples)[:, 0, 0].tolist() == [0, 1, 2, 3] == [sample.label for sample in samples]
    fixed = (Port("image", FLOAT, (3, 2, 3)),)
    assert [f["image"].shape for f, _ in batches(load(f"{module}:batched", fixed), 1)] == [(3, 2, 3)] * 2
    assert [f["image"].shape for f, _ in batches(load(f"{module}:pairs", fixed), 1)] == [(3, 2, 3)]
    whole = load(f"{module}:state", PAIR)
    assert len(whole) == whole.fixed_batch == 1
    assert next(iter(whole)).inputs["b"].shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "yields no samples"),
        ("wrong", "Item 1 of my_samples:wrong does not fit.*image: float32 batch x 2 x 3 is expected, got nothing"),
        ("plain", "Item 1 of my_samples:plain is ndarray; expected is a dict"),
        ("broken", "my_samples:broken failed: RuntimeError: out of luck"),
        ("some", "yields labels for some samples only"),
        ("missing", "has no missing"),
    ],
)
def test_functions_that_do_not_fit(module: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(f"{module}:{name}")


def ids(*names: str, shape: tuple[int | str | None, ...] = ("batch", "length")) -> tuple[Port, ...]:
    return tuple(Port(name, INT64, shape) for name in ("input_ids", *names))


def test_lines_of_text(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, causal=False)
    (tmp_path / "x.txt").write_text("a b c\n\nd\na b c d e f g h\n")
    ports = ids("attention_mask", "token_type_ids", "position_ids")
    samples = load(tmp_path / "x.txt", ports, folder=folder)
    assert [sample.inputs["input_ids"].tolist() for sample in samples] == [[[2, 3, 4]], [[5]], [[2, 3, 4, 5, 6, 7]]]
    assert next(iter(samples)).inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert all(sample.inputs["attention_mask"].all() for sample in samples)
    assert not any(sample.inputs["token_type_ids"].any() for sample in samples)
    assert [s.inputs["input_ids"].shape[1] for s in load(tmp_path / "x.txt", ports, folder=folder, seq_len=2)] == [
        2,
        1,
        2,
    ]
    fixed = load(tmp_path / "x.txt", ids("attention_mask", shape=(1, 4)), folder=folder)
    assert [s.inputs["attention_mask"].tolist() for s in fixed] == [[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 1]]]
    assert fixed.fixed_batch == 1
    only = load(tmp_path / "x.txt", (Port("input_ids", INT32, (None, None)),), folder=None, tokenizer=folder, samples=1)
    assert [(s.inputs.keys(), s.inputs["input_ids"].dtype) for s in only] == [({"input_ids": 0}.keys(), INT32)]


def test_records_of_text_with_labels(tmp_path: Path) -> None:
    folder, path = tokenizer(tmp_path / "model", causal=False), tmp_path / "records.jsonl"

    def loaded(*records: dict[str, Any]) -> Samples:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load(path, ids("attention_mask"), folder=folder)

    labelled = loaded({"text": "one two", "label": 2}, {"text": " "}, {"text": "three", "label": 0})
    assert labelled.labels and [sample.label for sample in labelled] == [2, 0]
    # A name, and what is only true or false, is no class.
    for label in ("good", True, None):
        plain = loaded({"text": "one", "label": label})
        assert not plain.labels and [sample.label for sample in plain] == [None]
    with pytest.raises(InputError, match="1 of 2 records have a label"):
        loaded({"text": "one", "labels": 1}, {"text": "two"})


def test_rows_of_parquet_with_labels(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from quantcli.data.text_files import load_labelled_texts

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "label": [3, 1, 0]}), path)
    assert load_labelled_texts(path, lines=True) == (["one", "two"], [3, 0])
    parquet.write_table(pyarrow.table({"text": ["one"], "label": ["good"], "sentence": ["x"]}), path)
    assert load_labelled_texts(path, lines=True) == (["one"], None)


def test_windows_for_a_causal_model(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, causal=True)
    (tmp_path / "x.txt").write_text("a b c\nd e f g h i j a b")
    samples = load(tmp_path / "x.txt", ids("attention_mask", "position_ids"), folder=folder, seq_len=4)
    assert [sample.inputs["input_ids"].tolist() for sample in samples] == [
        [[2, 3, 4, 5]],
        [[6, 7, 8, 9]],
        [[10, 11, 2, 3]],
    ]
    assert [sample.inputs["position_ids"].tolist() for sample in samples] == [[[0, 1, 2, 3]]] * 3
    assert len(load(tmp_path / "x.txt", ids(), folder=folder)) == 2  # as long as the model can take: 6
    assert len(load(tmp_path / "x.txt", ids(), folder=folder, windows=False)) == 2
    assert len(load(tmp_path / "x.txt", ids(), folder=folder, seq_len=2, samples=4)) == 4
    with pytest.raises(InputError, match="12 tokens, less than one sequence of 100"):
        load(tmp_path / "x.txt", ids(), folder=folder, seq_len=100)


def test_text_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b c\n")
    with pytest.raises(InputError, match=r"there is no tokenizer\. Name one with --tokenizer"):
        load(tmp_path / "x.txt", ids())
    folder = tokenizer(tmp_path, causal=False)
    with pytest.raises(InputError, match=r"past: float32 batch x 2 is expected, got nothing"):
        load(tmp_path / "x.txt", (*ids(), Port("past", FLOAT, ("batch", 2))), folder=folder)
    with pytest.raises(InputError, match=r"takes no tokens: image: float32 batch x 2 x 3"):
        load(tmp_path / "x.txt", folder=folder)
    with pytest.raises(UsageError, match="the model takes sequences of 4 tokens"):
        load(tmp_path / "x.txt", ids(shape=(1, 4)), folder=folder, seq_len=3)
    with pytest.raises(UsageError, match="at least two tokens"):
        load(tmp_path / "x.txt", ids(), folder=folder, seq_len=1)


def test_what_a_model_takes_at_a_time_stays_together(tmp_path: Path) -> None:
    """A file may hold one vector or one sequence, whose entries are no samples of their own."""
    (tmp_path / "d").mkdir()
    for number in range(6):
        np.save(tmp_path / "d" / f"{number}.npy", np.arange(4, dtype=np.float32) + 10 * number)
    samples = load(tmp_path / "d", (Port("x", FLOAT, (4,)),), samples=9)
    given = [feeds["x"].tolist() for feeds, _ in batches(samples, 1)]
    assert given == [[0, 1, 2, 3], [30, 31, 32, 33]]
    few = load(tmp_path / "d", (Port("x", FLOAT, (4,)),)).spread(11)
    assert [feeds["x"].tolist() for feeds, _ in batches(few, 1)] == given
