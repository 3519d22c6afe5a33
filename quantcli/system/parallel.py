"""Threads: a pool for slabs, and one call in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

from quantcli.system.ranks import on_this_machine

T = TypeVar("T")


class Background(threading.Thread, Generic[T]):
    """A call under way in a thread of its own, which nobody waits for when the rest fails."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._values: list[T] = []
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._values.append(self._call())
        except BaseException as error:
            self._failure = error

    def result(self) -> T:
        """Wait for the value. Raises what the call raised."""
        self.join()
        if self._failure:
            raise self._failure
        return self._values[0]


def in_parallel(tasks: Iterator[Callable[[], None]], workers: int) -> None:
    """Run tasks on threads with one torch thread each; the first failure stops the rest and is raised.

    Threads take tasks from the iterator themselves: a future per slab would cost as much as the slab.
    """
    import torch

    lock, failures, stop = threading.Lock(), list[BaseException](), threading.Event()
    finished = threading.Semaphore(0)

    def work() -> None:
        torch.set_num_threads(1)
        try:
            while not stop.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                task()
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            finished.release()

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        # Not `join`: before Python 3.13, one that is interrupted takes its thread for ended (gh-90882).
        for _ in threads:
            finished.acquire()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)
    if failures:
        raise failures[0]


@contextmanager
def torch_threads() -> Iterator[None]:
    """Let torch's own operators use as many threads as `usable_cores` meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


_limit: ContextVar[int | None] = ContextVar("_limit", default=None)


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Let `usable_cores` answer no more than this meanwhile; None: no limit."""
    token = _limit.set(threads)
    try:
        yield
    finally:
        _limit.reset(token)


def usable_cores() -> int:
    """Cores this process may run on, shared with the ranks beside it; or as many as `at_most` allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _limit.get() or max(1, cores // on_this_machine()))
