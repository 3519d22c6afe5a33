"""`convert --target transformers.js`: what is written, that every command takes it again, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.decoders import configured_decoder, tiny_decoder
from support.tokenizers import save_tokenizer

from quantcli.cli.app import main
from quantcli.commands.convert import convert
from quantcli.commands.convert_decoder import Way, way_to_onnx
from quantcli.errors import InputError, UsageError
from quantcli.models.source import open_model
from quantcli.onnx.graph.model import is_onnx, onnx_file
from quantcli.planning.recipe import Recipe
from quantcli.planning.targets import completed, onnx_layout
from quantcli.search.budget import Budget

TARGET = "transformers.js"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    return found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder("llama", tmp_path_factory.mktemp("tiny") / "llama")


def test_a_language_model_is_a_decoder_with_its_weights_beside_it(decoder: Path, tmp_path: Path) -> None:
    report = convert(decoder, tmp_path / "out", scheme="int4", target=TARGET)
    written = files(tmp_path / "out")
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < written
    assert {name for name in written if "/" in name} == {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}
    assert "genai_config.json" not in written
    assert settings(tmp_path / "out") == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
    graph = onnx.load(tmp_path / "out" / "onnx" / "model_q4.onnx").graph
    assert {value.name for value in graph.input} >= {"input_ids", "attention_mask", "past_key_values.0.key"}
    blocks = {a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"}
    assert 4 in blocks
    assert report.models[-1].size_bytes == sum(file.stat().st_size for file in (tmp_path / "out" / "onnx").iterdir())
    assert not [warning for warning in report.warnings if "tokenizer" in warning]


@pytest.mark.parametrize(
    ("wishes", "file"), [({"scheme": "int4", "rest": "fp16"}, "model_q4f16"), ({"scheme": "fp16"}, "model_fp16")]
)
def test_half_precision_is_stored_and_float32_goes_in_and_out(
    decoder: Path, tmp_path: Path, wishes: dict[str, str], file: str
) -> None:
    convert(decoder, tmp_path / "out", target=TARGET, **wishes)  # type: ignore[arg-type]
    graph = onnx.load(tmp_path / "out" / "onnx" / f"{file}.onnx", load_external_data=False).graph
    dtypes = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert dtypes == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize("scheme", ["int8-dynamic", "nf4", "bf16"])
def test_a_scheme_that_decoders_have_not_is_refused(decoder: Path, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match=f"--target {TARGET}"):
        convert(decoder, tmp_path / "out", scheme=scheme, target=TARGET)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("model_type", "target", "reason"),
    [
        ("mamba", TARGET, "mamba remembers a state of its own kind"),
        ("nemotron", TARGET, "transformers.js has no class for nemotron"),
        ("stablelm", f"{TARGET}==4.1", "releases before 4.2 do not read the sizes of the cache of stablelm"),
    ],
)
def test_a_language_model_that_it_would_not_generate_with_is_refused_by_name(
    tmp_path: Path, model_type: str, target: str, reason: str
) -> None:
    folder = configured_decoder(model_type, tmp_path / "model")
    with pytest.raises(InputError, match=reason) as refusal:
        convert(folder, tmp_path / "out", scheme="int4", target=target)
    assert refusal.value.hint
    assert not (tmp_path / "out").exists()


def test_a_language_model_with_an_exported_decoder_is_taken(tmp_path: Path) -> None:
    folder = configured_decoder("stablelm", tmp_path / "model")
    wishes = completed(Recipe(scheme="int4", target=TARGET))
    assert way_to_onnx(folder, tmp_path / "out", wishes, None, None) is Way.EXPORTED


def test_keys_and_values_are_never_said_to_be_one_tensor(tmp_path: Path) -> None:
    layout = onnx_layout(completed(Recipe(scheme="int4", target=TARGET)), [])
    assert layout.config is not None
    assert layout.config({"model_type": "falcon", "multi_query": True}, False)["multi_query"] is False
    assert "multi_query" not in layout.config({"model_type": "llama"}, False)


def test_a_budget_and_another_format_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="files of one"):
        convert(models / "bert", tmp_path / "out", target=TARGET, budget=Budget(max_size=10**6))
    with pytest.raises(UsageError, match="loads ONNX, not gptq"):
        convert(models / "bert", tmp_path / "out", scheme="int4", format="gptq", target=TARGET)


def test_an_encoder_that_is_refused_costs_no_export(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="t5 in several files"):
        convert(models / "t5", tmp_path / "out", scheme="int4", target=TARGET)


def test_what_was_written_is_a_graph_that_every_command_takes_again(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(decoder, tmp_path / "out", scheme="int8", target=TARGET)
    source = open_model(tmp_path / "out")
    assert source.kind == "onnx" and source.scheme == "int8"
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j\n" * 8)
    arguments = ["eval", str(decoder), str(tmp_path / "out"), "--data", str(text), "--seq-len", "8", "--json"]
    assert main(arguments) == 0
    metrics = json.loads(capsys.readouterr().out)["models"][1]["metrics"]
    assert metrics["perplexity"] > 1 and metrics["kl_nats"] < 0.1
    with pytest.raises(InputError, match="already quantized"):
        convert(tmp_path / "out", tmp_path / "again", scheme="int4", target=TARGET)


def test_a_folder_of_several_graphs_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_q4.onnx").touch()
    assert is_onnx(tmp_path) and onnx_file(tmp_path).name == "model_q4.onnx"
    (tmp_path / "onnx" / "model_fp16.onnx").touch()
    assert not is_onnx(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert is_onnx(tmp_path) and onnx_file(tmp_path) == tmp_path / "model.onnx"


@pytest.mark.slow
def test_an_encoder_is_one_file_that_every_command_takes_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(models / "bert", tmp_path / "bert")
    report = convert(folder, tmp_path / "bare", scheme="int8-dynamic", target=TARGET, allow_larger=True)
    assert [warning for warning in report.warnings if "has no tokenizer.json" in warning]
    save_tokenizer(folder)
    report = convert(folder, tmp_path / "out", scheme="int4", target=TARGET, allow_larger=True)
    assert not [warning for warning in report.warnings if "tokenizer" in warning]
    written = files(tmp_path / "out")
    assert {name for name in written if "/" in name} == {"onnx/model_q4.onnx"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < written
    assert settings(tmp_path / "out") == {"dtype": "q4"}
    graph = onnx.load(tmp_path / "out" / "onnx" / "model_q4.onnx").graph
    blocks = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute
              if a.name == "block_size"]  # fmt: skip
    assert blocks and set(blocks) == {32}
    source = open_model(tmp_path / "out")
    assert source.kind == "onnx" and source.scheme == "int4"
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("a b c\n" * 8)
    assert main(["eval", str(folder), str(tmp_path / "out"), "--data", str(text), "--json"]) == 0
    capsys.readouterr()
