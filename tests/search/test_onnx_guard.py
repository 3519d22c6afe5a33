"""`int8-static` finds the layers that fixed ranges ruin, and is not written where it is slower than the model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from support.fragile_nets import convolutions, products, samples, saved

import quantcli
from quantcli.conversion.onnx.comparison import Comparison, OutputComparison
from quantcli.conversion.onnx.guard import Attempt
from quantcli.conversion.onnx.pipeline import convert_onnx
from quantcli.data.request import DataRequest
from quantcli.errors import InputError
from quantcli.planning.recipe import Recipe, validate
from quantcli.search import onnx_guard
from quantcli.search.onnx_guard import StaticGuard


def converted(proto: onnx.ModelProto, folder: Path, **options: object) -> quantcli.reporting.report.Report:
    model, data = saved(proto, folder / "model.onnx"), samples(proto, folder / "data.npz", 16)
    return quantcli.convert(
        model, folder / "out.onnx", scheme="int8-static", data=data, allow_larger=True, force=True, **options
    )


@pytest.mark.parametrize(
    ("proto", "layers"),
    [
        (convolutions(6, fragile=2, outlier=300.0), {"conv2.weight", "conv3.weight"}),
        (products(6, fragile=2, outlier=100.0), {"product2.weight", "product3.weight"}),
    ],
)
def test_fragile_layers_are_found_and_protected(proto: onnx.ModelProto, layers: set[str], tmp_path: Path) -> None:
    report = converted(proto, tmp_path)
    found = report.details["protected"]
    assert set(found["layers"]) <= layers
    assert found["sqnr_db_before"] < 15
    assert report.models[1].metrics["output_sqnr_db"] >= 20
    assert any("ruin" in warning and found["layers"][0] in warning for warning in report.warnings)
    # Without being looked after, the same conversion is as bad as it was.
    plain = convert_onnx(
        tmp_path / "model.onnx", tmp_path / "plain.onnx", Recipe(scheme="int8-static"),
        DataRequest(str(tmp_path / "data.npz")), None, allow_larger=True,
    )  # fmt: skip
    assert plain.models[1].metrics["output_sqnr_db"] == pytest.approx(found["sqnr_db_before"])


def test_the_recipe_of_the_manifest_gives_the_same_bytes(tmp_path: Path) -> None:
    converted(products(6, fragile=2, outlier=100.0), tmp_path)
    stored = onnx.load(tmp_path / "out.onnx")
    manifest = json.loads(next(each.value for each in stored.metadata_props if each.key == "quantcli"))
    recipe = validate({key: value for key, value in manifest["recipe"].items() if value}, "manifest")
    assert recipe.rules
    data = tmp_path / "data.npz"
    quantcli.convert(tmp_path / "model.onnx", tmp_path / "again.onnx", recipe=recipe, data=data, allow_larger=True)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_good_outputs_are_left_alone(tmp_path: Path) -> None:
    report = converted(convolutions(3), tmp_path)
    assert "protected" not in report.details


def attempt(model: Path, artifact: Path, data: Path, folder: Path) -> Attempt:
    import numpy as np

    feeds = [({"x": np.load(data)["x"][:1]}, 1)]
    outputs = OutputComparison(model, lambda: feeds, folder)
    return Attempt(
        Recipe(scheme="int8-static"), model, SimpleNamespace(), SimpleNamespace(), outputs,
        Comparison(8, 30.0, speed=0.5), artifact,
    )  # type: ignore[arg-type]  # fmt: skip


def test_an_artifact_slower_than_its_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_guard, "_LEAST_MS", 0.0)
    fast, slow = saved(convolutions(2), tmp_path / "fast.onnx"), saved(convolutions(24), tmp_path / "slow.onnx")
    data = samples(convolutions(2), tmp_path / "data.npz", 1)
    with pytest.raises(InputError, match="slower than its model") as raised:
        StaticGuard().require_speed(attempt(fast, slow, data, tmp_path))
    assert "--force" in str(raised.value.hint)
    StaticGuard().require_speed(attempt(slow, fast, data, tmp_path))
    monkeypatch.setattr(onnx_guard, "_LEAST_MS", 1e9)
    StaticGuard().require_speed(attempt(fast, slow, data, tmp_path))
