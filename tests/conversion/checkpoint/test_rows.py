"""How the report of a conversion counts the tokens of experts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from support.plans import plan_of

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.conversion.checkpoint.layout import plan_layout
from quantcli.conversion.checkpoint.rows import conversion_report, reference_row
from quantcli.conversion.checkpoint.writer import LayerResult
from quantcli.core.tensors import Rounding
from quantcli.reporting.report import Report
from quantcli.reporting.tables.convert import convert_tables

LAYERS = {
    f"model.layers.0.mlp.experts.{expert}.{leaf}.weight": (64, 64) for expert in range(3) for leaf in ("up", "down")
}
DETAILS = {"runtime": {"run": "none", "summary": "nothing is run", "warn": False}}


def test_the_report_counts_the_tokens_of_each_expert(tmp_path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in LAYERS.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    plan = plan_of(list(checkpoint.infos()), group_size=32)
    tokens = {name: (0, 64, 900)[int(name.split(".")[5])] for name in LAYERS}
    results = {name: LayerResult([], rounding=Rounding("gptq", tokens=count)) for name, count in tokens.items()}
    layout = plan_layout(plan, checkpoint, tmp_path / "out")

    def report_of(results: dict[str, LayerResult]) -> Report:
        reference = reference_row(checkpoint)
        return conversion_report(checkpoint, reference, tmp_path / "out", plan, layout, results, dict(DETAILS))

    report = report_of(results)
    assert report.details["experts"] == {"count": 3, "tokens": {"min": 0, "median": 64, "max": 900}, "under_fed": 1}
    assert {row.name: row.details["tokens"] for row in report.layers if "tokens" in row.details} == tokens
    assert any(warning.startswith("1 of 3 experts were given fewer tokens") for warning in report.warnings)
    said = dict(row for table in convert_tables(report) if table.title.startswith("Total") for row in table.rows)
    assert said["Experts"] == "3 were given 0 to 900 tokens, median 64; 1 fewer than they have inputs"
    starved = results | {
        name: LayerResult([], rounding=Rounding("gptq", tokens=63)) for name, count in tokens.items() if count == 64
    }
    fewer = report_of(starved)
    assert fewer.details["experts"]["under_fed"] == 2
    plain = {name: LayerResult([], rounding=Rounding("mse")) for name in LAYERS}
    assert "experts" not in report_of(plain).details
