"""Text as a model's inputs: tokens of lines, of records, or of windows over the whole text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Port
from quantcli.data.chats import ChatWriter
from quantcli.data.fitting import converted, layouts
from quantcli.data.media_records import medium_of
from quantcli.data.request import DataRequest
from quantcli.data.sources.base import Labels, Sample, evenly, fixed_batch_of, hash_samples
from quantcli.data.text_files import TEXT_SUFFIXES, load_labelled_texts, token_windows
from quantcli.errors import InputError, UsageError
from quantcli.system.user_functions import is_function

if TYPE_CHECKING:
    import numpy as np

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"
#: Tokens of a sample at the most, where nothing else says it.
DEFAULT_LENGTH = 512


DESCRIPTION, IS_TEXT = f"a {', '.join(TEXT_SUFFIXES)} file", True
OPTIONS: tuple[str, ...] = ("--seq-len", "--tokenizer")


def accepts(data: str) -> bool:
    """Whether DATA is named as a text file."""
    named = Path(data).suffix in TEXT_SUFFIXES and not Path(data).is_dir() and not is_function(data)
    return named and medium_of(data) is None


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> TextSource:
    """Read the text."""
    return TextSource(request, ports, folder)


class TextSource:
    """Samples of a text file, one per line or record; or with ``windows`` sequences of equal length.

    Records may have labels, which windows over many of them have not.
    """

    def __init__(
        self,
        request: DataRequest,
        ports: Sequence[Port],
        folder: Path | None,
    ) -> None:
        from quantcli.models import hugging_face  # brings torch
        from quantcli.models.positions import longest_sequence

        path, seq_len = Path(request.data), request.seq_len
        if seq_len is not None and seq_len < 2:
            raise UsageError(f"--seq-len {seq_len}: at least two tokens are needed.")
        if not any(port.dtype.kind in "iu" for port in ports):
            listed = ", ".join(map(str, ports))
            raise InputError(f"{path} is text, and the model takes no tokens: {listed}.", "Give arrays or images.")
        place = request.tokenizer or folder
        if place is None or (request.tokenizer is None and not (place / "config.json").is_file()):
            raise InputError(f"{path} is text, and there is no tokenizer.", "Name one with --tokenizer FOLDER.")
        self.warnings: list[str] = []
        self._path, self._ports = path, ports
        config = next((each for each in (folder, place) if each and (each / "config.json").is_file()), None)
        causal = hugging_face.is_causal(config) if request.windows is None and config else bool(request.windows)
        self._fixed = _fixed_length(ports)
        longest = longest_sequence(config) if config else DEFAULT_LENGTH
        self._length = seq_len or self._fixed or min(DEFAULT_LENGTH, longest)
        if self._fixed and self._length != self._fixed:
            raise UsageError(f"--seq-len {seq_len}: the model takes sequences of {self._fixed} tokens.")
        self._tokenizer = hugging_face.load_tokenizer(place)
        chats = ChatWriter(self._tokenizer, place, windows=causal)
        texts, self._labels = load_labelled_texts(path, lines=not causal, chat=chats.text)
        self.warnings += chats.warnings
        self._labels = None if causal else self._labels
        self.labels: Labels = "" if self._labels is None else "classes"
        self._windows: np.ndarray | None = None
        if causal:
            count = request.samples or sum(map(len, texts))
            self._windows = token_windows(self._tokenizer, texts, self._length, count, path).numpy()
        self._texts = texts
        first = self._arrays(0)
        self.fixed_batch = fixed_batch_of(ports, layouts(ports, first, f"{path}, tokenized,"), str(path))

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """Spread evenly over the text."""
        return evenly(len(self._texts) if self._windows is None else len(self._windows), wanted)

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """None: the text is in memory."""
        return ()

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Tokenize one sample after the other."""
        for index in chosen:
            arrays = self._arrays(index)
            where = f"Sample {index} of {self._path}"
            ports = (port for port in self._ports if port.name in arrays)
            inputs = {port.name: converted(arrays[port.name], port, where) for port in ports}
            yield Sample(inputs, self._labels[index] if self._labels else None)

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the token ids."""
        return hash_samples(self.iterate(chosen))

    def _arrays(self, index: int) -> dict[str, np.ndarray]:
        """What the tokenizer gives and the model asks for, int64 ``[1, tokens]``."""
        import numpy as np

        names = {port.name for port in self._ports}
        if self._windows is None:
            encoded = {key: np.asarray(value) for key, value in self._encoded(self._texts[index]).items()}
        else:
            encoded = {_IDS: self._windows[index : index + 1]}
        encoded.setdefault(_MASK, np.ones_like(encoded[_IDS]))
        if "token_type_ids" in names:
            encoded.setdefault("token_type_ids", np.zeros_like(encoded[_IDS]))
        encoded[_POSITIONS] = np.maximum(np.cumsum(encoded[_MASK], 1) - 1, 0)
        return {name: value for name, value in encoded.items() if name in names}

    def _encoded(self, text: str) -> dict[str, Any]:
        if self._fixed and self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        return dict(
            self._tokenizer(
                text,
                return_tensors="np",
                truncation=True,
                max_length=self._length,
                padding="max_length" if self._fixed else False,
            )
        )


def _fixed_length(ports: Sequence[Port]) -> int | None:
    """Tokens that the model's ids must have, where it fixes them."""
    shape = next((port.shape for port in ports if port.name == _IDS), None)
    length = shape[1] if shape and len(shape) == 2 else None
    return length if isinstance(length, int) else None
