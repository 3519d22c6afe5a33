"""Ranks on one machine: as threads, which is quick, or as processes that run command lines one after the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any

import torch

from quantcli.system import ranks
from quantcli.system.messages import _Pickler, _Unpickler


class Store(dict[str, str]):
    """A store of torch.distributed, as far as it is used."""

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> None:
        self.setdefault(key, desired)


class Messages:
    """What threads send each other: pickled, as between processes."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, board: dict[str, Any]) -> None:
        self.rank, self.world, self._barrier, self._board = rank, world, barrier, board

    def broadcast(self, value: Any, source: int) -> Any:
        if self.rank == source:
            pickler = _Pickler()
            self._board["content"], self._board["tensors"] = pickler.pickled(value), pickler.tensors
        self._wait()
        unpickler = _Unpickler(self._board["content"])
        received = value if self.rank == source else unpickler.load()
        for tensor, sent in zip(unpickler.tensors.values(), self._board["tensors"], strict=False):
            tensor.copy_(sent)
        self._wait()
        return received

    def gather(self, value: Any) -> list[Any]:
        return [self.broadcast(value, source) for source in range(self.world)]

    def _wait(self) -> None:
        try:
            self._barrier.wait(60)
        except threading.BrokenBarrierError as error:
            raise RuntimeError("connection closed by peer") from error

    def close(self) -> None:
        pass


def as_ranks(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What each of so many ranks returns, or raises, or None where it ends early; ``work`` is given its number."""
    barrier, board, store = threading.Barrier(world), dict[str, Any](), Store()
    outcomes: list[Any] = [None] * world

    def run(number: int) -> None:
        try:
            with ranks.sharing(Messages(number, world, barrier, board), store):  # type: ignore[arg-type]
                outcomes[number] = work(number)
                ranks.finish()
        except ranks.Dismissed:
            pass
        except BaseException as error:
            outcomes[number] = error
            barrier.abort()

    threads = [threading.Thread(target=Context().run, args=(run, number)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    for outcome in outcomes[:1]:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
