"""How many tokens a model takes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantcli.checkpoint.config_file import read_config
from quantcli.errors import InputError
from quantcli.models.hugging_face import build_model, require_folder

#: What configurations call the number of positions that a model knows.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_LONGEST_TABLE = 1 << 14


def longest_sequence(path: Path) -> int:
    """Tokens a model can take, as its config.json says and its class counts them; 512 where neither does."""
    config = read_config(require_folder(path) / "config.json")
    nested = config.get("text_config")
    known = [section.get(key) for section in (config, nested) if isinstance(section, dict) for key in _POSITIONS]
    longest = next((value for value in known if isinstance(value, int) and value > 0), 512)
    # Only a learned table can be short of places, which a long one is not, and only one with a place for padding.
    learned = longest <= _LONGEST_TABLE and config.get("pad_token_id") is not None
    return longest - _places_of_padding(path, longest) if learned else longest


def _places_of_padding(path: Path, positions: int) -> int:
    """Of a table of positions, the first places that no token takes: RoBERTa counts from behind its padding."""
    try:
        with torch.device("meta"):
            model = build_model(path)
    except InputError:
        return 0  # a class that transformers does not know has nothing to look at, and is refused where it must run
    try:
        words = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return 0  # one that has several tables of words, for one
    padded = [
        place
        for module in model.modules()
        if isinstance(place := getattr(module, "padding_idx", None), int) and module is not words
        if isinstance(table := getattr(module, "weight", None), Tensor) and len(table) == positions
    ]
    return max(padded) + 1 if padded else 0
