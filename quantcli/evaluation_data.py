"""The samples that models are evaluated on, and the task that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli import models
from quantcli.data import TEXT_SUFFIXES
from quantcli.errors import InputError
from quantcli.functions import is_function
from quantcli.graph.model import Port
from quantcli.runners import Arrays, derived_inputs, hugging_face_ports, open_runner
from quantcli.samples import Samples, batches, load_samples
from quantcli.subject import Subject

#: Samples where the user names no number; classification and a user's metric take all.
_DEFAULT_SAMPLES = {"language-modeling": 64, "embedding": 256, "fidelity": 64}


#: What a folder with a tokenizer is known by.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass
class Inputs:
    """Samples and the task they serve."""

    task: str
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self) -> Iterator[tuple[Arrays, list[Any]]]:
        """Feeds and labels, one sample at a time, or as many as the model takes where it takes a fixed number."""
        for feeds, labels in batches(self.samples, 1):
            derived = derived_inputs(feeds["input_ids"]) if "input_ids" in feeds else {}
            yield derived | feeds, labels


def load_inputs(
    subjects: Sequence[Subject],
    data: str,
    task: str,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    tokenizer: str | Path | None = None,
    preprocess: str | Path | None = None,
) -> Inputs:
    """Samples from DATA for the first subject, and the task: the one named, or what fits model and data.

    Labels mean classification, all else fidelity; for text see `text_task`.

    Raises:
        UsageError: a number that cannot be meant.
        InputError: the data is missing, does not fit the model, or lacks what the task needs.
    """
    found = samples_for(
        subjects,
        data,
        input_ports(subjects, text=is_text(data)),
        tokenizer=Path(tokenizer) if tokenizer else None,
        preprocess=None if preprocess is None else Path(preprocess),
        samples=samples or _DEFAULT_SAMPLES.get(task),
        seq_len=seq_len,
        windows=task != "embedding",
    )
    if task == "auto":
        task = "classification" if found.labels else "fidelity"
        if samples is None and task in _DEFAULT_SAMPLES:
            return load_inputs(subjects, data, task, seq_len=seq_len, tokenizer=tokenizer, preprocess=preprocess)
    if task == "classification" and not found.labels:
        raise InputError(
            f"{data} has no labels, which classification needs.",
            "Labels are the array labels of an .npz, or one subfolder of images per class; "
            "--task fidelity does without.",
        )
    return Inputs(task, found)


def samples_for(
    subjects: Sequence[Subject],
    data: str,
    ports: Sequence[Port],
    *,
    tokenizer: Path | None,
    preprocess: Path | None,
    samples: int | None,
    seq_len: int | None,
    windows: bool,
) -> Samples:
    """Samples for several models at once: tokenizer and preprocessing are those of the first that has them.

    Raises:
        UsageError: a wish that does not go with this data.
        InputError: the data is missing or does not fit the models' inputs.
    """
    place = tokenizer or _folder_with(subjects, *_TOKENIZER_FILES)
    if is_text(data):
        _require_tokens(subjects[0].path, data, ports, place)
    return load_samples(
        data,
        ports,
        folder=_folder_with(subjects, "preprocessor_config.json", "config.json"),
        tokenizer=place,
        preprocess=preprocess,
        samples=samples,
        seq_len=seq_len,
        windows=windows,
    )


def _require_tokens(model: str, data: str, ports: Sequence[Port], tokenizer: Path | None) -> None:
    """Raise InputError where a model reads no tokens, or text cannot be turned into any."""
    if not any(port.name == "input_ids" for port in ports):
        raise InputError(
            f"{data} is text, and {model} takes no input_ids, but {'; '.join(map(str, ports))}.",
            "Give arrays or images.",
        )
    if tokenizer is None or not any((tokenizer / name).is_file() for name in (*_TOKENIZER_FILES, "config.json")):
        raise InputError(
            f"{data} is text, and there is no tokenizer in {tokenizer or 'any folder of the models'}.",
            "Name one with --tokenizer FOLDER.",
        )


def is_text(data: str) -> bool:
    """Whether DATA is a text file."""
    return not is_function(data) and Path(data).suffix in TEXT_SUFFIXES


def text_task(subject: Subject) -> str:
    """The task that text means: language modeling for a causal model, embedding for an encoder."""
    return "language-modeling" if is_causal(subject) else "embedding"


def input_ports(subjects: Sequence[Subject], *, text: bool) -> tuple[Port, ...]:
    """What the models take, the reference's inputs first.

    Token inputs that only a candidate takes join in; what the signature of a function's module does not tell,
    the inputs of an ONNX candidate do.
    """
    first, *others = subjects
    known = {port.name: port for other in others if other.onnx for port in other.onnx.inputs}
    if first.onnx:
        ports = first.onnx.inputs
    elif first.checkpoint:
        path = Path(first.path)
        vision = (models.require_folder(path) / "preprocessor_config.json").is_file() and not text
        ports = hugging_face_ports(path, vision=vision)
    else:
        found = open_runner(first.path, weights=first.weights).inputs
        ports = tuple(known.get(port.name, port) for port in found) if first.kind == "function" else found
    taken = {port.name for port in ports}
    return (*ports, *(port for port in known.values() if text and port.name not in taken))


def is_causal(subject: Subject) -> bool:
    """Whether a model predicts the next token at every position."""
    if subject.checkpoint:
        return models.is_causal(Path(subject.path))
    if not subject.onnx:
        return False
    takes = {port.name for port in subject.onnx.inputs}
    ranks = {port.name: len(port.shape or ()) for port in subject.onnx.outputs}
    return "input_ids" in takes and ranks.get("logits") == 3


def _folder_with(subjects: Sequence[Subject], *names: str) -> Path | None:
    """The first model's folder that holds one of the files, else the first folder."""
    folders = [subject.folder for subject in subjects if subject.folder]
    having = (folder for name in names for folder in folders if (folder / name).is_file())
    return next(having, folders[0] if folders else None)
