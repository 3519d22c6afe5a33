"""What a model's folder brings to turn sound, or images with text, into inputs; used as transformers ships it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.config_file import read_config
from quantcli.errors import InputError
from quantcli.models.hugging_face import config_inputs, quiet, transformers_library
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import numpy as np

    from quantcli.core.ports import Arrays

#: Where a folder may hold the settings of its processor.
_SETTINGS = ("processor_config.json", "preprocessor_config.json")
#: What some processors make for training alone.
_LABELS = "labels"


def load_feature_extractor(folder: Path) -> Any:
    """What turns sound into a model's inputs. Raises InputError where the folder has none."""
    found = _loaded(transformers_library().AutoFeatureExtractor, folder, "feature extractor", "sound")
    if not isinstance(getattr(found, "sampling_rate", None), int):
        raise InputError(f"{folder} has {type(found).__name__}, which takes no sound.", "Give data of another kind.")
    return found


def load_processor(folder: Path) -> Any:
    """What turns images with text into a model's inputs. Raises InputError where the folder has none."""
    found = _loaded(transformers_library().AutoProcessor, folder, "processor", "images with text")
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise InputError(
            f"{folder} has {type(found).__name__}, which does not take images with text.", "Give data of another kind."
        )
    return found


def _loaded(loader: Any, folder: Path, what: str, purpose: str) -> Any:
    if not any((folder / name).is_file() for name in _SETTINGS):
        raise InputError(
            f"{folder} has no {what} ({' or '.join(_SETTINGS)}), which {purpose} needs.",
            "Put the files of the original model there, or give arrays (.npz).",
        )
    try:
        with quiet():
            return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        # The message names the library that is missing, after a line of its own.
        reason = " ".join(str(error).split()[:20])
        raise InputError(
            f"The {what} of {folder} needs a library that is not installed: {reason}.",
            "pip install torchvision" if "torchvision" in str(error).lower() else 'pip install "quantcli[data]"',
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} has no usable {what}: {first_line(error)}") from error


def text_and_images(processor: Any, text: str, images: Sequence[Any], where: str) -> Arrays:
    """One text with its images as arrays by name. Raises InputError where the processor does not take them."""
    try:
        with quiet():
            made = processor(text=[text], images=[list(images)], return_tensors="pt")
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{where} is not taken by {type(processor).__name__}: {first_line(error)}") from error
    return {name: _array(value) for name, value in made.items() if name != _LABELS and hasattr(value, "numpy")}


def features_of(extractor: Any, sound: np.ndarray, where: str) -> Arrays:
    """One sound, float32 ``[samples]`` at the extractor's rate, as arrays by name. Raises InputError."""
    try:
        made = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise InputError(f"{where} is not taken by {type(extractor).__name__}: {first_line(error)}") from error
    return {name: _array(value) for name, value in made.items() if hasattr(value, "numpy")}


def _array(value: Any) -> np.ndarray:
    import torch

    value = value.to(torch.int64) if value.dtype == torch.bool else value
    array: np.ndarray = value.numpy()
    return array


def require_taken(folder: Path, arrays: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError where a model takes an array of its processor that quantcli does not hand on."""
    taken = set(config_inputs(read_config(folder / "config.json")))
    lost = [name for name in arrays if name in taken and name not in known]
    if lost:
        raise InputError(
            f"The processor of {folder} makes {', '.join(lost)}, an input that is not known here.",
            "Give all inputs as arrays (.npz).",
        )


#: What configurations call the ids that stand for an image, a video or a sound among the words.
_PLACEHOLDERS = tuple(f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index"))


def placeholder_ids(folder: Path | None) -> list[int]:
    """Token ids in whose place a model of a folder sees or hears something, and which nobody predicts."""
    if folder is None or not (folder / "config.json").is_file():
        return []
    config = read_config(folder / "config.json")
    return [value for key in _PLACEHOLDERS if isinstance(value := config.get(key), int)]
