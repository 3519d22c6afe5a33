"""Texts with images as the inputs of a model that sees and reads, by the processor that its folder brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Port
from quantcli.data.fitting import converted, layouts
from quantcli.data.image_preprocessing import open_image
from quantcli.data.media_records import MARK, Illustrated, file_named, illustrated, medium_of, records_of
from quantcli.data.request import DataRequest
from quantcli.data.sources.base import Labels, Sample, SampleSource, evenly, hash_samples
from quantcli.data.sources.texts import TextSource
from quantcli.errors import InputError, UsageError

if TYPE_CHECKING:
    from quantcli.core.ports import Arrays

DESCRIPTION, IS_TEXT = "a .jsonl that names an image with each text", True
OPTIONS: tuple[str, ...] = ("--seq-len", "--tokenizer")

_IDS = "input_ids"


def accepts(data: str) -> bool:
    """Whether DATA is records that name images."""
    return medium_of(data) == "image"


def open_source(request: DataRequest, ports: Sequence[Port], folder: Path | None) -> SampleSource:
    """Read the records. For a model that does not see they are texts, which a warning tells."""
    if not any(port.name.startswith(("pixel", "image")) for port in ports):
        source = TextSource(request, ports, folder)
        source.warnings.append(f"The images that {request.data} names are left out: the model reads text alone.")
        return source
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(
            f"{request.data} names images, and the model has no folder with a processor for them.", "Give arrays."
        )
    return IllustratedTexts(request, ports, folder)


class IllustratedTexts:
    """Records of text with images, one sample each; those without an image are left out."""

    def __init__(self, request: DataRequest, ports: Sequence[Port], folder: Path) -> None:
        from quantcli.models import processors
        from quantcli.models.positions import longest_sequence

        if request.seq_len is not None and request.seq_len < 2:
            raise UsageError(f"--seq-len {request.seq_len}: at least two tokens are needed.")
        self._path, self._ports, self._folder = Path(request.data), ports, folder
        self._longest = request.seq_len or longest_sequence(folder)
        self._placeholders = set(processors.placeholder_ids(folder))
        self._processor = processors.load_processor(folder)
        self.labels: Labels = ""
        #: Images become rows of arrays whose first axis counts other things than samples.
        self.fixed_batch: int | None = 1
        self.warnings: list[str] = []
        found = [illustrated(record, where) for where, record in records_of(self._path)]
        self._records = [each for each in found if each.files]
        if not self._records:
            raise InputError(f"{self._path} names no image.")
        if len(self._records) < len(found):
            left = len(found) - len(self._records)
            self.warnings.append(f"{left} of {len(found)} records of {self._path} name no image; they are left out.")

    def choose(self, wanted: int | None, seed: int) -> Sequence[int]:
        """Spread evenly. Raises InputError where an image is missing, damaged or elsewhere."""
        chosen = evenly(len(self._records), wanted)
        for index in chosen:
            self._images(self._records[index], draft=True)
        first = self._arrays(chosen[0])
        layouts(self._ports, first, f"{self._records[chosen[0]].where}, as the processor gives it,")
        return chosen

    def files(self, chosen: Sequence[int]) -> Iterable[Path]:
        """The images' files; the text is in memory."""
        records = (self._records[index] for index in chosen)
        return [file_named(name, self._path.parent, each.where) for each in records for name in each.files]

    def iterate(self, chosen: Sequence[int]) -> Iterator[Sample]:
        """Process one record after the other."""
        for index in chosen:
            yield Sample(self._arrays(index))

    def digest(self, chosen: Sequence[int]) -> str:
        """Hash of the arrays."""
        return hash_samples(self.iterate(chosen))

    def _images(self, record: Illustrated, *, draft: bool = False) -> list[Any]:
        images = []
        for name in record.files:
            file = file_named(name, self._path.parent, record.where)
            try:
                image = open_image(file, draft=draft)
            except (OSError, ValueError, SyntaxError, EOFError) as error:
                reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
                raise InputError(f"{record.where} names {name}, which is no readable image: {reason}.") from error
            images.append(image if draft else image.convert("RGB"))
        return images

    def _arrays(self, index: int) -> Arrays:
        from quantcli.models import processors

        record = self._records[index]
        made = processors.text_and_images(self._processor, self._text(record), self._images(record), record.where)
        known = {port.name: port for port in self._ports}
        processors.require_taken(self._folder, list(made), list(known))
        made = self._cut(made, record.where)
        return {name: converted(made[name], port, record.where) for name, port in known.items() if name in made}

    def _text(self, record: Illustrated) -> str:
        """The text with the processor's own word for an image: by its chat template, else plainly."""
        if getattr(self._processor, "chat_template", None):
            turns = [turn | {"content": _parts(turn["content"])} for turn in record.turns]
            return _written(self._processor, turns, record.where)
        text = "\n".join(turn["content"] for turn in record.turns)
        return text.replace(MARK, str(getattr(self._processor, "image_token", "<image>")))

    def _cut(self, made: Arrays, where: str) -> Arrays:
        """No more tokens than the model takes, or than are asked for; of images none is cut."""
        length = made[_IDS].shape[1]
        if length <= self._longest:
            return made
        seen = [place for place, token in enumerate(made[_IDS][0].tolist()) if token in self._placeholders]
        if seen and seen[-1] >= self._longest:
            raise InputError(
                f"{where} needs {seen[-1] + 1} tokens up to the end of its images, more than {self._longest}.",
                "Give a larger --seq-len, or smaller images.",
            )
        tokens = {name for name, value in made.items() if value.ndim == 2 and value.shape == made[_IDS].shape}
        return {name: value[:, : self._longest] if name in tokens else value for name, value in made.items()}


def _written(processor: Any, turns: Sequence[dict[str, Any]], where: str) -> str:
    """A chat as its processor's template writes it. Raises InputError."""
    from jinja2.exceptions import TemplateError

    try:
        return str(processor.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{where} is a chat that the model's template does not take: {error}.") from error


def _parts(content: str) -> list[dict[str, str]]:
    """A turn's content as chat templates of models that see take it."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
