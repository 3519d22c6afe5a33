"""From torch to ONNX, with free batch and sequence dimensions, and compared with torch before it is accepted."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import load_samples
from quantcli.errors import InputError
from quantcli.export.cached import cached_source, name_axes
from quantcli.export.function import function_source
from quantcli.export.hugging_face import hugging_face_source
from quantcli.export.program import program_source
from quantcli.export.source import Data, Example, ExportSource
from quantcli.models.hugging_face import loadable_folder
from quantcli.models.inputs import fit
from quantcli.models.runner import ProgramRunner, TorchRunner, open_runner
from quantcli.system.user_functions import is_function

if TYPE_CHECKING:
    import onnx_ir as ir

#: An export whose outputs are further from torch's is a wrong one; float32 alone leaves 100 dB and more.
LEAST_SQNR_DB = 60.0


@dataclass(frozen=True)
class Exported:
    """An ONNX file made from a torch model.

    ``outputs_sqnr_db`` is the lowest of any output against torch's, None where all are equal to the bit.
    """

    path: Path
    outputs_sqnr_db: float | None
    warnings: list[str] = field(default_factory=list)


def export_to_onnx(
    model: str | Path,
    folder: Path,
    *,
    data: DataRequest | Sequence[Mapping[str, np.ndarray]] | None = None,
    weights: Path | None = None,
    cache: bool = False,
) -> Exported:
    """Export a torch model to ``folder/model.onnx`` (and ``model.onnx.data`` where it is large).

    A Hugging Face folder is exported as its config.json names it: a causal language model for scoring
    (input_ids, attention_mask -> logits, without a key-value cache), a classifier with its logits, anything else
    with its last_hidden_state. Outputs of other modules are output_0 and so on, or the keys of what they return.

    Args:
        model: a Hugging Face folder, a ``.pt2``, or ``package.module:function`` that returns a torch module.
        folder: made where it does not exist.
        data: DATA, or samples as arrays by input name, that a function's module is traced with. Without it the
            inputs are taken from the function's attribute ``example_inputs`` or the module's
            ``example_input_array``. An axis along which samples differ becomes free, like the batch.
        weights: state dict for a function's module.
        cache: whether a causal language model takes and returns its key-value cache (`quantcli.export.cached`).

    Raises:
        InputError: the model cannot be loaded, traced or expressed in ONNX, no inputs to trace it with are known,
            or the export computes something else than torch.
        MissingExtraError: transformers is not installed.
    """
    source = cached_source(loadable_folder(Path(model))) if cache else read_source(model, data, weights)
    folder.mkdir(parents=True, exist_ok=True)
    path, messages = folder / "model.onnx", list(source.warnings)
    graph = _export(source, messages)
    if cache:
        name_axes(graph)
    _write(graph, source, path)
    return Exported(path, _compare(path, source), messages)


def _export(source: ExportSource, messages: list[str]) -> ir.Model:
    """The graph; where no free batch can be had, one for the first example's shapes."""
    try:
        return _trace(source, source.dynamic)
    except Exception as error:  # whatever torch.export and each operator's translation raise
        if not source.may_be_fixed:
            raise _failure(source, error) from error
    source.fix_shapes()
    messages.append(f"{source.name} cannot be exported with a free batch size; its shapes are fixed at the example's.")
    try:
        return _trace(source, None)
    except Exception as error:
        raise _failure(source, error) from error


def _trace(source: ExportSource, dynamic: Any) -> ir.Model:
    import torch

    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            source.module,
            (),
            kwargs=None if source.is_program else dict(source.examples[0]),
            dynamic_shapes=dynamic,
            input_names=source.input_names,
            output_names=source.output_names,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def _write(model: ir.Model, source: ExportSource, path: Path) -> None:
    import torch

    from quantcli.onnx.graph.names import name_by_modules, strip_metadata
    from quantcli.onnx.graph.save import save_graph

    name_by_modules(model, source.prefix)
    strip_metadata(model)
    # Builds of one version, such as +cpu and +cu132, export the same.
    model.producer_version = torch.__version__.split("+")[0]
    save_graph(model, path)


def _compare(path: Path, source: ExportSource) -> float | None:
    """Lowest SQNR in dB over outputs and examples; None where nothing differs. Raises InputError below the least."""
    from quantcli.models.session import Session

    session, lowest = Session(path), inf
    for example in source.examples:
        expected = source.run(example)
        feeds = {port.name: value.numpy() for port, value in zip(session.inputs, example.values(), strict=True)}
        for name, value in session.run(feeds).items():
            lowest = min(lowest, _sqnr_db(expected[name], value))
    if lowest < LEAST_SQNR_DB:
        raise InputError(
            f"The ONNX export of {source.name} does not compute what torch computes: its outputs reach "
            f"{lowest:.1f} dB SQNR, at least {LEAST_SQNR_DB:.0f} dB are expected.",
            "The model may decide something from its inputs' values; export it by hand and convert the .onnx file.",
        )
    return None if lowest == inf else lowest


def _sqnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Infinite where arrays are equal, minus infinite where shapes or non-finite places differ."""
    if expected.shape != got.shape:
        return -inf
    ours, theirs = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    finite = np.isfinite(ours)
    if not np.array_equal(np.where(finite, 0.0, ours), np.where(np.isfinite(theirs), 0.0, theirs), equal_nan=True):
        return -inf
    signal, noise = np.sum(ours[finite] ** 2), np.sum((theirs[finite] - ours[finite]) ** 2)
    if noise == 0.0:
        return inf
    return 10 * log10(signal / noise) if signal else -inf


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints, logs and warns about its own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _failure(source: ExportSource, error: Exception) -> InputError:
    """The innermost reason: the exporter wraps it in pages of advice to its own developers."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
    return InputError(
        f"torch.onnx cannot export {source.name}: {type(cause).__name__}: {reason.rstrip('.')}.",
        "Export it by hand, and give quantcli the .onnx file.",
    )


#: Samples of DATA that are looked at.
_SAMPLES = 8


def read_source(model: str | Path, data: Data, weights: Path | None) -> ExportSource:
    """Load a torch model of any kind. Arguments and errors are those of `quantcli.export.export.export_to_onnx`."""
    if not is_function(str(model)) and Path(model).suffix != ".pt2":
        return hugging_face_source(loadable_folder(Path(model)))
    if is_function(str(model)):
        runner = open_runner(str(model), weights=weights)
        assert isinstance(runner, TorchRunner)
        return function_source(str(model), runner, _samples(data, runner.inputs, str(model)))
    program = ProgramRunner(Path(model))
    return program_source(Path(model), program, _samples(data, program.inputs, str(model)))


def _samples(data: Data, inputs: Sequence[Port], name: str) -> list[Example]:
    """A few samples as a model takes them."""
    if isinstance(data, DataRequest):
        data = [sample.inputs for sample in load_samples(replace(data, samples=_SAMPLES), inputs, folder=None)]
    feeds = [fit(sample, inputs, name) for sample in data or ()]
    return [{key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in each.items()} for each in feeds]
