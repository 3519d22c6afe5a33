"""The recipes in configs/: each is valid, says when to use it, and does what its comments say."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.graphs import model, node, normal, prepared

from quantcli.checkpoint import open_checkpoint
from quantcli.onnx.plan.plan import GraphPlan
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.planning.recipe import build_scheme, load_recipe
from quantcli.planning.resolve import resolve

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_when_to_use_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.scheme is not None
    build_scheme(recipe.scheme)
    assert path.read_text().startswith("# ")


def test_the_cnn_recipe_makes_convolutions_static_and_can_leave_out_the_first(tmp_path: Path) -> None:
    proto = model(
        [
            node("Conv", ["x", "conv1.weight"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "conv2.weight"], ["y"]),
        ],
        {"x": [1, 4, 8, 8]},
        {"y": None},
        {"conv1.weight": normal(16, 4, 3, 3), "conv2.weight": normal(16, 16, 3, 3)},
    )
    text = (CONFIGS / "cnn-int8-static.yaml").read_text()
    recipe = tmp_path / "recipe.yaml"
    for content, modes in ((text, ["static", "static"]), (text.replace("# skip:", "skip:"), ["float", "static"])):
        recipe.write_text(content)
        plan = resolve_graph(load_recipe(recipe), prepared(proto), Path("model.onnx"))
        assert [each.mode for each in plan.nodes] == modes


def test_the_gptq_recipe_keeps_tables_in_eight_bits() -> None:
    proto = model(
        [
            node("Cast", ["x"], ["ids"], to=7),
            node("Gather", ["embeddings.word.weight", "ids"], ["a"]),
            node("MatMul", ["a", "layer.weight"], ["y"]),
        ],
        {"x": [1, 4]},
        {"y": None},
        {"embeddings.word.weight": normal(32, 64), "layer.weight": normal(64, 32)},
    )
    plan = resolve_graph(load_recipe(CONFIGS / "encoder-int4-gptq.yaml"), prepared(proto), Path("model.onnx"))
    table, layer = plan.nodes
    assert (table.label, table.algorithm) == ("int8", "rtn")
    assert (layer.label, layer.algorithm) == ("int4", "gptq")
    assert layer.scheme is not None and layer.scheme.weights.granularity.size == 32


def test_the_encoder_recipe_looks_tables_up_in_four_bits() -> None:
    proto = model(
        [
            node("Cast", ["x"], ["ids"], to=7),
            node("Gather", ["embeddings.word.weight", "ids"], ["a"]),
            node("MatMul", ["a", "layer.weight"], ["y"]),
        ],
        {"x": [1, 4]},
        {"y": None},
        {"embeddings.word.weight": normal(32, 64), "layer.weight": normal(64, 32)},
    )
    plan: GraphPlan = resolve_graph(
        load_recipe(CONFIGS / "encoder-int8-dynamic.yaml"), prepared(proto), Path("model.onnx")
    )
    assert [(each.mode, each.label) for each in plan.nodes] == [("weights", "int4"), ("dynamic", "int8-dynamic")]
    assert plan.nodes[0].scheme is not None
    assert plan.nodes[0].scheme.weights.granularity.size == 32


@pytest.mark.parametrize(
    ("recipe", "algorithm", "scheme"),
    [
        ("llm-int4-tuned", "gptq + tune", "int4, group 64"),
        ("llm-w8a8", "smoothquant + rtn", "int8, channel | inputs int8, token, dynamic"),
    ],
)
def test_recipes_for_language_models_chain_algorithms(models: Path, recipe: str, algorithm: str, scheme: str) -> None:
    checkpoint = open_checkpoint(models / "llama")
    plan = resolve(load_recipe(CONFIGS / f"{recipe}.yaml"), checkpoint.infos(), checkpoint.config, data=True)
    assert plan.algorithm == algorithm
    assert {str(layer.scheme) for layer in plan.quantized} == {scheme} and len(plan.quantized) == 14
