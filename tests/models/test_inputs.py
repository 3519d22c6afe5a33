"""What models take: inputs that follow from others, as the library makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from quantcli.models.inputs import decoder_inputs

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
