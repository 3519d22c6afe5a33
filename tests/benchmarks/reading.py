"""Pictures of text, and whether PP-OCR's recognizer reads them: a metric for quantcli, ``reading:right``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from scoring import Feeds, recognized, recognizer_characters
from support import real_models

#: Pictures that the recognizer is judged on.
PICTURES = 600


@cache
def pictured() -> list[str]:
    """What is written on them."""
    return real_models.phrases(PICTURES, 2)


def are_right(values: Iterable[np.ndarray], labels: Iterable[int]) -> list[bool]:
    """Whether each picture, by its number, was read without a fault, spaces aside."""
    characters = recognizer_characters(real_models.ocr_model("recognizer"))
    pairs = zip(values, labels, strict=True)
    return [
        recognized(value, characters).replace(" ", "") == pictured()[label].replace(" ", "") for value, label in pairs
    ]


def right(outputs: Sequence[Feeds], labels: Sequence[int]) -> float:
    """The share of pictures that were read without a fault."""
    return float(np.mean(are_right((next(iter(each.values())) for each in outputs), labels)))
