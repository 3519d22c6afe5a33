"""Images as model inputs: preprocessing stated in a small YAML file, or read from a preprocessor_config.json.

The order is that of transformers' image processors: resize, center crop, rescale, subtract the mean, divide by
the standard deviation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantcli.errors import InputError, MissingExtraError, UsageError
from quantcli.system.text import first_line, suggestion
from quantcli.system.yaml_file import read_yaml

if TYPE_CHECKING:
    import numpy as np

#: What image folders are searched for.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

EXAMPLE = "resize: 256, crop: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] (one key per line)"

#: Names of filters, and Pillow's numbers for them, which transformers uses.
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_MAX_SIDE = 1 << 14

_Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]
_Size = _Side | tuple[_Side, _Side]


class Preprocess(BaseModel):
    """How an image becomes an input.

    - ``resize``: the shortest edge's new length, or exactly ``[height, width]``; absent: as it is.
    - ``crop``: the middle square, or ``[height, width]``; what an image lacks is filled with black.
    - ``interpolation``: the filter of ``resize``.
    - ``rescale``: what each value of 0 to 255 is multiplied with.
    - ``mean``, ``std``: of each channel, or one number for all, in rescaled values.
    - ``channels``: ``rgb``, ``bgr`` or ``gray``; ``mean`` and ``std`` are in this order.
    - ``layout``: ``nchw`` or ``nhwc``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: _Size | None = None
    crop: _Size | None = None
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    rescale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1 / 255
    mean: Annotated[list[float], Field(min_length=1, max_length=3)] | float = 0.0
    std: Annotated[list[float], Field(min_length=1, max_length=3)] | float = 1.0
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"

    @property
    def is_integral(self) -> bool:
        """Whether the result is the image's own numbers, as an integer input wants them."""
        return self.rescale == 1 and not any(_list(self.mean)) and set(_list(self.std)) == {1.0}

    def apply(self, image: Any) -> np.ndarray:
        """A Pillow image as float32 ``[1, channels, height, width]``, or ``[1, height, width, channels]``."""
        import numpy as np

        image = image.convert("L" if self.channels == "gray" else "RGB")
        if self.resize is not None:
            image = image.resize(_resized(image.size, self.resize), _FILTERS[self.interpolation])
        if self.crop is not None:
            height, width = _pair(self.crop)
            # As transformers rounds, with the upper left corner drawn away from the image where it is too small.
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        values: Any = np.asarray(image, np.float32)
        values = values[..., None] if values.ndim == 2 else values
        if self.channels == "bgr":
            values = values[..., ::-1]
        values = (values * np.float32(self.rescale) - np.asarray(self.mean, np.float32)) / np.asarray(
            self.std, np.float32
        )
        values = values.transpose(2, 0, 1) if self.layout == "nchw" else values
        return np.ascontiguousarray(values[None])


def _list(value: list[float] | float) -> list[float]:
    return value if isinstance(value, list) else [value]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height."""
    if not isinstance(wanted, int):
        return wanted[1], wanted[0]
    short, long = sorted(size)
    other = max(1, int(wanted * long / short))
    return (wanted, other) if size[0] <= size[1] else (other, wanted)


def load_preprocess(file: Path | None, folder: Path | None) -> Preprocess:
    """The preprocessing of ``--preprocess``, or else of the model folder.

    Raises:
        InputError: there is neither, or it cannot be read, or asks for what is not supported.
        UsageError: a key is unknown, or a value cannot be meant.
    """
    if file is None:
        file = folder / "preprocessor_config.json" if folder else None
        if file is None or not file.is_file():
            raise InputError(
                f"How images become inputs is not known: {file or 'preprocessor_config.json'} does not exist.",
                f"Say it with --preprocess FILE.yaml, for example {EXAMPLE}.",
            )
    document = _json(file) if file.suffix == ".json" else read_yaml(file, "The preprocessing")
    if not isinstance(document, dict):
        raise UsageError(f"The preprocessing {file} is not a mapping.", f"For example: {EXAMPLE}.")
    if any(str(key).startswith("do_") or key == "image_processor_type" for key in document):
        document = _from_transformers(document, file)
    return _validated(document, file)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The preprocessing {file} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The preprocessing {file} is not valid JSON: {first_line(error)}.") from error


def _validated(document: dict[str, Any], file: Path) -> Preprocess:
    try:
        found = Preprocess.model_validate(document)
    except ValidationError as error:
        problem = max(error.errors(), key=lambda each: each["type"] == "extra_forbidden")
        key = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            hint = suggestion(key, Preprocess.model_fields)
            raise UsageError(f"{file}: unknown key {key!r}.", hint) from error
        raise UsageError(f"{file}: {key}: {problem['msg'].rstrip('.')}.") from error
    count = 1 if found.channels == "gray" else 3
    for name in ("mean", "std"):
        value = getattr(found, name)
        if isinstance(value, list) and len(value) != count:
            raise UsageError(f"{file}: {name} has {len(value)} numbers; {found.channels} has {count} channels.")
    if not all(_list(found.std)):
        raise UsageError(f"{file}: std: no number may be zero.")
    return found


def _from_transformers(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Our keys from those of a preprocessor_config.json."""

    def unsupported(what: str) -> InputError:
        return InputError(
            f"{file} asks for {what}, which is not supported.",
            f"State the preprocessing with --preprocess FILE.yaml, for example {EXAMPLE}.",
        )

    for flag in ("do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels"):
        if config.get(flag):
            raise unsupported(flag)
    found: dict[str, Any] = {}
    if config.get("do_resize", "size" in config):
        found["resize"] = _size(config.get("size"), unsupported)
        number = config.get("resample", _FILTERS["bilinear"])
        names = {value: key for key, value in _FILTERS.items()}
        if not isinstance(number, int) or number not in names:
            raise unsupported(f"resample {number!r}")
        found["interpolation"] = names[number]
        share = config.get("crop_pct")
        if share and isinstance(found["resize"], int):
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise unsupported(f"crop_pct {share!r}")
            # ConvNeXT's way: enlarge, then crop to the size that was named; from 384 on, no crop but an exact size.
            side = found["resize"]
            small = side < 384
            found["resize"] = int(side / share) if small else (side, side)
            found |= {"crop": side} if small else {}
    if config.get("do_center_crop"):
        found["crop"] = _pair_of(config.get("crop_size", config.get("size")), unsupported)
    found["rescale"] = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if config.get("do_normalize", "image_mean" in config):
        found |= {"mean": config.get("image_mean", 0.5), "std": config.get("image_std", 0.5)}
    if config.get("do_flip_channel_order"):
        found["channels"] = "bgr"
    return found


def _size(size: Any, unsupported: Any) -> Any:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if isinstance(size, int):
        return size
    return _pair_of(size, unsupported)


def _pair_of(size: Any, unsupported: Any) -> Any:
    if isinstance(size, int):
        return size
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return size["height"], size["width"]
    raise unsupported(f"size {size!r}")


def open_image(file: Path | IO[bytes], *, draft: bool = False) -> Any:
    """A decoded Pillow image. With ``draft`` only to see whether it can be read: a JPEG is then decoded small.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded, or is too large to be an honest image.
        MissingExtraError: Pillow is not installed.
    """
    pillow = _pillow()
    try:
        image = pillow.open(file)
        if draft:
            image.draft("RGB", (image.width // 8 or 1, image.height // 8 or 1))
        image.load()
    except pillow.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return image


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "data", "Reading images") from error
    return Image
