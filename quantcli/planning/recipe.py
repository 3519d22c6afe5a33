"""The recipe: what the user asks for, from flags and a strict YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantcli.core.scheme import PRESETS, Granularity, NumberFormat, Scheme
from quantcli.errors import UsageError
from quantcli.planning.targets import TARGETS
from quantcli.system.text import parse_bytes, suggestion
from quantcli.system.yaml_file import read_yaml

Rest = Literal["auto", "keep", "fp16", "bf16"]
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
#: Characters of what is said against a value, which may quote it.
_LONGEST_PROBLEM = 600

#: Where data comes from options of the command line: messages name the option in place of a key.
FLAGS = "flags"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NumberFormatSpec(_Strict):
    """A number format spelled out in a recipe."""

    dtype: Literal["fp16", "bf16", "int8", "int4", "nf4"]
    granularity: Literal["tensor", "channel", "group", "block", "token"] = "tensor"
    group_size: int | None = Field(default=None, ge=1)
    block_size: int | None = Field(default=None, ge=1)
    symmetric: bool = True
    dynamic: bool = False
    double_quantized: bool = False

    def build(self) -> NumberFormat:
        """The value type. Raises ValueError where size and granularity do not fit."""
        sizes = {"group": self.group_size, "block": self.block_size}
        size = sizes.get(self.granularity)
        if self.granularity == "block" and size is None:
            size = 64
        stray = [f"{kind}_size" for kind, value in sizes.items() if value and kind != self.granularity]
        if stray:
            raise ValueError(f"{stray[0]} goes with granularity {stray[0].removesuffix('_size')}")
        if self.granularity == "group" and size is None:
            raise ValueError("granularity group needs a group_size")
        granularity = Granularity(self.granularity, size)
        return NumberFormat(self.dtype, granularity, self.symmetric, self.dynamic, self.double_quantized)


class SchemeSpec(_Strict):
    """A scheme spelled out in a recipe."""

    weights: NumberFormatSpec
    inputs: NumberFormatSpec | None = None

    def build(self) -> Scheme:
        """The value type. Raises ValueError."""
        return Scheme(self.weights.build(), self.inputs.build() if self.inputs else None)


def _known_preset(value: Any) -> Any:
    if isinstance(value, str) and value not in PRESETS:
        raise ValueError(f"unknown scheme {value!r}. {suggestion(value, PRESETS)}")
    return value


class Rule(_Strict):
    """What holds for the layers that ``match``: a glob, or a list of them, over layer or tensor names."""

    match: str | list[str]
    scheme: str | SchemeSpec | None = None
    group_size: int | None = Field(default=None, ge=1)
    algorithm: str | None = None
    skip: bool = False

    _preset = field_validator("scheme")(_known_preset)

    @property
    def globs(self) -> list[str]:
        """The patterns as a list."""
        return [self.match] if isinstance(self.match, str) else self.match


class Recipe(_Strict):
    """Everything that decides what `convert` writes. The first rule that matches a layer wins.

    ``steps`` is a chain of algorithms in place of one; ``blocks`` names the lists of a model's blocks where they
    are not found.
    """

    scheme: str | SchemeSpec | None = None
    algorithm: str = "auto"
    steps: list[str | dict[str, dict[str, Any] | None]] = []
    blocks: list[str] = []
    format: str | None = None
    group_size: int | None = Field(default=None, ge=1)
    rest: Rest = "auto"
    target: str | None = None
    skip: list[str] = []
    max_shard_size: int = Field(default=DEFAULT_MAX_SHARD_BYTES, ge=1)
    rules: list[Rule] = []

    _preset = field_validator("scheme")(_known_preset)

    @field_validator("steps")
    @classmethod
    def _one_key(cls, value: list[Any]) -> list[Any]:
        if any(isinstance(step, dict) and len(step) != 1 for step in value):
            raise ValueError("a step is a name, or one name with its options below it")
        return value

    @model_validator(mode="after")
    def _algorithm_or_steps(self) -> Recipe:
        if self.steps and self.algorithm != "auto":
            raise ValueError("algorithm and steps say the same thing twice; keep one of them")
        return self

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        name, _, version = (value or next(iter(TARGETS))).partition("==")
        if name not in TARGETS:
            raise ValueError(f"unknown target {name!r}. {suggestion(name, TARGETS)}")
        if "=" in (value or "") and not re.fullmatch(r"\d+(\.\d+)*", version):
            raise ValueError(f"{value!r} is not RUNTIME==VERSION")
        return value

    @property
    def runtime(self) -> tuple[str | None, str | None]:
        """The target's name, and its version where one is given; None where there is no wish."""
        name, _, version = (self.target or "").partition("==")
        return name or None, version or None

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    def with_flags(self, **flags: Any) -> Recipe:
        """The recipe with flags on top; None (or an empty list) leaves the recipe's own word."""
        given = {key: value for key, value in flags.items() if value}
        own = self.model_dump(exclude_unset=True)
        if "algorithm" in given:
            own.pop("steps", None)
        return validate(own | given, FLAGS)


def build_scheme(value: str | SchemeSpec) -> Scheme:
    """A preset by name, or a spelled-out scheme. Raises UsageError."""
    if isinstance(value, str):
        return PRESETS[value]
    try:
        return value.build()
    except ValueError as error:
        raise UsageError(f"The recipe's scheme cannot be meant: {error}.") from error


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises InputError where it cannot be read, UsageError where it cannot be meant."""
    loaded = read_yaml(path, "The recipe")
    if not isinstance(loaded, dict):
        raise UsageError(f"The recipe {path} is not a mapping.", "Start with a line such as: scheme: int4")
    return validate(loaded, str(path))


def validate(data: dict[str, Any], where: str) -> Recipe:
    """Build a Recipe from plain data. Raises UsageError that names the key and the nearest known one."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A misspelled key also leaves one missing, and a union complains once per member.
        problem = max(error.errors(), key=lambda each: (each["type"] == "extra_forbidden", len(each["loc"])))
        location = [str(part) for part in problem["loc"] if part not in ("SchemeSpec", "str", "list[str]")]
        if problem["type"] == "extra_forbidden":
            known = _fields_at(location[:-1])
            raise UsageError(
                f"{where}: unknown key {'.'.join(location)!r}.", suggestion(location[-1], known)
            ) from error
        message = problem["msg"].removeprefix("Value error, ").rstrip(".?")[:_LONGEST_PROBLEM]
        end = "?" if "Did you mean" in message else "."
        key = ".".join(location)
        message = message.replace("Input should be", "it should be", 1)
        place = f"--{key.replace('_', '-')}" if where == FLAGS else f"{where}: {key}"
        raise UsageError(f"{place}: {message}{end}") from error


def _fields_at(location: list[str]) -> list[str]:
    model: type[_Strict] = Recipe
    nested: dict[str, type[_Strict]] = {"rules": Rule, "scheme": SchemeSpec}
    nested |= {"weights": NumberFormatSpec, "inputs": NumberFormatSpec}
    for part in location:
        model = nested.get(part, model)
    return list(model.model_fields)


def dequantizes(recipe: Recipe) -> bool:
    """Whether a recipe casts to 16 bits, which a quantized checkpoint can be, too."""
    return recipe.scheme is not None and build_scheme(recipe.scheme).weights.is_cast
