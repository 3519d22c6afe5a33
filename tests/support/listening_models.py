"""Tiny models that hear, random, with the files that turn sound into their inputs; and sounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
_WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def wav2vec2(folder: Path) -> Path:
    """A model of letters by CTC, at 16 kHz."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(LETTERS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    convolutions = {"conv_dim": (32, 32), "conv_stride": (10, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(
        vocab_size=len(LETTERS), **_WIDTH, **convolutions, **positions, do_stable_layer_norm=True,
        feat_extract_norm="layer", pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """An encoder-decoder that says up to 12 bytes of what it hears in four seconds."""
    from tokenizers import pre_tokenizers

    folder.mkdir()
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    vocabulary = {word: index for index, word in enumerate(words)}
    end, start, plain = (vocabulary[word] for word in special)
    tokenizer = transformers.WhisperTokenizer(
        vocab=vocabulary, merges=[], unk_token=special[0], bos_token=special[0], eos_token=special[0],
        pad_token=special[0], additional_special_tokens=special[1:],
    )  # fmt: skip
    ids = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
    layers = {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in
              {"layers": 1, "attention_heads": 4, "ffn_dim": 128}.items()}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), d_model=64, **layers, num_mel_bins=16, max_source_positions=200,
        max_target_positions=32, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        max_length=12, is_multilingual=False, no_timestamps_token_id=plain, **ids
    )
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def tone(file: Path, hertz: int, *, rate: int = 16000, seconds: float = 0.4, channels: int = 1) -> Path:
    """A sound of one tone."""
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    soundfile.write(file, np.stack([wave] * channels, 1), rate)
    return file
