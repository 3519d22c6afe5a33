"""Language modeling: perplexity, and the divergence from the reference's next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError
from quantcli.evaluation.metrics import Divergence, Perplexity, verdict
from quantcli.evaluation.tasks.base import Metrics
from quantcli.models import processors
from quantcli.models.outputs import logits_of
from quantcli.models.source import ModelSource

NAME = "language-modeling"
METRICS = ("perplexity", "perplexity_se")
CANDIDATE_METRICS = ("kl_nats", "kl_nats_se", "top1_agreement", "top1_agreement_se")
DEFAULT_SAMPLES: int | None = 64
LOADING: dict[str, bool] = {"causal": True}
WINDOWS = True
NEEDS_LABELS: Labels = ""


def scorer(model: ModelSource, reference: ModelSource) -> LanguageModeling:
    """Sums up log-likelihoods and divergences."""
    return LanguageModeling(model.path, processors.placeholder_ids(reference.folder))


class LanguageModeling:
    """Perplexity, and how the next-token distribution departs from the reference's.

    ``placeholders`` are ids that stand for what is no text, such as an image's parts: nobody predicts them.
    """

    def __init__(self, name: str, placeholders: Sequence[int] = ()) -> None:
        self.name, self._placeholders = name, torch.tensor(list(placeholders), dtype=torch.int64)
        self._perplexity, self._divergence = Perplexity(), Divergence()
        self._compared = False

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """Outputs hold ``logits`` ``[1, length, vocabulary]``."""
        if "input_ids" not in feeds:
            raise InputError(f"{self.name} takes no input_ids, so it is no language model.", "Use another --task.")
        ids = torch.from_numpy(feeds["input_ids"][0].astype(np.int64))
        predicted = ~torch.isin(ids[1:], self._placeholders)
        if not predicted.any():
            raise InputError(f"{self.name} is given a sample of {len(ids)} tokens with nothing to predict.")
        logits = self._logits(outputs)
        self._perplexity.add(logits, ids, predicted)
        if reference is not None:
            self._compared = True
            self._divergence.add(self._logits(reference)[:-1][predicted], logits[:-1][predicted])

    def merge(self, other: LanguageModeling) -> None:
        """The samples that come after these."""
        self._perplexity.merge(other._perplexity)
        self._divergence.merge(other._divergence)
        self._compared |= other._compared

    def _logits(self, outputs: Arrays) -> Tensor:
        logits = logits_of(outputs, self.name, "length", "Use --task embedding or fidelity.")
        return torch.from_numpy(logits[0])

    def metrics(self) -> Metrics:
        """Perplexity; for a candidate divergence and agreement too."""
        own = self._perplexity.metrics()
        return own | self._divergence.metrics("top1_agreement") if self._compared else own

    def details(self) -> dict[str, Any]:
        """For a candidate a verdict on its divergence, in words."""
        return {"verdict": verdict(self._divergence.kl_nats)} if self._compared else {}
