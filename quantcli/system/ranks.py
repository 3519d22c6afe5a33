"""Several processes, called ranks, that share one command's work, as torchrun starts them.

Every rank runs the same command. Where work is shared, each takes a part that follows from its number alone, and the
results are put together in an order that does not depend on how many ranks there are: so the bytes are those of a
single process. Rank 0 alone writes and talks. Without torchrun's variables in the environment there is one rank, and
nothing here imports torch.

What fails on one rank is left for the others in the store that torchrun keeps, so that rank 0 can say it. A rank that
dies without a word is noticed by its closed connections, or by torchrun, which ends the others.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from quantcli.errors import InputError, QuantcliError, RankError, UsageError
from quantcli.system.hardware import is_running

if TYPE_CHECKING:
    from quantcli.system.messages import Messages

K = TypeVar("K")
T = TypeVar("T")

#: Batches are added up in at most so many runs of neighbours, and the runs' sums in their order. More ranks than this
#: share no sums of floating-point numbers.
RUNS = 16
#: No wait is ended by its length: rank 0 may check a large artifact for hours while the others wait.
_PATIENCE = timedelta(days=30)
#: Seconds between two looks for what other ranks leave, and until one that left nothing is taken for dead.
_LOOK_EVERY, _LAST_WORDS = 0.5, 3.0
_FAILURE = "failure"


class Dismissed(BaseException):
    """A rank other than the first has done its part; it ends, and is content."""


class _Team:
    """The ranks of this command, once they have met."""

    def __init__(self, messages: Messages, store: Any) -> None:
        self.messages, self._store = messages, store
        #: Machine and process of each rank, once they are known.
        self.members: list[tuple[str, int]] = []
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def tell(self, error: BaseException) -> None:
        """Leave an error for the others; the first one that is left counts."""
        known = error if isinstance(error, QuantcliError) else None
        text = known.message if known else f"This is a defect of quantcli: {type(error).__name__}: {error}"
        status = known.exit_code if known else QuantcliError.exit_code
        trace = "".join(traceback.format_exception(error))
        words = {"rank": self.messages.rank, "message": text, "hint": known and known.hint, "status": status}
        self._over.set()
        with suppress(RuntimeError):  # where the store has gone, nobody is left to be told
            self._store.compare_set(_FAILURE, "", json.dumps(words | {"trace": trace}))

    def _left(self) -> dict[str, Any] | None:
        """What a rank left that failed, if one did."""
        try:
            return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None
        except RuntimeError:
            return None  # the store has gone with the process that kept it

    def _look(self) -> None:
        """End this rank's work where another one failed; also on another machine, where torchrun may take a minute."""
        while not self._over.wait(_LOOK_EVERY):
            if self._left():
                interrupt_main(signal.SIGTERM)
                return

    def failure(self) -> QuantcliError | None:
        """What ended another rank; None where all of them seem to live."""
        last = time.monotonic() + _LAST_WORDS
        while time.monotonic() < last:
            words = self._left()
            if words is not None:
                return _as_error(words, self.messages.rank)
            dead = [number for number, member in enumerate(self.members) if _is_dead(*member)]
            if dead:
                return _lost(f"Rank {dead[0]} (process {self.members[dead[0]][1]})")
            time.sleep(_LOOK_EVERY / 5)
        return None

    def close(self) -> None:
        """Part, without waiting for the others."""
        self._over.set()
        self.messages.close()


def _as_error(words: Mapping[str, Any], own: int) -> QuantcliError | None:
    if words["rank"] == own:
        return None
    kinds = {kind.exit_code: kind for kind in (QuantcliError, UsageError, InputError, RankError)}
    message = f"{words['message'].rstrip('.')} (on rank {words['rank']})."
    error = kinds.get(words["status"], QuantcliError)(message, words["hint"])
    error.add_note(words["trace"])
    return error


def _lost(who: str) -> RankError:
    return RankError(
        f"{who} ended without a word: it was killed, or its machine ran out of memory.",
        "The same command continues where it stopped.",
    )


def _machine() -> str:
    import socket

    return socket.gethostname()


def _is_dead(host: str, process: int) -> bool:
    """Whether a process of this machine has ended; those of others seem to live."""
    return host == _machine() and not is_running(process)


_team: ContextVar[_Team | None] = ContextVar("_team", default=None)
#: Whether the other ranks have ended, and what was not shared with them.
_alone: ContextVar[bool] = ContextVar("_alone", default=False)
_unshared: ContextVar[str | None] = ContextVar("_unshared", default=None)


def started() -> tuple[int, int]:
    """Number of this process, and of processes, as torchrun says; 0 and 1 without it."""
    try:
        number, total = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (number, total) if 0 <= number < total and "MASTER_ADDR" in os.environ else (0, 1)


def on_this_machine() -> int:
    """Ranks that share this machine's cores: one, once the others have ended."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if started()[1] > 1 and not _alone.get() else 1


def rank() -> int:
    """Number of this rank among those that share the work."""
    team = _team.get()
    return team.messages.rank if team else 0


def world() -> int:
    """How many ranks share the work."""
    team = _team.get()
    return team.messages.world if team else 1


def is_first() -> bool:
    """Whether this is the rank that writes and talks."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Meanwhile the processes that torchrun started share their work; without it, nothing changes.

    Raises:
        RankError: another rank ended without a word.
        QuantcliError: what ended another rank.
    """
    if started()[1] == 1:
        yield
        return
    from quantcli.system.messages import meet

    with sharing(*meet(_PATIENCE)):
        yield


@contextmanager
def sharing(messages: Messages, store: Any) -> Iterator[None]:
    """Meanwhile this process is one of several that can send each other messages; for errors see `joined`.

    ``store``: what all of them read and write by keys, as a store of torch.distributed.
    """
    team = _Team(messages, store)
    token = _team.set(team)
    try:
        team.members = gather((_machine(), os.getpid()))
        yield
    except Dismissed:
        raise
    except KeyboardInterrupt:
        # torchrun ends all ranks where one has died, by the signal that also a user ends them by.
        failure = team.failure()
        if failure is None:
            raise
        raise failure from None
    except BaseException as error:
        team.tell(error)
        raise
    finally:
        team.close()
        _team.reset(token)


def broadcast(value: T, source: int = 0) -> T:
    """A rank's value, for all. Raises what ended another rank."""
    team = _team.get()
    if team is None:
        return value
    try:
        found: T = team.messages.broadcast(value, source)
    except RuntimeError as error:  # a broken connection is what another rank died of
        raise (team.failure() or _lost("Another rank")) from error
    return found


def gather(value: T) -> list[T]:
    """Every rank's value, in their order, for all. Raises what ended another rank."""
    return [broadcast(value, source) for source in range(world())]


def first(make: Callable[[], T]) -> T:
    """What rank 0 makes, for all: what is looked up, tried or drawn just once."""
    return broadcast(make() if is_first() else None, 0)  # type: ignore[return-value]


def in_order(parts: Mapping[K, T]) -> Iterator[tuple[K, T]]:
    """The entries of every rank's mapping, rank after rank: one at a time, since they may be large."""
    for source in range(world()):
        for name in broadcast(list(parts), source):
            yield name, broadcast(parts[name] if source == rank() else None, source)  # type: ignore[misc]


def part(count: int, multiple: int = 1) -> range:
    """This rank's share of so many samples in a row, whose limits are multiples of what makes up a batch."""
    units = -(-count // multiple)
    start, stop = (units * number // world() * multiple for number in (rank(), rank() + 1))
    return range(min(start, count), min(stop, count))


def runs(count: int) -> Iterator[tuple[int, range]]:
    """This rank's runs of neighbouring batches, numbered; as many for every rank, so that the last may be empty.

    Runs do not depend on the number of ranks. What is added up of each is added to the total in the order of runs:
    the ranks' after each turn, in the order of ranks.
    """
    total = min(count, RUNS)
    for turn in range(0, total, world()):
        number = turn + rank()
        yield number, range(count * number // total, count * (number + 1) // total) if number < total else range(0)


def own_batches(count: int) -> list[int]:
    """Numbers of the batches in this rank's runs, in order."""
    return [number for _, numbers in runs(count) for number in numbers]


def share(costs: Mapping[T, int]) -> set[T]:
    """This rank's share of things that can be worked on in any order, by what they cost; the same on all ranks."""
    loads = [0] * world()
    mine = set()
    for key, cost in sorted(costs.items(), key=lambda item: -item[1]):
        least = loads.index(min(loads))
        loads[least] += cost
        if least == rank():
            mine.add(key)
    return mine


def finish() -> None:
    """Everything shared is done: rank 0 goes on alone, the others end here."""
    team = _team.get()
    if team is None:
        return
    gather(None)
    if not is_first():
        raise Dismissed
    team.close()
    _team.set(None)
    _alone.set(True)


def go_on_alone(what: str) -> None:
    """End all ranks but the first, which does alone what cannot be shared. ``what`` starts a sentence."""
    if world() > 1:
        finish()
        _unshared.set(f"{what} is not shared among the processes of torchrun: the first one did it, with all cores.")


def unshared() -> list[str]:
    """What is to be told of work that the first rank did alone."""
    told = _unshared.get()
    return [told] if told else []


def silence() -> None:
    """Let a rank that does not talk say nothing, whichever library in it speaks."""
    if started()[0]:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
