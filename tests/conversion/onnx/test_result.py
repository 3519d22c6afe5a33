"""An artifact that is no smaller than its model: what the message says of the model's bytes."""

from __future__ import annotations

import pytest

from quantcli.conversion.onnx.result import require_smaller
from quantcli.errors import InputError


def test_weights_are_a_part_of_the_model() -> None:
    with pytest.raises(InputError, match=r"has 16\.6 kB: of that, 8\.2 kB are weights\. Nothing"):
        require_smaller(17_000, 16_600, 8_200)
    # Weights that a file holds in fewer bits than they are computed with may have more bytes than it.
    with pytest.raises(InputError, match=r"has 16\.6 kB\. Nothing"):
        require_smaller(17_000, 16_600, 32_800)


def test_smaller_is_not_equal() -> None:
    require_smaller(16_599, 16_600, 0)
    with pytest.raises(InputError):
        require_smaller(16_600, 16_600, 0)
