"""``.pt2`` programs of torch.export, loaded without running what a file may hide. Only here is its loader called.

torch's loader takes a file at its word: it falls back to full pickles, opens compiled libraries, and executes text of
the file as Python (sizes, guards, and the names that code is generated of). What a program needs none of is refused
here before torch sees it; pickles are loaded as tensors and plain values only. A program remains what a model is made
of, and its operators compute what it says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import InputError
from quantcli.system.text import first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MAX_JSON_BYTES = 256 << 20
#: Parts of an archive's names that stand for compiled libraries and for pickled objects.
_CODE = {"aotinductor/": "a compiled library", "custom_obj_": "a pickled object", "opaque_obj_": "a pickled object"}
#: Makes every `torch.load` one of tensors and plain values, whatever its caller asks for.
_WEIGHTS_ONLY, _NOT_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
#: Keys whose values become identifiers in generated code.
_NAMES = frozenset(
    ("name", "as_name", "target", "parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn",
     "forward_arg_names", "input_names")
)  # fmt: skip
_NAME = re.compile(r"#?[\w.:]*")
#: Keys whose values are executed: expressions over sizes.
_EXPRESSIONS = frozenset(("expr_str", "guards_code"))
#: What expressions may call: sympy's and torch's arithmetic, and questions to tensors.
_CALLED = frozenset((
    "Symbol", "Dummy", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "Eq", "Ne",
    "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
    "GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "floor", "ceiling", "sqrt", "log", "FloorDiv",
    "CleanDiv", "CeilDiv", "ModularIndexing", "PythonMod", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt",
    "RoundToInt", "FloorToInt", "CeilToInt", "PowByNatural", "FloatPow", "Where", "Identity", "NaturalNumber",
    "Zero", "One", "NegativeOne", "Half", "size", "stride", "dim", "storage_offset", "numel", "item", "len", "min",
    "max", "abs", "int", "float", "bool", "isinstance", "type", "sym_not", "sym_max", "sym_min", "sym_int",
    "sym_float",
))  # fmt: skip
_PARTS = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Constant, ast.Attribute,
    ast.Subscript, ast.Name, ast.Load, ast.Tuple, ast.List, ast.IfExp, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def load_program(path: Path) -> ExportedProgram:
    """The program of a file.

    Raises:
        InputError: it is missing, damaged, of another version of torch, or needs more than tensors and arithmetic.
    """
    import torch

    if not path.is_file():
        raise InputError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    try:
        _require_harmless(path)
        with _weights_only():
            return torch.export.load(path)
    except InputError:
        raise
    except Exception as error:  # zip, JSON and schema errors share no base class
        raise InputError(
            f"{path} cannot be loaded by torch {torch.__version__}: {first_line(error)}",
            "A .pt2 is written by torch.export.save; it may be damaged, or of a newer torch.",
        ) from error


def _require_harmless(path: Path) -> None:
    """Raise InputError where an archive holds what would run as code, and ValueError where it is no honest archive."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("a part of the archive occurs twice")
        for name in names:
            what = next((what for part, what in _CODE.items() if part in name), None)
            if what:
                raise _refusal(path, f"{what} ({name})")
            if not name.endswith(".json"):
                continue
            if archive.getinfo(name).file_size > _MAX_JSON_BYTES:
                raise ValueError(f"{name} is over {_MAX_JSON_BYTES >> 20} MiB")
            for key, text in _texts(json.loads(archive.read(name)), ""):
                if key in _NAMES and not _NAME.fullmatch(text):
                    raise _refusal(path, f"the name {text[:80]!r}, which is none")
                if key in _EXPRESSIONS and not is_arithmetic(text):
                    raise _refusal(path, f"the expression {text[:80]!r}, which is no arithmetic")


def _refusal(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} holds {what}; quantcli reads tensors and operators only and never runs code from a file.",
        "Export it anew from its source, or give the source itself as package.module:function.",
    )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a JSON value, with the key that it or its list stands under. Raises RecursionError where deep."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner, content in value.items():
            yield from _texts(content, inner)
    elif isinstance(value, list):
        for content in value:
            yield from _texts(content, key)


def is_arithmetic(text: str) -> bool:
    """Whether a Python expression only calculates: what it calls is known, and it reaches for nothing private."""
    try:
        parts = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    for part in parts:
        if not isinstance(part, _PARTS):
            return False
        if isinstance(part, ast.Name | ast.Attribute) and _identifier(part).startswith("_"):
            return False
        if isinstance(part, ast.Call) and _identifier(part.func) not in _CALLED:
            return False
    return True


def _identifier(part: ast.AST) -> str:
    return part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""


@contextmanager
def _weights_only() -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in (_WEIGHTS_ONLY, _NOT_ONLY)}
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
