"""Speech recognition: the word error rate of what a model hears."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError, MissingExtraError
from quantcli.evaluation.metrics import Mean, Ratio
from quantcli.evaluation.tasks.base import Metrics, with_error
from quantcli.models import hugging_face
from quantcli.models.outputs import logits_of
from quantcli.models.runner import GENERATED
from quantcli.models.source import ModelSource

NAME = "speech-recognition"
METRICS = ("wer", "wer_se")
CANDIDATE_METRICS = ("same_text", "same_text_se")
DEFAULT_SAMPLES: int | None = None
LOADING: dict[str, bool] = {"causal": False, "headed": True, "generates": True}
WINDOWS = False
NEEDS_LABELS: Labels = "texts"

#: All but letters, digits and the apostrophe within a word, in any script.
_NOT_SPOKEN = re.compile(r"[^\w'\s]|_|(?<!\w)'|'(?!\w)")


def scorer(model: ModelSource, reference: ModelSource) -> SpeechRecognition:
    """Reads a model's tokens by the tokenizer of its folder, or of the reference's."""
    _jiwer()
    folders = [source.folder for source in (model, reference) if source.folder]
    having = (each for each in folders if any(each.glob("tokenizer*")) or (each / "vocab.json").is_file())
    folder = next(having, None)
    if folder is None:
        raise InputError(
            f"{model.path} has no tokenizer, and what it hears cannot be read without.",
            "Put the tokenizer's files into its folder, or use --task fidelity.",
        )
    return SpeechRecognition(model.path, _tokenizer(folder))


@cache
def _tokenizer(folder: Path) -> Any:
    return hugging_face.load_tokenizer(folder)


def spoken(text: str) -> str:
    """A text as it is compared: in lower case, without punctuation, one space between words."""
    return " ".join(_NOT_SPOKEN.sub(" ", text.replace("’", "'")).casefold().split())


class SpeechRecognition:
    """Word errors by words said; for a candidate also how often it hears the same as the reference.

    Of an encoder-decoder the tokens that it generates are read, of others the likeliest token of each moment, as CTC
    means it.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self._tokenizer = name, tokenizer
        self._errors, self._same = Ratio(), Mean()

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """``label`` is what is said."""
        said, heard = spoken(str(label)), self._heard(outputs)
        if said:
            counts = _jiwer().process_words(said, heard)
            errors = counts.substitutions + counts.deletions + counts.insertions
        else:
            errors = len(heard.split())
        self._errors.add(errors, len(said.split()))
        if reference is not None:
            self._same.add(float(heard == self._heard(reference)))

    def merge(self, other: SpeechRecognition) -> None:
        """The samples that come after these."""
        self._errors.merge(other._errors)
        self._same.merge(other._same)

    def __getstate__(self) -> dict[str, Any]:
        """All but the tokenizer, which every process has."""
        return {key: value for key, value in vars(self).items() if key != "_tokenizer"}

    def _heard(self, outputs: Arrays) -> str:
        if GENERATED in outputs:
            return spoken(str(self._tokenizer.decode(outputs[GENERATED][0], skip_special_tokens=True)))
        hint = "It is no model that recognizes speech; use --task fidelity."
        logits = logits_of(outputs, self.name, "moments", hint)
        # Repeats and blanks are the tokenizer's to drop: between equal letters a blank stands for neither.
        return spoken(str(self._tokenizer.decode(np.argmax(logits[0], -1))))

    def metrics(self) -> Metrics:
        """Shares with standard errors."""
        own: Metrics = {"wer": self._errors.ratio, "wer_se": self._errors.standard_error}
        return own | (with_error("same_text", self._same) if self._same.values else {})

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("jiwer", "audio", "The word error rate") from error
    return jiwer
