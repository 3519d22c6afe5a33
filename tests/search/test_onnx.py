"""Budgets on graphs: what is found keeps them, nothing better is found by trying all, and little is done twice."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import onnx
import pytest
from support.fragile_nets import convolutions, products, samples, saved
from support.graphs import model as graph_of
from support.graphs import node, normal

import quantcli
from quantcli.cli.app import main
from quantcli.errors import BudgetError
from quantcli.models.runner import OnnxRunner
from quantcli.planning.recipe import Recipe
from quantcli.search import onnx_trials, onnx_work
from quantcli.search.budget import Budget
from quantcli.search.choices import Group, total
from quantcli.search.clock import Clock
from quantcli.search.onnx import OnnxSearch
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_mixes import Mixes
from quantcli.search.onnx_runs import GraphRuns
from quantcli.search.onnx_searches import GraphSearches
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import Stopwatch
from quantcli.search.sensitivity_file import SensitivityStore


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network with a fragile layer, samples to calibrate on, and others to judge by."""
    folder, proto = tmp_path_factory.mktemp("net"), convolutions(6, fragile=2, outlier=300.0)
    data, held_out = samples(proto, folder / "data.npz", 16), samples(proto, folder / "held_out.npz", 320, seed=1)
    return saved(proto, folder / "net.onnx"), data, held_out


def subject(model: Path, folder: Path, budget: Budget, data: Path | None = None) -> GraphSubject:
    from quantcli.data.request import DataRequest

    recipe = Recipe(group_size=16)
    request = None if data is None else DataRequest(str(data))
    folder.mkdir(exist_ok=True)
    return GraphSubject(
        str(model), folder / "out.onnx", recipe, request, None, None, budget.allow, budget.eval_data, None, folder
    )


def test_a_limit_on_the_loss_is_kept_and_the_recipe_gives_the_same_bytes(net, tmp_path: Path) -> None:
    model, data, held_out = net
    output = tmp_path / "out.onnx"
    budget = Budget(max_drop=0.01, eval_data=str(held_out), allow=("float", "int8-static"))
    report = quantcli.convert(model, output, data=data, budget=budget)
    assert report.passed
    schemes = {row.name: row.scheme for row in report.layers if row.name.endswith("weight")}
    assert "int8-static" in schemes.values()
    chosen = report.details["budget"]["chosen"]
    assert chosen["held_out_bound"]["argmax_agreement"] <= 0.01
    again = tmp_path / "again.onnx"
    quantcli.convert(model, again, data=data, recipe=tmp_path / "out.onnx.recipe.yaml")
    assert again.read_bytes() == output.read_bytes()


def test_a_fragile_layer_stays_as_it_is(net, tmp_path: Path) -> None:
    model, data, held_out = net
    file, schemes = tmp_path / "kept.json", ("float", "int8-static")
    budget = Budget(max_size=30_000, eval_data=str(held_out), allow=schemes, sensitivity=file)
    report = quantcli.convert(model, tmp_path / "out.onnx", data=data, budget=budget)
    # It is found by estimates already; measured mixes would show it, too, of a graph with so few layers.
    costs = {name: each["int8-static"] for name, each in json.loads(file.read_text())["costs"].items()}
    *others, making, reading = sorted(costs, key=lambda name: costs[name])
    assert (making, reading) == ("conv2.weight", "conv3.weight")
    assert costs[making] > 1000 * costs[others[-1]]
    schemes = {row.name: row.scheme for row in report.layers if row.name.startswith("conv") and "weight" in row.name}
    # What reads the outliers is ruined, whatever becomes of the layer that makes them.
    assert schemes["conv3.weight"] is None
    assert "int8-static" in schemes.values()
    assert (tmp_path / "out.onnx").stat().st_size <= 30_000
    assert report.details["budget"]["chosen"]["held_out"]["argmax_agreement"] < 0.01


def test_what_cannot_be_met_names_what_can(net, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, _ = net
    command = ["convert", str(model), "-o", str(tmp_path / "out.onnx"), "--max-size"]
    assert main([*command, "5kB"]) == 1
    assert not (tmp_path / "out.onnx").exists()
    told = capsys.readouterr()
    nearest = (told.out + told.err).split("--max-size ")[-1].split()[0].rstrip(".")
    assert main([*command, nearest]) == 0
    assert (tmp_path / "out.onnx").stat().st_size <= int(nearest)


def test_too_few_samples_are_an_answer(net, tmp_path: Path) -> None:
    model, data, _ = net
    report = quantcli.convert(model, tmp_path / "out.onnx", data=data, budget=Budget(max_drop=0.01))
    assert not report.passed
    assert not (tmp_path / "out.onnx").exists()
    assert "8 samples are too few" in report.warnings[0]
    assert "About 300 samples would do" in report.warnings[0]


def test_a_second_budget_takes_a_tenth_of_the_time(net, tmp_path: Path) -> None:
    model, data, held_out = net
    file, taken = tmp_path / "sensitivity.json", []
    for number, limit in enumerate((0.01, 0.015)):
        budget = Budget(
            max_drop=limit, eval_data=str(held_out), sensitivity=file, allow=("float", "int8-static", "int8-dynamic")
        )
        started = time.monotonic()
        GraphSearches(subject(model, tmp_path / str(number), budget, data)).search(budget)
        taken.append(time.monotonic() - started)
    assert taken[1] <= taken[0] / 10


def test_what_was_judged_is_not_judged_again_when_it_is_published(
    net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, held_out = net
    opened: list[bytes] = []

    def runner(path: Path) -> OnnxRunner:
        opened.append(path.read_bytes())
        return OnnxRunner(path)

    monkeypatch.setattr(onnx_trials, "OnnxRunner", runner)
    budget = Budget(max_drop=0.02, eval_data=str(held_out), allow=("float", "int8-dynamic"))
    report = quantcli.convert(model, tmp_path / "out.onnx", data=data, budget=budget)
    assert report.passed
    assert (tmp_path / "out.onnx").read_bytes() in opened
    assert len(opened) == len(set(opened))


def simple(tmp_path: Path, budget: Budget) -> OnnxSearch:
    """A search on a few products, without data."""
    one = subject(saved(products(4), tmp_path / "products.onnx"), tmp_path, budget)
    store = SensitivityStore(None, {})
    return OnnxSearch(one, budget, store, Measurements(one, store), clock=Clock(budget.search_seconds))


def float_products(artifact: Path) -> int:
    return sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load(artifact).graph.node)


def test_a_ceiling_on_latency_is_kept_or_the_fastest_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A product takes 1 ms, and a quantized one nothing: what a clock says changes from run to run.
    monkeypatch.setattr(Stopwatch, "p50_ms", lambda _, artifact: 0.5 + float_products(artifact))
    schemes = ("float", "int8-dynamic")
    found = simple(tmp_path, Budget(max_size=1 << 30, max_latency_p50=2.6, allow=schemes)).run()
    assert found.details["chosen"]["latency_ms_p50"] <= 2.6
    with pytest.raises(BudgetError, match=r"cannot be met: the fastest found takes 0\.5 ms") as raised:
        simple(tmp_path, Budget(max_size=1 << 30, max_latency_p50=0.1, allow=schemes)).run()
    assert raised.value.details["nearest"] == {"max_latency_p50": 0.55}


def test_a_ceiling_on_latency_that_is_far_out_of_reach_takes_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("searched")

    monkeypatch.setattr(Stopwatch, "p50_ms", lambda _, artifact: 3.0)
    monkeypatch.setattr(Stopwatch, "glance_ms", lambda _, artifact: 3.0)
    monkeypatch.setattr(GraphRuns, "noise_of_layers", never)
    budget = Budget(max_latency_p50=0.7, allow=("float", "int8-dynamic"))
    with pytest.raises(BudgetError, match="the fastest found takes 3 ms"):
        simple(tmp_path, budget).run()
    with pytest.raises(AssertionError, match="searched"):
        simple(tmp_path, replace(budget, max_latency_p50=0.8)).run()


@pytest.mark.parametrize("most", [1, 3])
def test_a_mix_that_is_slower_than_a_single_scheme_has_to_be_much_smaller(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many products may have 4 bits, which takes more time than 8 do where finding ranges takes none.
    monkeypatch.setattr(onnx_work, "_FIND_RANGE", 0.0)
    search = simple(tmp_path, Budget(max_drop=0.1, allow=("float", "int8-dynamic", "int4")))

    def four_bits(recipe: Recipe) -> int:
        file = search.subject.trials.of(recipe).path
        return sum(each.op_type == "MatMulNBits" for each in onnx.load(file).graph.node)

    monkeypatch.setattr(Measurements, "keeps", lambda *given: four_bits(given[2]) <= most)
    monkeypatch.setattr(Measurements, "used", lambda *_: 0.0)
    monkeypatch.setattr(Measurements, "is_used_up", lambda *_: False)
    found = search._for_outputs()
    single = next(recipe for recipe in search._converted_uniforms() if recipe.scheme == "int8-dynamic")
    if most == 1:
        assert found == single
    else:
        assert four_bits(found) == most
        assert search.measured.size(found) <= 0.9 * search.measured.size(single)


def test_a_search_ends_with_what_it_has_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    monkeypatch.setattr(GraphRuns, "noise", lambda _, recipe: runs.append(recipe) or 1.0)
    budget = Budget(max_size=12_000, search_seconds=1e-9, allow=("float", "int8-dynamic", "int4"))
    found = simple(tmp_path, budget).run()
    assert found.details["chosen"]["size_bytes"] <= 12_000
    assert len(runs) <= 1
    assert simple(tmp_path, replace(budget, search_seconds=None)).run()
    assert len(runs) > 5


def test_a_repeated_search_has_what_is_left_of_the_time(tmp_path: Path) -> None:
    budget = Budget(max_size=1 << 30, search_seconds=600.0, allow=("float", "int8-dynamic"))
    searches = GraphSearches(subject(saved(products(2), tmp_path / "products.onnx"), tmp_path, budget))
    searches.search(budget)
    clock = searches._clock
    searches.search(budget)
    assert searches._clock is clock


def test_the_frontier_of_a_graph_has_times(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, file = saved(products(3), tmp_path / "products.onnx"), tmp_path / "frontier.json"
    command = ["convert", str(model), "-o", str(tmp_path / "out.onnx"), "--max-size", "1MB", "--dry-run"]
    assert main([*command, "--allow", "float,int8-dynamic", "--pareto", str(file)]) == 0
    points = json.loads(file.read_text())["frontier"]
    assert len(points) > 1
    assert [point["size_bytes"] for point in points] == sorted(point["size_bytes"] for point in points)
    assert all(point["latency_ms_p50"] > 0 for point in points)
    assert "Time (ms)" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".svg").exists()
    assert not (tmp_path / "out.onnx").exists()


def test_the_work_of_a_layer_is_that_of_the_float_model(net, tmp_path: Path) -> None:
    model, data, _ = net
    budget = Budget(max_size=1, allow=("float", "int8-static"))
    layers = subject(model, tmp_path / "work", budget, data).ways.layers
    # Each value of a convolution's weight is multiplied once at every place of its output.
    assert all(layer.work > 16 * layer.nbytes / 4 for name, layer in layers.items() if name.startswith("conv"))


#: Estimates that are far from what is measured: by layer and way to store it, what its cost is multiplied by; and
#: shares of the room between the smallest mix and the largest.
RIGHT: dict[tuple[str, str], float] = {}
CHEAP, DEAR = {("product2.weight", "int4 group 16"): 1e-3}, {("product0.weight", "int8-dynamic"): 1e4}


def test_nothing_better_is_found_by_trying_all(tmp_path: Path) -> None:
    """Where estimates are wrong, too: the neighbours of the best by estimate are measured as well."""
    model = saved(products(4, fragile=1, outlier=30.0), tmp_path / "products.onnx")
    budget = Budget(max_size=1, allow=("float", "int8-dynamic", "int4"))
    one = subject(model, tmp_path, budget)
    store = SensitivityStore(None, {})
    search = OnnxSearch(one, budget, store, Measurements(one, store))
    mixes = search.mixes
    every = list(product(*(range(len(group.choices)) for group in mixes.groups)))[:-1]
    assert 80 <= len(every) <= 1000
    noise = {mix: search.measured.noise(mixes.recipe_of(mix)) for mix in every if mix not in mixes.nothing}
    sizes = {mix: total(mixes.groups, mix, "nbytes") for mix in noise}
    for wrong, shares in ((RIGHT, (0.2, 0.5, 0.8)), (CHEAP, (0.15, 0.25)), (DEAR, (0.5, 0.6))):
        told = [
            Group(group.layers, tuple(
                replace(choice, cost=choice.cost * wrong.get((group.layers[0], choice.label), 1.0))
                for choice in group.choices
            ))
            for group in mixes.groups
        ]  # fmt: skip
        search.__dict__["mixes"] = Mixes(mixes.ways, told)
        for share in shares:
            limit = min(sizes.values()) + share * (max(sizes.values()) - min(sizes.values()))
            found = search._least_noise({"nbytes": limit})
            assert found is not None
            best = min(value for mix, value in noise.items() if sizes[mix] <= limit)
            assert search.measured.noise(found) == best, (wrong, share)


def test_a_single_scheme_is_told_by_what_becomes_of_each_layer(net, tmp_path: Path) -> None:
    model, data, _ = net
    ways = subject(model, tmp_path / "told", Budget(max_size=1, allow=("float", "int8-dynamic", "int4")), data).ways
    # Convolutions get 8 bits, whatever is asked for; a head of so few weights stays as it is.
    assert ways.labels_of("int4 group 16") == ways.labels_of("int8-dynamic") == {"int8-dynamic": 6}


def test_work_is_what_kernels_take(tmp_path: Path) -> None:
    wide, narrow, each = (64, 64, 1, 1), (4, 4, 1, 1), (64, 1, 3, 3)
    nodes, held, x = [], {}, "x"
    for name, shape in (("wide", wide), ("each", each), ("first", (4, 64, 1, 1)), ("narrow", narrow)):
        held[name] = normal(*shape, seed=len(nodes))
        group, pads = (64, [1, 1, 1, 1]) if name == "each" else (1, [0, 0, 0, 0])
        nodes.append(node("Conv", [x, name], [f"y_{name}"], name=name, group=group, pads=pads))
        x = f"y_{name}"
    proto = graph_of(nodes, {"x": ["n", 64, 16, 16]}, {x: ["n", 4, 16, 16]}, held)
    data = samples(proto, tmp_path / "data.npz", 4)
    budget = Budget(max_size=1, allow=("float", "int8-static"))
    layers = subject(saved(proto, tmp_path / "net.onnx"), tmp_path / "work", budget, data).ways.layers
    factor = {name: layer.ways["int8-static"].factor for name, layer in layers.items()}
    # Many products for each value that is quantized make up for that; few do not, nor does one channel by itself.
    assert factor["wide"] < 0.7 < 1 < factor["narrow"]
    assert factor["each"] > 1


def test_a_budget_whose_answer_is_known_runs_no_model(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, held_out = net
    schemes = ("float", "int8-dynamic")
    budget = Budget(max_drop=0.02, eval_data=str(held_out), sensitivity=tmp_path / "kept.json", allow=schemes)
    first = quantcli.convert(model, tmp_path / "first.onnx", data=data, budget=budget)

    def never(*_: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(onnx_trials.OnnxRunner, "run", never)
    monkeypatch.setattr(GraphRuns, "noise", never)
    again = quantcli.convert(model, tmp_path / "again.onnx", data=data, budget=replace(budget, max_drop=0.021))
    # The verdict on the same bytes holds, under whatever name they are published.
    assert again.passed and again.gates[0].value == first.gates[0].value
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()
