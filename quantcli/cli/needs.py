"""Options that do something only beside others: a command line that cannot mean them is refused, not half obeyed.

What an option needs of the data or of the result, and not of the command line, is looked at where that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from quantcli.errors import UsageError

#: The values of a command's parameters, by name.
_Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Need:
    """What options do nothing without.

    Attributes:
        options: the parameters of these options.
        is_met: whether they do something beside these values; of a command that does not have a parameter, it has none.
        sentence: what they need, after an option's name; with ``{model}``.
        hint: what to do.
    """

    options: tuple[str, ...]
    is_met: Callable[[_Values], bool]
    sentence: str
    hint: str | None = None


def _reads_data(values: _Values) -> bool:
    return any(values.get(name) is not None for name in ("data", "eval_data"))


def _models(values: _Values) -> list[str]:
    return [str(model) for model in (values["model"], *(values.get("candidates") or ()))]


def _has_function(values: _Values) -> bool:
    from quantcli.system.user_functions import is_function

    return any(map(is_function, _models(values)))


def _may_have_graph(values: _Values) -> bool:
    """Whether a model is ONNX, is code, which is exported, or is missing, which is said otherwise."""
    from quantcli.onnx.graph.model import is_onnx

    return _has_function(values) or any(
        is_onnx(Path(model)) or model.endswith(".pt2") or not Path(model).exists() for model in _models(values)
    )


_OF_DATA = ("says how data is read, and none was named", "Name it with --data, or leave the option out.")

#: The first that is not met is told.
_NEEDS = (
    _Need(("samples", "tokenizer", "preprocess"), _reads_data, *_OF_DATA),
    # Where bench makes inputs up, it makes them as long.
    _Need(("seq_len",), lambda values: "runs" in values or _reads_data(values), *_OF_DATA),
    _Need(
        ("weights",),
        _has_function,
        "is for a model that is package.module:function, and {model} has its own weights",
        "Leave the option out.",
    ),
    _Need(
        ("custom_ops",),
        _may_have_graph,
        "is for models in ONNX, and {model} is a checkpoint",
        "Leave the option out.",
    ),
)


def require_needs(context: typer.Context) -> None:
    """Look at the options that the user wrote.

    Raises:
        UsageError: one does nothing without something that is not there.
    """
    written = {
        parameter.name: max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name and _is_written(context, parameter.name)
    }
    for need in _NEEDS:
        for name in need.options:
            if name in written and not need.is_met(context.params):
                sentence = need.sentence.format(model=context.params["model"])
                raise UsageError(f"{written[name]} {sentence}.", need.hint)


def _is_written(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
