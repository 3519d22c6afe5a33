"""Tokenizers in GGUF: the tokens, and by name how text is cut before they are looked for.

llama.cpp knows ways of cutting text by name alone. A tokenizer.json has one of these names if it says the same; one
that says something else is refused, since the wrong name gives other tokens without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.hugging_face import load_json
from quantcli.errors import InputError

#: Kinds of tokens in GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE, UNKNOWN = 1, 3, 4, 5, 6, 2
_SPACE = "\u2581"

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (f"{_WORDS}{digits}{_REST}" for digits in (r"\p{N}{1,3}", r"\p{N}"))


def _byte_level(**settings: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **settings}


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


@dataclass(frozen=True)
class Cutting:
    """A way of cutting text: what tokenizer.json says as ``pre_tokenizer`` and ``normalizer``.

    ``ignores_merges``: a piece that is a token is taken whole.
    """

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignores_merges: bool = False


#: llama.cpp's names of ways to cut text for byte-level tokens.
CUTTINGS: dict[str, Cutting] = {
    "gpt-2": Cutting(_byte_level(use_regex=True)),
    "smollm": Cutting(
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
        }
    ),
    "llama-bpe": Cutting(_split(_LLAMA3), ignores_merges=True),
    "qwen2": Cutting(_split(_QWEN2), {"type": "NFC"}),
}

#: Tokens of sentencepiece: how spaces become part of words, by whether one is put in front of the text.
_PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_SPLIT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
_SPACES: tuple[tuple[Any, Any, bool], ...] = (
    (_PREPEND, None, True),
    (None, _METASPACE, True),
    (_REPLACE, _SPLIT_SPACES, False),
    (_REPLACE, None, False),
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model as GGUF holds them.

    ``model`` is ``gpt2`` for byte-level tokens with ``merges``, and ``llama`` for those of sentencepiece with
    ``scores``. ``pre`` names how text is cut. ``prefix``: whether a space is put in front.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    prefix: bool | None = None


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.json, as long as the model's table of tokens has rows.

    Raises:
        InputError: there is none, or it is of a kind that GGUF has no name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json, and a GGUF file holds its model's tokenizer.")
    told = load_json(path)
    model = told.get("model") or {}
    added = [token for token in told.get("added_tokens") or [] if isinstance(token, dict)]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise InputError(f"{path} is a tokenizer of kind {model.get('type')}, which is not written to GGUF (BPE is).")
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    everything = [*((text, index, NORMAL) for text, index in vocabulary.items()), *map(_added, added)]
    for text, index, kind in everything:
        if not 0 <= index < rows:
            raise InputError(f"{path} has the token {text!r} at {index}, and the model's table of tokens {rows} rows.")
        tokens[index], types[index] = text, kind
    if model.get("byte_fallback"):
        return _of_pieces(path, told, vocabulary, tokens, types)
    return Vocabulary("gpt2", _cutting_of(path, told), tuple(tokens), tuple(types))


def _added(token: Mapping[str, Any]) -> tuple[str, int, int]:
    return str(token["content"]), int(token["id"]), CONTROL if token.get("special") else USER_DEFINED


def _cutting_of(path: Path, told: Mapping[str, Any]) -> str:
    own = _essence(told.get("pre_tokenizer")), _essence(told.get("normalizer"))
    ignores = bool(told["model"].get("ignore_merges"))
    for name, cutting in CUTTINGS.items():
        same = (_essence(cutting.pre_tokenizer), _essence(cutting.normalizer)) == own
        if same and cutting.ignores_merges == ignores:
            return name
    shown = json.dumps(told.get("pre_tokenizer"), ensure_ascii=False)
    raise InputError(
        f"{path} cuts text in a way that llama.cpp has no name for among those known here "
        f"({', '.join(CUTTINGS)}): {shown[:200]}",
        "A wrong name would give other tokens; llama.cpp's own converter may know it.",
    )


def _essence(told: Any) -> Any:
    """What decides how text is cut: offsets do not, and a sequence of one is that one."""
    if isinstance(told, Mapping):
        for key in ("pretokenizers", "normalizers"):
            if isinstance(told.get(key), list) and len(told[key]) == 1:
                return _essence(told[key][0])
        return {key: _essence(value) for key, value in sorted(told.items()) if key != "trim_offsets"}
    return [_essence(each) for each in told] if isinstance(told, list) else told


def _of_pieces(
    path: Path, told: Mapping[str, Any], vocabulary: Mapping[str, int], tokens: list[str], types: list[int]
) -> Vocabulary:
    """Tokens of sentencepiece: the earlier two pieces are merged, the higher the score of what they make."""
    own = _essence(told.get("normalizer")), _essence(told.get("pre_tokenizer"))
    prefix = next((prefix for norm, cut, prefix in _SPACES if (_essence(norm), _essence(cut)) == own), None)
    if prefix is None:
        shown = json.dumps({"normalizer": told.get("normalizer"), "pre_tokenizer": told.get("pre_tokenizer")})
        raise InputError(f"{path} makes pieces of text in a way that is not written to GGUF: {shown[:300]}")
    scores = [-1e6] * len(tokens)
    for rank, merge in enumerate(told["model"].get("merges") or []):
        made = "".join(merge if isinstance(merge, list) else merge.split(" ", 1))
        index = vocabulary.get(made)
        if index is not None:
            scores[index] = max(scores[index], float(-rank))
    unknown = told["model"].get("unk_token")
    for index, text in enumerate(tokens):
        if text == unknown:
            types[index] = UNKNOWN
        elif types[index] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = BYTE
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), tuple(scores), prefix)


def tokenizer_files(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tokenizer.json and its configuration for the metadata of a file, by the names of their files.

    Raises:
        InputError: the file's tokenizer is of a kind that is not read, or damaged; ``name`` is what it is called.
    """
    model, tokens = _get(metadata, "model"), _get(metadata, "tokens")
    if not isinstance(tokens, list) or model not in ("gpt2", "llama"):
        raise InputError(f"{name} has a tokenizer of kind {model!r}, which is not read.", "Name one with --tokenizer.")
    types = _get(metadata, "token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{name} has {len(tokens)} tokens and {len(types)} kinds of them: it is damaged.")
    own = _of_bytes(metadata, name) if model == "gpt2" else _of_scores(metadata, tokens, name)
    added = [
        {
            "id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind in (CONTROL, UNKNOWN),
        }
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model_part = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": model == "llama", "byte_fallback": model == "llama",
        "ignore_merges": False, **own.pop("model"), "vocab": vocabulary,
    }  # fmt: skip
    special = {kind: _special(metadata, kind, tokens) for kind in ("bos", "eos", "unk", "pad")}
    begins = bool(_get(metadata, "add_bos_token")) and special["bos"] is not None
    told = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **own,
        "post_processor": _begin_with(special["bos"], vocabulary) if begins else None, "model": model_part,
    }  # fmt: skip
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{kind}_token": token for kind, token in special.items() if token is not None}
    template = metadata.get("tokenizer.chat_template")
    config |= {"chat_template": template} if isinstance(template, str) else {}
    return {"tokenizer.json": told, "tokenizer_config.json": config}


def _get(metadata: Mapping[str, Any], key: str) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}")


def _special(metadata: Mapping[str, Any], kind: str, tokens: list[str]) -> str | None:
    key = {"unk": "unknown", "pad": "padding"}.get(kind, kind)
    index = _get(metadata, f"{key}_token_id")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _begin_with(token: str | None, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {str(token): {"id": str(token), "ids": [vocabulary[str(token)]], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _of_bytes(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    pre = _get(metadata, "pre") or "gpt-2"
    if pre not in CUTTINGS:
        raise InputError(
            f"{name} cuts text as {pre!r}, which is not read (known: {', '.join(CUTTINGS)}).",
            "Name the model's tokenizer with --tokenizer FOLDER.",
        )
    merges = [merge.split(" ", 1) for merge in _get(metadata, "merges") or []]
    if any(len(merge) != 2 for merge in merges):
        raise InputError(f"{name} has merges that are no pairs of tokens: it is damaged.")
    cutting = CUTTINGS[pre]
    return {
        "normalizer": cutting.normalizer,
        "pre_tokenizer": cutting.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"merges": merges, "ignore_merges": cutting.ignores_merges},
    }


def _of_scores(metadata: Mapping[str, Any], tokens: list[str], name: str) -> dict[str, Any]:
    """What scores say of pieces, as merges: every way to make a token of two others, the highest score first."""
    scores = _get(metadata, "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{name} lacks the scores of its tokens: it is damaged.")
    ranks = dict(zip(tokens, scores, strict=True))
    merges = []
    for token, score in ranks.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(-score, pair) for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    merges.sort(key=lambda each: each[0])
    prefix = _get(metadata, "add_space_prefix") is not False
    unknown = _special(metadata, "unk", tokens)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": _PREPEND if prefix else _REPLACE,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {"merges": [list(pair) for _, pair in merges], "unk_token": unknown},
    }
