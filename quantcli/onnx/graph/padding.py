"""Padding that ``auto_pad`` asks for in place of numbers."""

from __future__ import annotations

from collections.abc import Sequence


def auto_padding(
    mode: str, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial dimension in mode VALID, SAME_UPPER or SAME_LOWER.

    ``spans``: how far the windows reach, dilation included.
    """
    if mode == "VALID":
        return [(0, 0)] * len(sizes)
    return [
        halves(max((-(-size // stride) - 1) * stride + span - size, 0), mode)
        for size, span, stride in zip(sizes, spans, strides, strict=True)
    ]


def halves(padding: int, mode: str) -> tuple[int, int]:
    """One dimension's padding, before and after: an odd place goes to the end in mode SAME_UPPER alone."""
    less, more = padding // 2, padding - padding // 2
    return (less, more) if mode == "SAME_UPPER" else (more, less)
