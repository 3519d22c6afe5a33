"""What transformers.js loads: names by scheme, its config.json, and refusals before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe, validate
from quantcli.planning.targets import completed, onnx_layout, onnxruntime_version, require_onnx

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}


def recipe(target: str = "transformers.js", **wishes: Any) -> Recipe:
    return validate({"target": target} | wishes, "test")


@pytest.mark.parametrize(
    ("wishes", "dtype", "file"),
    [
        ({"scheme": "int4"}, "q4", "model_q4.onnx"),
        ({"scheme": "int4", "rest": "fp16"}, "q4f16", "model_q4f16.onnx"),
        ({"scheme": "int8"}, "int8", "model_int8.onnx"),
        ({"scheme": "int8-dynamic"}, "q8", "model_quantized.onnx"),
        ({"scheme": "int8-static"}, "q8", "model_quantized.onnx"),
        ({"scheme": "fp16"}, "fp16", "model_fp16.onnx"),
        ({"scheme": "nf4"}, "bnb4", "model_bnb4.onnx"),
    ],
)
def test_a_file_is_named_by_its_scheme(wishes: dict[str, Any], dtype: str, file: str) -> None:
    layout = onnx_layout(recipe(**wishes), [])
    assert layout.file == f"onnx/{file}" and layout.data == f"{file}_data" and layout.config is not None
    own = {"model_type": "bert", "quantization_config": {}, "transformers.js_config": {"kv_cache_dtype": "float16"}}
    assert layout.config(own, False) == {"model_type": "bert", "transformers.js_config": {"dtype": dtype}}
    assert layout.config(own, True)["transformers.js_config"] == {
        "dtype": dtype,
        "use_external_data_format": {file: 1},
    }


def test_codes_that_are_kept_name_the_file_by_what_most_of_them_are() -> None:
    from quantcli.core.scheme import PRESETS

    planned = [(PRESETS["int8"], 10), (PRESETS["int4"], 30), (None, 100), (PRESETS["int8"], 15)]
    assert onnx_layout(recipe(), planned).file == "onnx/model_q4.onnx"


def test_what_goes_without_saying() -> None:
    whole = completed(recipe(scheme="int4"))
    assert (whole.format, whole.group_size) == ("onnx", 32)
    assert completed(recipe(scheme="int4", group_size=64)).group_size == 64
    assert completed(recipe(scheme="int8-dynamic")).group_size is None
    assert completed(recipe("onnxruntime", scheme="int4")).format is None


@pytest.mark.parametrize(
    ("config", "wishes", "output", "says"),
    [
        (BERT, {"scheme": "int4"}, "out.onnx", "loads a folder"),
        (None, {"scheme": "int4"}, "out", "config.json, and this one has none"),
        (BERT, {"scheme": "bf16"}, "out", "no name for files of bf16"),
        (BERT, {"scheme": "int4", "rest": "bf16"}, "out", "no bf16"),
        (BERT, {"scheme": "int4", "target": "transformers.js==2.17"}, "out", "releases before 3"),
        (LLAMA, {"scheme": "int4", "target": "transformers.js==3.8.1"}, "out", "releases before 4"),
        (
            {"model_type": "longformer", "architectures": ["LongformerForTokenClassification"]},
            {"scheme": "int4"}, "out", "no LongformerForTokenClassification",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            {"scheme": "int4"}, "out", "t5 in several files",
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": {}, "text_config": {}},
            {"scheme": "int4"}, "out", "clip in several files",
        ),
    ],
)  # fmt: skip
def test_refused_before_work(config: Any, wishes: dict[str, Any], output: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        require_onnx(recipe(**wishes), config, Path(output))


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"model_type": "bart", "architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True},
    ],
)
def test_not_refused(config: dict[str, Any]) -> None:
    require_onnx(recipe(scheme="int4", target="transformers.js==3.8"), config, Path("out"))


@pytest.mark.parametrize(
    ("target", "version"),
    [
        ("transformers.js==3", "1.19"),
        ("transformers.js==3.8.1", "1.21"),
        ("transformers.js==4.2", "1.24"),
        ("transformers.js==5", "1.30"),
        ("transformers.js", None),
        ("onnxruntime==1.22", "1.22"),
    ],
)
def test_a_release_runs_its_own_onnxruntime(target: str, version: str | None) -> None:
    assert onnxruntime_version(recipe(target)) == version
