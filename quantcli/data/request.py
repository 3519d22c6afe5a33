"""DATA as a user asks for it: one parameter of every command that reads samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class DataRequest:
    """Where samples come from, and how they are made.

    Attributes:
        data: a path, or ``package.module:function``.
        samples: how many at the most; by default all. They are spread evenly, images also over their classes.
        seq_len: tokens of a text sample at the most, or of a window exactly.
        seed: what images are chosen by.
        tokenizer: a folder with the tokenizer, where the model's has none.
        preprocess: a file with the preprocessing of images.
        windows: whether text is cut into windows of equal length, rather than one sample per line or record; by
            default for a causal language model.
        limited: whether ``samples`` is a command's own limit, and none of the user's: a model that takes more at a
            time gets these.
    """

    data: str
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    tokenizer: Path | None = None
    preprocess: Path | None = None
    windows: bool | None = None
    limited: bool = False

    @classmethod
    def of(
        cls,
        data: str | Path,
        *,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int = 0,
        tokenizer: str | Path | None = None,
        preprocess: str | Path | None = None,
    ) -> DataRequest:
        """A request from the keyword arguments of the public functions."""
        folder, file = (Path(path) if path else None for path in (tokenizer, preprocess))
        return cls(str(data), samples, seq_len, seed, folder, file)

    def at_most(self, samples: int | None) -> DataRequest:
        """The same request, of so many samples where the user names no number."""
        return self if self.samples else replace(self, samples=samples, limited=True)
