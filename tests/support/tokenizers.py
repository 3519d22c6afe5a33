"""A tokenizer of a few words."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def tokenizer(folder: Path, *, causal: bool) -> Path:
    """A folder with a tokenizer of whole words and a config.json."""
    import tokenizers
    import transformers

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *"abcdefghij"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    name = "LlamaForCausalLM" if causal else "BertModel"
    (folder / "config.json").write_text(json.dumps({"architectures": [name], "max_position_embeddings": 6}))
    return folder
