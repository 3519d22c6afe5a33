"""Tiny vision-language models, random, with processors made offline; and images with texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

_TEXT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


def _tokenizer(special: Sequence[str]) -> tuple[transformers.PreTrainedTokenizerFast, dict[str, int]]:
    """Bytes, and words of its own for images."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=list(special),
    ), vocabulary  # fmt: skip


def llava(folder: Path) -> Path:
    """One image becomes four tokens; it has a chat template."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, words = _tokenizer(["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION).to_dict(),
        text_config=transformers.LlamaConfig(**_TEXT).to_dict(),
        image_token_index=words["<image>"],
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def paligemma(folder: Path) -> Path:
    """Token types tell images from text; it has no chat template."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer, words = _tokenizer(["<image>"])
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    text = transformers.GemmaConfig(**{**_TEXT, "vocab_size": 1600}, head_dim=16)
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "projection_dim": 64},
        text_config=text.to_dict(), image_token_id=words["<image>"], projection_dim=64, hidden_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def idefics3(folder: Path) -> Path:
    """An image becomes several parts, which lie on an axis of their own."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer, words = _tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    config = transformers.Idefics3Config(
        vision_config=_VISION, text_config=transformers.LlamaConfig(**_TEXT).to_dict(), image_token_id=words["<image>"],
        scale_factor=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    template = TEMPLATE.replace("IMAGE", "<image>")
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=template).save_pretrained(folder)
    return folder


def pictures(folder: Path, number: int) -> list[str]:
    """Files of images of several sizes; their names relative to the folder."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{index}.png" for index in range(number)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 255, (40 + 4 * index, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def records(file: Path, *rows: object) -> Path:
    """A .jsonl file."""
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file
