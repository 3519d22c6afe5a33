"""Records of text data: chats under the usual keys, strings of any type, and never an id for a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.tokenizers import tokenizer

from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.data.text_files import load_labelled_texts
from quantcli.errors import InputError
from quantcli.models.positions import longest_sequence

INT64 = np.dtype("int64")

ASK, REPLY = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
#: One chat of two turns, as the usual data sets have it.
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"id": "h", "messages": [ASK, REPLY]},
    "sharegpt": {"id": "h", "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]},
    "conversation": {"lang": "en", "conversation": [ASK, REPLY]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image"}]}, REPLY]},
    "completion": {"prompt": "a b", "completion": "c", "prompt_id": "h"},
    "response": {"prompt": "a b", "response": "c"},
    "chosen": {"prompt": "a b", "chosen": "c", "rejected": "d"},
    "lists": {"prompt": [ASK], "completion": [REPLY]},
    "preferences": {"prompt": "a b", "prompt_id": "h", "chosen": [ASK, REPLY], "rejected": [ASK, ASK]},
    "alpaca": {"instruction": "a b", "input": "", "output": "c", "source": "h"},
    "nulls": {"messages": [{"role": "user", "content": "a b", "value": None}, {"role": "gpt", "value": "c"}]},
}
TEMPLATE = "{% for m in messages %}{{ 'g' if m.role == 'user' else 'h' }} {{ m.content }} {% endfor %}"


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(path: Path) -> list[str]:
    return load_labelled_texts(path, lines=False)[0]


def samples(path: Path, folder: Path) -> Samples:
    ports = (Port("input_ids", INT64, ("batch", "length")),)
    return load_samples(DataRequest(str(path), seq_len=5), ports, folder=folder)


def with_template(folder: Path, template: str, *, causal: bool = True) -> Path:
    tokenizer(folder, causal=causal)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", CHATS)
def test_chats_of_the_usual_kinds(tmp_path: Path, kind: str, suffix: str) -> None:
    record, path = CHATS[kind], tmp_path / f"chats.{suffix}"
    if suffix == "jsonl":
        jsonl(path, record)
    elif kind == "parts":
        pytest.skip("one column holds one type")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    assert texts(path) == ["a b\nc"]
    folder = with_template(tmp_path / "model", TEMPLATE)
    found = samples(path, folder)
    # g a b h c, by the numbers of the tokenizer's words.
    assert [sample.inputs["input_ids"].tolist() for sample in found] == [[[8, 2, 3, 9, 4]]]
    assert not found.warnings


def test_an_input_goes_with_its_instruction_and_a_system_speaks_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"system_prompt": "e", "instruction": "a", "input": "b", "output": "c"})
    assert texts(path) == ["e\na\n\nb\nc"]


def test_without_a_template_chats_are_joined_plainly_and_a_warning_says_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", CHATS["messages"], CHATS["sharegpt"])
    found = samples(path, tokenizer(tmp_path / "model", causal=True))
    assert [sample.inputs["input_ids"].tolist() for sample in found] == [[[2, 3, 4, 2, 3]]]
    assert [warning for warning in found.warnings if "has no chat template" in warning] == found.warnings != []


def test_a_template_that_knows_no_system(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    path = jsonl(tmp_path / "x.jsonl", {"messages": [{"role": "system", "content": "e"}, ASK, REPLY]})
    found = samples(path, with_template(tmp_path / "model", strict))
    assert [sample.inputs["input_ids"].tolist() for sample in found] == [[[8, 6, 2, 3, 9]]]
    never = with_template(tmp_path / "never", "{{ raise_exception('turns must alternate') }}")
    with pytest.raises(InputError, match=r"x.jsonl, line 1 is a chat that .* does not take: turns must alternate"):
        samples(path, never)


def test_the_first_token_of_a_template_is_not_doubled(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = with_template(tmp_path / "model", "[PAD] " + TEMPLATE, causal=False)
    own = AutoTokenizer.from_pretrained(folder)
    own.bos_token = "[PAD]"
    own._tokenizer.post_processor = TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", 0)])
    own.save_pretrained(folder)
    found = samples(jsonl(tmp_path / "x.jsonl", CHATS["messages"]), folder)
    assert [sample.inputs["input_ids"].tolist() for sample in found] == [[[0, 8, 2, 3, 9]]]


@pytest.mark.parametrize(
    "record",
    [{"id": "identity_0"}, {"id": "identity_0", "turns": ["a", "b"]}, {"uuid": "x", "language": "en"}, {"review": "a"}],
)
def test_no_unknown_string_is_taken_for_text(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    for data in (jsonl(tmp_path / "x.jsonl", record), path):
        with pytest.raises(InputError, match=f"no field that is known to hold text; it has {', '.join(record)}"):
            texts(data)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": 3}, "field messages, is neither a text nor a list of turns"),
        ({"messages": ["a"]}, "a turn that is no record"),
        ({"conversations": [{"speaker": "a", "text": "b"}]}, "a turn with speaker, text; it needs role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither a text nor parts of one"),
    ],
)
def test_broken_chats_are_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"x.jsonl, line 1.*{message}"):
        texts(jsonl(tmp_path / "x.jsonl", record))


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), "string")],
    ids=str,
)
def test_strings_of_parquet_may_have_any_type(tmp_path: Path, kind: pyarrow.DataType) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", None, "two"], kind), "n": [1, 2, 3]}), path)
    assert texts(path) == ["one", "two"]


def test_chats_of_large_strings(tmp_path: Path) -> None:
    text = pyarrow.large_string()
    turns = pyarrow.large_list(pyarrow.struct([("role", text), ("content", text)]))
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"messages": pyarrow.array([[ASK, REPLY]], turns)}), path)
    assert texts(path) == ["a b\nc"]


def test_only_line_feeds_end_records(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one\u2028two"}\r\n{"text": "three"}', encoding="utf-8")
    assert texts(path) == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("Roberta", {"max_position_embeddings": 514}, 512),
        ("MPNet", {"max_position_embeddings": 514, "pad_token_id": 3}, 512),
        ("Esm", {"max_position_embeddings": 34, "pad_token_id": 1, "vocab_size": 33}, 32),
        ("Bert", {"max_position_embeddings": 512}, 512),
        ("OPT", {"max_position_embeddings": 64}, 64),
        ("CLIP", {}, 77),
    ],
)
def test_places_that_no_token_takes(tmp_path: Path, name: str, settings: dict[str, Any], wanted: int) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(architectures=[f"{name}Model"], **settings)
    config.save_pretrained(tmp_path)
    assert longest_sequence(tmp_path) == wanted
