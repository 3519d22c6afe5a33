"""Checkpoints: what a model's weights are read from. `open_checkpoint` tells which kind a path is."""

from __future__ import annotations

from quantcli.checkpoint.checkpoint import open_checkpoint

__all__ = ["open_checkpoint"]
