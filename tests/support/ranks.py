"""Ranks on one machine: as threads, which is quick, or as processes that run command lines one after the other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any

import torch

from quantcli.system import ranks
from quantcli.system.messages import Pickler, Unpickler


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
            pickler = Pickler()
            self._board["content"], self._board["tensors"] = pickler.pickled(value), pickler.tensors
        self._wait()
        unpickler = Unpickler(self._board["content"])
        received = value if self.rank == source else unpickler.load()
        for tensor, sent in zip(unpickler.tensors.values(), self._board["tensors"], strict=False):
            tensor.copy_(sent)
        self._wait()
        return received

    def _wait(self) -> None:
        try:
            self._barrier.wait(60)
        except threading.BrokenBarrierError as error:
            raise RuntimeError("connection closed by peer") from error

    def close(self) -> None:
        pass


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def as_ranks(world: int, work: Callable[[int], Any], *, ends: bool = True) -> list[Any]:
    """What each of so many ranks returns, or None where it ends early, as all but the first do if a command ``ends``.

    ``work`` is given its number. Raises what rank 0 raises.
    """
    barrier, board, store = threading.Barrier(world), dict[str, Any](), Store()
    outcomes: list[Any] = [None] * world

    def run(number: int) -> None:
        try:
            with ranks.sharing(Messages(number, world, barrier, board), store):  # type: ignore[arg-type]
                found = work(number)
                if ends:
                    ranks.finish()
                outcomes[number] = found
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
    if isinstance(outcomes[0], BaseException):
        raise outcomes[0]
    return outcomes
