"""Recipes: what can be said, what is refused and how, and that a flag beats the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli.core.scheme import PRESETS, Granularity, NumberFormat, Scheme
from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.planning.recipe import Recipe, Rule, build_scheme, load_recipe, validate

SPELLED_OUT = """
scheme:
  weights: {dtype: int8, granularity: channel}
  inputs: {dtype: int8, granularity: token, dynamic: true}
"""


def load(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        build_scheme(validate(data, "recipe.yaml").scheme or "int4")
    return str(caught.value)


def test_everything_that_a_recipe_can_say(tmp_path: Path) -> None:
    text = """
        scheme: int4
        algorithm: rtn
        format: compressed-tensors
        group_size: 64
        rest: keep
        skip: ["*.router"]
        max_shard_size: 1.5GiB
        rules:
          - {match: "*.down_proj", scheme: int8}
          - {match: ["*.a", "*.b"], skip: true}
          - {match: "*", group_size: 32, algorithm: mse}
        """
    recipe = load(tmp_path, text)
    assert (recipe.scheme, recipe.algorithm, recipe.format) == ("int4", "rtn", "compressed-tensors")
    assert (recipe.group_size, recipe.rest, recipe.skip) == (64, "keep", ["*.router"])
    assert recipe.max_shard_size == 3 * 2**29
    first, second, third = recipe.rules
    assert (first.globs, first.scheme, first.skip) == (["*.down_proj"], "int8", False)
    assert (second.globs, second.skip) == (["*.a", "*.b"], True)
    assert (third.group_size, third.algorithm) == (32, "mse")


def test_defaults() -> None:
    recipe = validate({}, "recipe.yaml")
    assert (recipe.scheme, recipe.algorithm, recipe.format, recipe.rest) == (None, "auto", None, "auto")
    assert (recipe.skip, recipe.rules, recipe.max_shard_size) == ([], [], 5_000_000_000)


def test_a_preset_spelled_out_is_the_preset(tmp_path: Path) -> None:
    scheme = load(tmp_path, SPELLED_OUT).scheme
    assert scheme is not None and build_scheme(scheme) == PRESETS["int8-dynamic"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"dtype": "int8"}, NumberFormat("int8", Granularity("tensor"))),
        ({"dtype": "int4", "granularity": "group", "group_size": 32}, NumberFormat("int4", Granularity("group", 32))),
        (
            {"dtype": "int8", "granularity": "channel", "symmetric": False},
            NumberFormat("int8", Granularity("channel"), symmetric=False),
        ),
        ({"dtype": "nf4", "granularity": "block"}, NumberFormat("nf4", Granularity("block", 64))),
        (
            {"dtype": "nf4", "granularity": "block", "block_size": 128, "double_quantized": True},
            NumberFormat("nf4", Granularity("block", 128), double_quantized=True),
        ),
    ],
    ids=str,
)
def test_number_formats_spelled_out(weights: dict[str, Any], expected: NumberFormat) -> None:
    scheme = validate({"scheme": {"weights": weights}}, "recipe.yaml").scheme
    assert scheme is not None and build_scheme(scheme) == Scheme(expected)


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        ({"shceme": "int4"}, "shceme", "scheme"),
        ({"rules": [{"match": "*", "skipp": True}]}, "rules.0.skipp", "skip"),
        ({"scheme": {"weight": {"dtype": "int4"}}}, "scheme.weight", "weights"),
        ({"scheme": {"weights": {"dtype": "int4", "groupsize": 32}}}, "scheme.weights.groupsize", "group_size"),
        (
            {"rules": [{"match": "*", "scheme": {"weights": {"dtype": "int8", "symetric": True}}}]},
            "rules.0.scheme.weights.symetric",
            "symmetric",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(data: dict[str, Any], key: str, nearest: str) -> None:
    message = refusal({"scheme": "int4"} | data)
    assert message == f"recipe.yaml: unknown key {key!r}. Did you mean {nearest!r}?"


def test_an_unknown_key_that_is_near_nothing_lists_the_known_ones() -> None:
    assert "Known: scheme, algorithm, steps, blocks, format" in refusal({"zzz": 1})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"scheme": "int4x"}, "scheme: unknown scheme 'int4x'. Did you mean 'int4'?"),
        ({"rules": [{"match": "*", "scheme": "in8"}]}, "rules.0.scheme: unknown scheme 'in8'. Did you mean 'int8'?"),
        ({"rest": "fp8"}, "rest: "),
        ({"group_size": 0}, "group_size: "),
        ({"group_size": "many"}, "group_size: "),
        ({"max_shard_size": "huge"}, "max_shard_size: 'huge' is not a size such as 80MB"),
        ({"max_shard_size": 0}, "max_shard_size: "),
        ({"rules": [{"scheme": "int8"}]}, "rules.0.match: Field required"),
        ({"scheme": {"weights": {"dtype": "int3"}}}, "scheme.weights.dtype: "),
        ({"scheme": {"inputs": {"dtype": "int8"}}}, "scheme.weights: Field required"),
        ({"scheme": ["int4"]}, "scheme: "),
        ({"scheme": {"weights": {"dtype": "int4", "granularity": "group"}}}, "granularity group needs a group_size"),
        (
            {"scheme": {"weights": {"dtype": "int4", "group_size": 32}}},
            "group_size goes with granularity group",
        ),
        (
            {"scheme": {"weights": {"dtype": "nf4", "granularity": "block", "group_size": 32}}},
            "group_size goes with granularity group",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant(data: dict[str, Any], said: str) -> None:
    assert said in refusal(data)


#: A few hundred bytes that stand for a thousand million values.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("- int4\n", UsageError, "is not a mapping"),
        ("", UsageError, "is not a mapping"),
        ("scheme: [int4\n", UsageError, "is not valid YAML"),
        ("scheme: int4\nscheme: int8\n", UsageError, "key 'scheme' is given twice"),
        ("rules:\n- match: a\n  skip: true\n  match: b\n", UsageError, "key 'match' is given twice"),
        ("scheme: !!python/object:os.system {}\n", UsageError, "is not valid YAML"),
        ("? [a, b]\n: 1\n", UsageError, "is not valid YAML"),
        ("scheme: int4\n5: 1\n", UsageError, "5: Keys should be strings"),
        (ALIASES, UsageError, "stands for more than 1,000,000 values"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, error: type[QuantcliError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        load(tmp_path, text)
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00scheme")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(InputError, match="cannot be read"):
            load_recipe(path)


def test_flags_beat_the_recipe() -> None:
    recipe = Recipe(scheme="int4", group_size=64, rest="keep", skip=["a"], rules=[Rule(match="*", skip=True)])
    changed = recipe.with_flags(scheme="int8", rest="fp16", skip=["b"], format=None, algorithm="rtn", group_size=None)
    assert (changed.scheme, changed.rest, changed.skip, changed.algorithm) == ("int8", "fp16", ["b"], "rtn")
    assert (changed.group_size, changed.format, changed.rules) == (64, None, recipe.rules)


def test_without_flags_the_recipe_stays() -> None:
    recipe = Recipe(scheme="int4", skip=["a"])
    assert recipe.with_flags(scheme=None, skip=[], rest=None) == recipe


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(UsageError, match=r"rest: .*'auto', 'keep', 'fp16' or 'bf16'"):
        Recipe(scheme="int4").with_flags(rest="fp8")
