"""How wide the output head of a decoder is where nobody says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.decoders import tiny_decoder

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.decoder.recipe import decoder_recipe
from quantcli.export.decoder.architecture import Decoder, read_decoder
from quantcli.planning.recipe import Recipe, build_scheme


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Decoder]:
    folder = tiny_decoder("llama", tmp_path_factory.mktemp("tiny") / "llama")
    return open_checkpoint(folder), read_decoder(folder)


@pytest.mark.parametrize(
    ("asked", "hidden", "group"), [(None, 4096, None), (32, 4096, 128), (256, 4096, 256), (32, 96, 32), (128, 640, 128)]
)
def test_a_head_has_eight_bits_in_few_groups(
    subject: tuple[Checkpoint, Decoder], asked: int | None, hidden: int, group: int | None
) -> None:
    checkpoint, decoder = subject
    found = decoder_recipe(Recipe(scheme="int4", group_size=asked), checkpoint, replace(decoder, hidden=hidden))
    (rule,) = found.rules
    assert (rule.match, rule.scheme, rule.group_size) == ("model.embed_tokens.weight", "int8", group)


@pytest.mark.parametrize(("asked", "hidden"), [(None, 576), (16, 576), (64, 960), (16, 240)])
def test_a_head_that_long_blocks_do_not_divide_has_one_scale_for_a_row(
    subject: tuple[Checkpoint, Decoder], asked: int | None, hidden: int
) -> None:
    checkpoint, decoder = subject
    found = decoder_recipe(Recipe(scheme="int4", group_size=asked), checkpoint, replace(decoder, hidden=hidden))
    (rule,) = found.rules
    assert str(build_scheme(rule.scheme)) == "int8, channel" and rule.group_size is None


@pytest.mark.parametrize(
    "wishes",
    [
        {"scheme": "int4", "rules": [{"match": "model.embed_tokens", "scheme": "int4"}]},
        {"scheme": "int4", "skip": ["*embed_tokens*"]},
        {"scheme": "fp16"},
    ],
)
def test_a_head_that_is_named_stays_as_it_is_wished(
    subject: tuple[Checkpoint, Decoder], wishes: dict[str, Any]
) -> None:
    asked = Recipe(**wishes)
    assert decoder_recipe(asked, *subject).rules == asked.rules


def test_a_head_for_browsers_has_groups_that_divide_it(subject: tuple[Checkpoint, Decoder]) -> None:
    checkpoint, decoder = subject
    asked = Recipe(scheme="int4", group_size=32, target="transformers.js")
    (rule,) = decoder_recipe(asked, checkpoint, replace(decoder, hidden=576)).rules
    assert rule.group_size == 64
