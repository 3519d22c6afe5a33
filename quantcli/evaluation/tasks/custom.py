"""A task of the user's own: a function of outputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError
from quantcli.evaluation.tasks.base import Metrics
from quantcli.models.outputs import floats
from quantcli.models.source import ModelSource
from quantcli.system.user_functions import load_function


class CustomTask:
    """A task whose metrics a function of the user's own returns. Models are seen as their config.json names them."""

    METRICS: Sequence[str] | None = None
    CANDIDATE_METRICS: Sequence[str] = ()
    DEFAULT_SAMPLES: int | None = None
    LOADING: Mapping[str, bool] = {"headed": True}
    WINDOWS = True
    NEEDS_LABELS: Labels = ""

    def __init__(self, spec: str) -> None:
        self.NAME = spec

    def scorer(self, model: ModelSource, reference: ModelSource) -> Custom:
        """Collects outputs for the function."""
        return Custom(model.path, self.NAME)


class Custom:
    """A user's metric, ``package.module:function``, called once per model.

    It is given all outputs, a list with one dictionary of arrays per sample (in float32 where they are
    floating-point, leading dimension 1), and the list of labels, or None where the data has none. It returns
    a number, or a dictionary of numbers by name. All outputs of a model are held in memory until then.
    """

    def __init__(self, name: str, spec: str) -> None:
        self.name, self.spec = name, spec
        self._function: Callable[..., Any] = load_function(spec)
        self._outputs: list[Arrays] = []
        self._labels: list[Any] = []

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One sample."""
        self._outputs.append(dict(outputs) | floats(outputs))
        self._labels.append(label)

    def merge(self, other: Custom) -> None:
        """The samples that come after these."""
        self._outputs += other._outputs
        self._labels += other._labels

    def __getstate__(self) -> dict[str, Any]:
        """All but the function, which may be in no module."""
        return {key: value for key, value in vars(self).items() if key != "_function"}

    def metrics(self) -> Metrics:
        """What the function says. Raises InputError where it fails or returns something else."""
        labels = None if any(label is None for label in self._labels) else self._labels
        try:
            returned = self._function(self._outputs, labels)
        except Exception as error:  # the user's code
            raise InputError(f"{self.spec} failed on {self.name}: {type(error).__name__}: {error}") from error
        if not isinstance(returned, Mapping):
            returned = {self.spec.rpartition(":")[2]: returned}
        metrics: Metrics = {}
        for key, value in returned.items():
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"{self.spec} returned {value!r} as {key}, which is not a number.") from error
            metrics[str(key)] = number if isfinite(number) else None
        return metrics

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}
