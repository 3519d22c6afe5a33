"""Tiny models of architectures whose settings follow no rule of names, each written down, with inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

VOCAB, TOKENS, SAMPLES = 320, 16, 8
#: Settings of an encoder, and of one that sees pictures of 32 x 32.
_SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_SEES: Mapping[str, Any] = {**_SMALL, "image_size": 32, "patch_size": 8}
_READS: Mapping[str, Any] = {**_SMALL, "vocab_size": VOCAB, "max_position_embeddings": 64}
_DEEP: Mapping[str, Any] = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder", "speech_encoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder", "speech_encoder")},
    **{f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")},
    "vocab_size": VOCAB,
}
_HEARS: Mapping[str, Any] = {
    **_SMALL,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_T5: Mapping[str, Any] = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_SHIFTED: Mapping[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_LATENT: Mapping[str, Any] = {
    "num_latents": 16,
    "d_latents": 64,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
}

#: What a case is of: the class, its configuration, and what it is given.
Made = tuple[str, Any, dict[str, Any]]


def _random() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def _ids() -> Any:
    import torch

    return torch.randint(5, VOCAB // 2, (SAMPLES, TOKENS), generator=_random())


def _text() -> dict[str, Any]:
    import torch

    return {"input_ids": _ids(), "attention_mask": torch.ones(SAMPLES, TOKENS, dtype=torch.int64)}


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(SAMPLES, *shape, generator=_random())


def _picture(size: int) -> dict[str, Any]:
    return {"pixel_values": _noise(3, size, size)}


def _said() -> dict[str, Any]:
    return {"decoder_input_ids": _ids()}


def _swin() -> Made:
    import transformers as t

    return "SwinForImageClassification", t.SwinConfig(**_SHIFTED), _picture(64)


def _donut() -> Made:
    import transformers as t

    return "DonutSwinModel", t.DonutSwinConfig(**_SHIFTED), _picture(64)


def _mobilevit() -> Made:
    import transformers as t

    config = t.MobileViTV2Config(image_size=64, width_multiplier=0.25)
    return "MobileViTV2ForImageClassification", config, _picture(64)


def _hiera() -> Made:
    import transformers as t

    config = t.HieraConfig(image_size=[64, 64], embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
    return "HieraForImageClassification", config, _picture(64)


def _perceiver() -> Made:
    import transformers as t

    config = t.PerceiverConfig(
        **_LATENT, d_model=64, num_cross_attention_heads=4, qk_channels=64, v_channels=64,
        max_position_embeddings=TOKENS, vocab_size=VOCAB,
    )  # fmt: skip
    text = _text()
    return "PerceiverForMaskedLM", config, {"inputs": text.pop("input_ids"), **text}


def _perceiver_image() -> Made:
    import transformers as t

    config = t.PerceiverConfig(**_LATENT, d_model=512, num_cross_attention_heads=1, image_size=16, num_labels=5)
    return "PerceiverForImageClassificationLearned", config, {"inputs": _picture(16)["pixel_values"]}


def _speech_to_text() -> Made:
    import transformers as t

    config = t.Speech2TextConfig(
        **_DEEP, d_model=64, conv_channels=64, max_source_positions=64, max_target_positions=64
    )
    return "Speech2TextForConditionalGeneration", config, {"input_features": _noise(64, 80), **_said()}


def _speecht5() -> Made:
    import transformers as t

    config = t.SpeechT5Config(**{**_HEARS, **_DEEP})
    return "SpeechT5ForSpeechToText", config, {"input_values": _noise(4000), **_said()}


def _seamless() -> Made:
    import transformers as t

    config = t.SeamlessM4TConfig(
        **_DEEP, t2u_vocab_size=VOCAB, hidden_size=64, speech_encoder_intermediate_size=128,
        adaptor_kernel_size=4, adaptor_stride=4,
    )  # fmt: skip
    return "SeamlessM4TForSpeechToText", config, {"input_features": _noise(64, 160), **_said()}


def _parakeet() -> Made:
    import transformers as t

    encoder = {**_SMALL, "subsampling_conv_channels": 16, "num_mel_bins": 80}
    config = t.ParakeetCTCConfig(vocab_size=VOCAB, encoder_config=encoder)
    return "ParakeetForCTC", config, {"input_features": _noise(64, 80)}


def _blip() -> Made:
    import transformers as t

    reads = {**_READS, "encoder_hidden_size": 64, "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    config = t.BlipConfig(text_config=reads, vision_config=dict(_SEES), projection_dim=64, image_text_hidden_size=64)
    return "BlipForConditionalGeneration", config, {**_picture(32), **_text()}


def _captions() -> Made:
    import transformers as t

    says = t.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True, is_decoder=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = t.VisionEncoderDecoderConfig(encoder=t.ViTConfig(**_SEES).to_dict(), decoder=says.to_dict())
    return "VisionEncoderDecoderModel", config, {**_picture(32), **_said()}


def _listener() -> Made:
    import transformers as t

    says = t.BertConfig(**_READS, is_decoder=True, add_cross_attention=True)
    config = t.SpeechEncoderDecoderConfig(encoder=t.Wav2Vec2Config(**_HEARS).to_dict(), decoder=says.to_dict())
    return "SpeechEncoderDecoderModel", config, {"input_values": _noise(4000), **_said()}


def _translator() -> Made:
    import transformers as t

    says = t.BertConfig(**_READS, is_decoder=True, add_cross_attention=True)
    parts = {"encoder": t.BertConfig(**_READS).to_dict(), "decoder": says.to_dict()}
    config = t.EncoderDecoderConfig(**parts, decoder_start_token_id=1, pad_token_id=0)
    return "EncoderDecoderModel", config, {**_text(), **_said()}


def _document() -> Made:
    import torch
    import transformers as t

    boxes = torch.rand(SAMPLES, TOKENS, 4, generator=_random())
    given = {"input_ids": _ids(), "bbox": boxes, **_picture(32), **_said()}
    return "UdopForConditionalGeneration", t.UdopConfig(**_T5, image_size=32, patch_size=8), given


def _patches() -> Made:
    import torch
    import transformers as t

    reads = {**_T5, "hidden_size": 64}
    reads.pop("d_model")
    sees = {**_SMALL, "patch_embed_hidden_size": 768, "d_ff": 128, "d_kv": 16, "seq_len": 64}
    sees.pop("intermediate_size")
    places = torch.arange(12).float()
    rows_and_columns = torch.stack([places // 4 + 1, places % 4 + 1], -1).expand(SAMPLES, 12, 2)
    given = {"flattened_patches": torch.cat([rows_and_columns, _noise(12, 768)], -1), **_said()}
    return "Pix2StructForConditionalGeneration", t.Pix2StructConfig(text_config=reads, vision_config=sees), given


def _decision() -> Made:
    import torch
    import transformers as t

    config = t.DecisionTransformerConfig(state_dim=6, act_dim=3, hidden_size=64, n_layer=2, n_head=4, n_positions=64)
    steps = {"timesteps": torch.arange(8).repeat(SAMPLES, 1), "attention_mask": torch.ones(SAMPLES, 8).long()}
    seen = {"states": _noise(8, 6), "actions": _noise(8, 3), "rewards": _noise(8, 1), "returns_to_go": _noise(8, 1)}
    return "DecisionTransformerModel", config, {**seen, **steps}


def _series() -> Made:
    import transformers as t

    config = t.PatchTSTConfig(
        context_length=32, patch_length=8, patch_stride=8, d_model=64, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=128, num_input_channels=2, prediction_length=8,
    )  # fmt: skip
    return "PatchTSTForPrediction", config, {"past_values": _noise(32, 2)}


CASES: Mapping[str, Callable[[], Made]] = {
    "swin": _swin,
    "donut-swin": _donut,
    "mobilevitv2": _mobilevit,
    "hiera": _hiera,
    "perceiver": _perceiver,
    "perceiver-image": _perceiver_image,
    "speech_to_text": _speech_to_text,
    "speecht5": _speecht5,
    "seamless_m4t": _seamless,
    "parakeet_ctc": _parakeet,
    "blip": _blip,
    "vision-encoder-decoder": _captions,
    "speech-encoder-decoder": _listener,
    "encoder-decoder": _translator,
    "udop": _document,
    "pix2struct": _patches,
    "decision_transformer": _decision,
    "patchtst": _series,
}
