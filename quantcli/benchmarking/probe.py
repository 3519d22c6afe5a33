"""Load time and peak memory of a model, measured in a process of its own that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import InputError
from quantcli.models.custom_operators import register, registered
from quantcli.models.narrow import in_numpy
from quantcli.system.child import Child, ChildFailedError
from quantcli.system.files import temporary_folder
from quantcli.system.hardware import peak_rss_bytes

if TYPE_CHECKING:
    import numpy as np

#: Passes in the child: the first ones may allocate what later ones use again.
_RUNS = 3

_MODULES = {"onnx": ("onnxruntime",), "checkpoint": ("torch", "transformers")}


@dataclass(frozen=True)
class Probe:
    """What loading and running a model takes.

    ``load_ms`` is of a second load, with imports done and files in the system's cache. ``peak_rss_bytes`` is
    of the whole process, of which ``baseline_rss_bytes`` were there before the model: the interpreter and the
    libraries.
    """

    load_ms: float
    peak_rss_bytes: int
    baseline_rss_bytes: int


def probe(
    model: str,
    kind: str,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int | None,
    weights: Path | None = None,
    generates: bool = False,
) -> Probe:
    """Load a model in a child process, run it a few times, and see what that took.

    With ``generates``, a model that has a cache also says a few tokens after the first text of ``input_ids``.

    Raises:
        InputError: the child failed.
    """
    import numpy as np

    with temporary_folder() as name:
        folder = Path(name)
        np.savez(folder / "feeds.npz", **{name: in_numpy(array) for name, array in feeds.items()})  # type: ignore[arg-type]
        request = {"model": model, "kind": kind, "threads": threads, "weights": weights and str(weights)}
        request["generates"] = generates and "input_ids" in feeds
        given = {"feeds": str(folder / "feeds.npz"), "custom_ops": [str(library) for library in registered()]}
        child = Child(f"{__name__}:load_and_run", request | given)
        try:
            return Probe(**child.result())
        except ChildFailedError as error:
            reason = error.last_line.removeprefix("quantcli.errors.InputError: ")
            raise InputError(
                f"{model} could not be run in a process of its own (status {error.status}): {reason}",
                "It was killed, which is what happens where memory runs out." if error.crashed else None,
            ) from error
        finally:
            child.stop()


def load_and_run(request: dict[str, Any]) -> dict[str, float]:
    """In the child: the fields of a `Probe`."""
    from importlib import import_module

    import numpy as np

    from quantcli.benchmarking.generation import generating
    from quantcli.models.runner import open_runner

    register(Path(library) for library in request["custom_ops"])

    for module in _MODULES.get(request["kind"], ("torch",)):
        import_module(module)
    with np.load(request["feeds"]) as stored:
        feeds = dict(stored)
    weights = None if request["weights"] is None else Path(request["weights"])
    baseline = peak_rss_bytes()
    runner = open_runner(request["model"], threads=request["threads"], weights=weights)
    for _ in range(_RUNS):
        runner.run(feeds)
    model = generating(runner, feeds["input_ids"]) if request["generates"] else None
    if model is not None:
        model.read(0)
        model.generate(0)
    peak = peak_rss_bytes()
    del runner
    # The first load also imported what the libraries import late.
    start = time.perf_counter()
    open_runner(request["model"], threads=request["threads"], weights=weights)
    load_ms = (time.perf_counter() - start) * 1e3
    return {"load_ms": load_ms, "peak_rss_bytes": peak, "baseline_rss_bytes": baseline}
