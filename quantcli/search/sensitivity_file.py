"""What a search learned of a model, kept in a file: a later budget on the same model answers in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantcli.errors import InputError
from quantcli.system.files import whole_file, write_text
from quantcli.system.text import first_line
from quantcli.version import __version__

#: The key that tells such a file from other JSON, with the number of this form of it.
_KIND, _VERSION = "quantcli_sensitivity", 2
_MOST_BYTES = 256 << 20


class WayFigures(BaseModel):
    """A way to store a layer of a graph: bytes, time by that of the float kernel, noise by signal of the weight.

    ``alike`` are labels of others that come to the same for this layer.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    nbytes: int
    factor: float
    error: float
    alike: list[str] = []


class LayerFigures(BaseModel):
    """A layer of a graph: bytes, what it takes in one run (see `quantcli.search.onnx_work`), and its ways by label."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    nbytes: int
    work: float
    ways: dict[str, WayFigures]


class Sensitivity(BaseModel):
    """Costs of layers, and measurements, for one model on some data.

    - ``identity``: hashes of what they hold for: model, data, schemes, version.
    - ``measure``: what costs are in: ``kl_nats``, ``relative_error`` or ``weight_error``.
    - ``costs``: of each layer, by the label of each way to store it.
    - ``factors``: by kind of layer, measured cost over estimated.
    - ``measured``: figures of whole models, by what was stored how.
    - ``verdicts``: what artifacts lose on samples that were held out, by who judges and their hash.
    - ``references``: what the model itself has on each of these samples, by who judges and the metric.
    - ``graph``: layers of a graph, in its order, and ``rest`` the bytes of what is beside them.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    quantcli_sensitivity: int = _VERSION
    identity: dict[str, str] = {}
    measure: str = ""
    costs: dict[str, dict[str, float]] = {}
    factors: dict[str, float] = {}
    measured: dict[str, dict[str, float | None]] = {}
    verdicts: dict[str, dict[str, float | None]] = {}
    references: dict[str, dict[str, list[float | None]]] = {}
    graph: dict[str, LayerFigures] = {}
    rest: int = 0


class SensitivityStore:
    """A `Sensitivity` and the file that it is kept in, if any; what is added is on disk at once."""

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        """Open what was learned before.

        Args:
            path: the file; it need not exist. None: nothing is kept.
            identity: what holds now: hashes by what they are of.

        Raises:
            InputError: it is no such file, or holds for something else.
        """
        now = {"quantcli": __version__, **identity}
        self.path, self.found = path, Sensitivity(identity=now)
        if path is None or not path.exists():
            return
        self.found = _load(path)
        differing = [name for name in now if self.found.identity.get(name) != now[name]]
        if differing:
            raise InputError(
                f"{path} holds what was learned for other {' and '.join(differing)}.",
                "Name another file, or remove this one to have it made anew.",
            )

    def save(self) -> None:
        """Write the file, whole or not at all. Raises InputError where that cannot be."""
        if self.path is None:
            return
        text = json.dumps(self.found.model_dump(), indent=1, allow_nan=False)
        try:
            with whole_file(self.path) as unfinished:
                write_text(unfinished, text + "\n")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}.") from error


def _load(path: Path) -> Sensitivity:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} is over {_MOST_BYTES >> 20} MiB, too much for what it should be.")
        loaded: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or loaded.get(_KIND) != _VERSION:
            raise InputError(f"{path} is no file of sensitivities that this version wrote.", "Name another file.")
        return Sensitivity.model_validate(loaded)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}.") from error
    except (ValueError, RecursionError, ValidationError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}", "Remove it to have it made anew.") from error
