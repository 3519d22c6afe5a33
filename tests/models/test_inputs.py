"""What models take: inputs that follow from others, as the library makes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from quantcli.conversion.checkpoint.made_up_inputs import candidates
from quantcli.core.ports import Port
from quantcli.models.inputs import decoder_inputs, hugging_face_ports

SIZES = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize("start", [0, 3])
def test_decoder_inputs_are_those_of_the_library(start: int) -> None:
    config = transformers.T5Config(**SIZES, decoder_start_token_id=start, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 2, 1]])
    made = decoder_inputs({"input_ids": ids.numpy()}, start)
    assert torch.equal(torch.from_numpy(made["decoder_input_ids"]), model._shift_right(ids))


def test_decoder_inputs_that_are_given_stay() -> None:
    given = np.ones((1, 2), np.int64)
    assert decoder_inputs({"input_ids": given, "decoder_input_ids": given}, 0) == {}


def test_the_decoder_of_a_sound_begins_with_its_start() -> None:
    made = decoder_inputs({"input_features": np.zeros((2, 8, 20), np.float32)}, 7)
    assert made["decoder_input_ids"].tolist() == [[7], [7]]


def named(folder: Path, architecture: str) -> dict[str, Port]:
    """The inputs of a folder of which nothing but its class is known."""
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return {port.name: port for port in hugging_face_ports(folder)}


def test_data_may_bring_every_tensor_that_a_class_takes(tmp_path: Path) -> None:
    ports = named(tmp_path, "DecisionTransformerModel")
    assert {"states", "actions", "rewards", "returns_to_go", "timesteps"} <= ports.keys()
    assert ports["timesteps"].dtype_of(np.dtype(np.int32)) == np.int32
    assert ports["actions"].dtype_of(np.dtype(np.float64)) == np.float32
    # Boxes are whole numbers in one class, and shares of a page in another.
    assert named(tmp_path, "UdopForConditionalGeneration")["bbox"].dtype_of(np.dtype(np.float32)) == np.float32
    # What training and generation give is no data, nor is what stands in for token ids.
    never = {"labels", "past_key_values", "inputs_embeds", "encoder_outputs", "position_ids"}
    assert not never & named(tmp_path, "BartForConditionalGeneration").keys()


def test_sound_under_either_name_is_enough(tmp_path: Path) -> None:
    ports = named(tmp_path, "SpeechEncoderDecoderModel")
    assert "inputs" not in ports or ports["inputs"].optional
    assert ports["input_values"].optional and "decoder_input_ids" in ports


def test_a_model_of_videos_takes_pictures_in_a_row(tmp_path: Path) -> None:
    assert len(named(tmp_path, "ViTForImageClassification")["pixel_values"].shape or ()) == 4
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["VideoMAEForVideoClassification"], "num_frames": 4})
    )
    assert hugging_face_ports(tmp_path)[0].shape == ("batch", "frames", "channels", "height", "width")


@pytest.mark.parametrize("given", ["pixel_values", "input_values"])
def test_a_decoder_of_pictures_or_sound_is_given_ids_to_go_on_from(given: str) -> None:
    class Model(torch.nn.Module):
        main_input_name, config = given, SimpleNamespace(vocab_size=40)

        def forward(self, pixel_values: object = None, input_values: object = None, decoder_input_ids: object = None):
            return None

    first = next(candidates(Model()))
    assert first.keys() == {given, "decoder_input_ids"}
    assert int(first["decoder_input_ids"].max()) < 40


def test_flattened_patches_have_their_places_before_them() -> None:
    class Model(torch.nn.Module):
        main_input_name = "flattened_patches"
        config = SimpleNamespace(patch_embed_hidden_size=12, vocab_size=40)

        def forward(self, flattened_patches: object = None, decoder_input_ids: object = None) -> None:
            return None

    patches = next(candidates(Model()))["flattened_patches"]
    assert patches.shape[-1] == 14
    assert patches[0, :5, :2].tolist() == [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1]]
