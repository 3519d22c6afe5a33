"""Embedding: the angle between a candidate's vectors and the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.hugging_face import load_json, pooling_file
from quantcli.core.ports import Arrays
from quantcli.data.sources.base import Labels
from quantcli.errors import InputError
from quantcli.evaluation.metrics import Mean, cosine
from quantcli.evaluation.tasks.base import Metrics, with_error
from quantcli.models.outputs import floats
from quantcli.models.source import ModelSource

NAME = "embedding"
METRICS = ()
CANDIDATE_METRICS = ("cosine", "cosine_se", "cosine_min")
DEFAULT_SAMPLES: int | None = 256
LOADING: dict[str, bool] = {"causal": False}
WINDOWS = False
NEEDS_LABELS: Labels = ""


def scorer(model: ModelSource, reference: ModelSource) -> Embedding:
    """Compares vectors that are pooled as the reference's folder says."""
    return Embedding(model.path, _pooling_of(reference.folder) if reference.folder else "mean")


#: Names of outputs that hold one vector per text.
_EMBEDDINGS = ("sentence_embedding", "sentence_embeddings", "embeddings", "embedding")


class Embedding:
    """Cosine of every text's embedding with the reference's.

    Token vectors are pooled over the attention mask; a model without them gives its own embedding, or its
    first output as one vector. ``pooling`` is ``mean``, ``cls`` or ``last``.
    """

    def __init__(self, name: str, pooling: str) -> None:
        self.name, self.pooling = name, pooling
        self._cosine = Mean()

    def add(self, feeds: Arrays, label: Any, outputs: Arrays, reference: Arrays | None) -> None:
        """One text."""
        if reference is None:
            return
        ours, theirs = (self._vector(each, feeds) for each in (reference, outputs))
        if ours.shape != theirs.shape:
            raise InputError(f"{self.name} embeds in {len(theirs)} dimensions, the reference in {len(ours)}.")
        self._cosine.add(cosine(ours, theirs))

    def _vector(self, outputs: Arrays, feeds: Arrays) -> Tensor:
        vectors = floats(outputs)
        mask = feeds.get("attention_mask")
        for name in ("last_hidden_state", "token_embeddings", *vectors):
            value = vectors.get(name)
            if mask is not None and value is not None and value.ndim == 3 and value.shape[:2] == mask.shape:
                kept = torch.from_numpy(value[0]).double()[torch.from_numpy(mask[0].astype(bool))]
                if self.pooling == "mean":
                    return kept.mean(0)
                return kept[0] if self.pooling == "cls" else kept[-1]
        if not vectors:
            raise InputError(f"{self.name} returns no floating-point output to embed with.")
        chosen = next((vectors[name] for name in _EMBEDDINGS if name in vectors), next(iter(vectors.values())))
        return torch.from_numpy(chosen).double().flatten()

    def merge(self, other: Embedding) -> None:
        """The texts that come after these."""
        self._cosine.merge(other._cosine)

    def metrics(self) -> Metrics:
        """Mean, standard error and minimum."""
        return (
            with_error("cosine", self._cosine) | {"cosine_min": min(self._cosine.values)} if self._cosine.values else {}
        )

    def details(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _pooling_of(path: Path) -> str:
    """How sentence-transformers pool a folder's token vectors: ``mean``, ``cls`` or ``last``; by default mean."""
    pooling = pooling_file(path)
    if pooling is None:
        return "mean"
    config = load_json(pooling)
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
    chosen = [mode for mode, key in modes.items() if config.get(key)]
    if len(chosen) != 1:
        raise InputError(f"{pooling} asks for a pooling that is not supported; known are {', '.join(modes)}.")
    return chosen[0]
