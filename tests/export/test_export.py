"""Export from torch: free dimensions, equal outputs, equal bytes, names of modules, and clear refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from quantcli.data.request import DataRequest
from quantcli.errors import InputError
from quantcli.export import export, source
from quantcli.export.export import export_to_onnx
from quantcli.export.hugging_face import hugging_face_source
from quantcli.models.session import Session

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 10)
        self.norm = nn.BatchNorm2d(4)
    def forward(self, image):
        return self.last(torch.relu(self.norm(self.first(image))).mean((2, 3)))

class Two(nn.Module):
    def forward(self, left, right_ids):
        return {"sum": left + right_ids.sum(), "count": right_ids.sum(0)}

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(20, 16), nn.Linear(16, 24)
    def forward(self, x, keep):
        return self.last(self.table(x)) * keep

class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(6, 5, 4)
    def forward(self, x, y):
        return self.both(x, y)

class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Fixed(nn.Module):
    def forward(self, x):
        return x + torch.arange(12.0).reshape(2, 6)

def net():
    torch.manual_seed(0)
    return Net()
net.example_inputs = (torch.zeros(1, 1, 8, 8),)

def lightning():
    module = net()
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    return module

def silent():
    return Net()

def wrong():
    return Net()
wrong.example_inputs = {"picture": torch.zeros(1, 1, 8, 8)}

def reads():
    return Reads()

def half():
    return nn.Linear(16, 24).half()

def double():
    return nn.Linear(16, 24).double()

def pairs():
    return Pairs()

def decides():
    return Decides()
decides.example_inputs = lambda: torch.ones(2, 3)

def fixed():
    return Fixed()
fixed.example_inputs = (torch.ones(2, 6),)

def two():
    return Two()
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module of functions in the current folder."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(batch * length).integers(3, 90, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs", "output"),
    [
        ("bert", ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"),
        ("llama", ["input_ids", "attention_mask"], "logits"),
        ("gpt2", ["input_ids", "attention_mask"], "logits"),
        ("tied", ["input_ids", "attention_mask"], "logits"),
    ],
)
def test_language_models(models: Path, tmp_path: Path, name: str, inputs: list[str], output: str) -> None:
    done = export_to_onnx(models / name, tmp_path)
    assert done.path == tmp_path / "model.onnx" and done.warnings == []
    assert done.outputs_sqnr_db is None or done.outputs_sqnr_db > 100
    session = Session(done.path, threads=1)
    assert [port.name for port in session.inputs] == inputs
    assert [port.shape for port in session.inputs] == [("batch", "sequence")] * len(inputs)
    assert [port.name for port in session.outputs] == [output]
    loader = tf.AutoModel if name == "bert" else tf.AutoModelForCausalLM
    model = loader.from_pretrained(models / name).eval()
    for shape in ((1, 1), (1, 33), (5, 9)):
        feeds = {key: value for key, value in tokens(*shape).items() if key in inputs}
        with torch.no_grad():
            expected = model(**{key: torch.from_numpy(value) for key, value in feeds.items()})[output].numpy()
        # A token that attends to nothing has no meaning, in torch either.
        if shape != (1, 1):
            np.testing.assert_allclose(session.run(feeds)[output], expected, atol=1e-4)


@pytest.mark.slow
def test_layers_keep_their_modules_names_and_equal_work_gives_equal_bytes(models: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        export_to_onnx(models / "bert", folder)
    first, second = ((folder / "model.onnx").read_bytes() for folder in folders)
    assert first == second
    for forbidden in (str(tmp_path), str(Path(torch.__file__).parent), "pkg.torch", "+cpu", "+cu", ".py"):
        assert forbidden.encode() not in first, forbidden
    graph = ir.load(folders[0] / "model.onnx").graph
    checkpoint = tf.AutoModel.from_pretrained(models / "bert").state_dict()
    matrices = {key: value for key, value in checkpoint.items() if value.dim() == 2 and "pooler" not in key}
    assert matrices.keys() <= graph.initializers.keys()
    for key, value in matrices.items():
        exported = graph.initializers[key].const_value.numpy()
        if "embeddings" not in key:
            exported = exported.T
        np.testing.assert_array_equal(exported, value.numpy())
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    query = [name for name in names if name.startswith("encoder.layer.1.attention.self.query/MatMul")]
    assert len(query) == 1


@pytest.mark.slow
def test_classifiers_have_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_labels": 3}
    text = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32))
    image = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8))
    for name, model, free in (("text", text, ("batch", "sequence")), ("image", image, ("batch", 3, 16, 16))):
        model.save_pretrained(tmp_path / name)
        session = Session(export_to_onnx(tmp_path / name, tmp_path / name).path, threads=1)
        assert session.inputs[0].shape == free
        assert [(port.name, port.shape) for port in session.outputs] == [("logits", ("batch", 3))]
    pixels = np.random.default_rng(0).standard_normal((5, 3, 16, 16), np.float32)
    with torch.no_grad():
        expected = image.eval()(torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(session.run({"pixel_values": pixels})["logits"], expected, atol=1e-5)


@pytest.mark.parametrize("function", ["net", "lightning"])
def test_functions(code: str, tmp_path: Path, function: str, capfd: pytest.CaptureFixture[str]) -> None:
    done = export_to_onnx(f"{code}:{function}", tmp_path)
    assert capfd.readouterr() == ("", "")
    # The example is all zeros, of which a comparison would tell nothing.
    assert done.outputs_sqnr_db is not None and done.outputs_sqnr_db > 100
    session = Session(done.path, threads=1)
    assert [(port.name, port.shape) for port in session.inputs] == [("image", ("batch", 1, 8, 8))]
    assert [(port.name, port.shape) for port in session.outputs] == [("output_0", ("batch", 10))]
    images = np.random.default_rng(0).standard_normal((7, 1, 8, 8), np.float32)
    with torch.no_grad():
        expected = sys.modules[code].net().eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run({"image": images})["output_0"], expected, atol=1e-5)
    names = [node.name for node in ir.load(done.path).graph]
    assert {"first", "last"} <= {name.split("/")[0] for name in names}


def test_data_gives_inputs_and_free_axes(code: str, tmp_path: Path) -> None:
    data = [{"image": np.ones((1, 1, 8, width), np.float64)} for width in (8, 12)]
    session = Session(export_to_onnx(f"{code}:silent", tmp_path, data=data).path, threads=1)
    assert session.inputs[0].shape == ("batch", 1, 8, "image_3")
    assert session.run({"image": np.zeros((2, 1, 8, 31), np.float32)})["output_0"].shape == (2, 10)


@pytest.mark.parametrize(
    "function, arrays",
    [
        ("reads", {"x": np.arange(12).reshape(4, 3), "keep": np.ones((4, 3, 24), bool)}),
        ("half", {"input": np.ones((4, 16), np.float32)}),
        ("double", {"input": np.ones((4, 16), np.float32)}),
    ],
)
def test_data_tells_what_a_signature_does_not(
    code: str, tmp_path: Path, function: str, arrays: dict[str, np.ndarray]
) -> None:
    """Integers and booleans stay; floats become what the module computes in."""
    np.savez(tmp_path / "data.npz", **arrays)
    exported = export_to_onnx(f"{code}:{function}", tmp_path / "out", data=DataRequest(str(tmp_path / "data.npz")))
    computed = {"half": "float16", "double": "float64"}.get(function)
    wanted = {name: np.dtype(computed or value.dtype) for name, value in arrays.items()}
    assert {port.name: port.dtype for port in Session(exported.path).inputs} == wanted


def test_tensors_whose_text_cannot_be_changed(code: str, tmp_path: Path) -> None:
    """Products of two inputs become an Einsum of a tensor that the exporter read from a protobuf."""
    arrays = {"x": np.ones((3, 6), np.float32), "y": np.ones((3, 5), np.float32)}
    exported = export_to_onnx(f"{code}:pairs", tmp_path / "out", data=[arrays])
    assert not any(value.const_value.doc_string for value in ir.load(exported.path).graph.initializers.values())


def test_data_from_a_path(code: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=np.ones((3, 1, 8, 8), np.float32))
    session = Session(
        export_to_onnx(f"{code}:silent", tmp_path / "new" / "folder", data=DataRequest("data.npz")).path, threads=1
    )
    assert session.inputs[0].shape == ("batch", 1, 8, 8)


def test_outputs_by_key_and_inputs_without_a_batch(code: str, tmp_path: Path) -> None:
    data = [{"left": np.ones((1, 3), np.float32), "right_ids": np.arange(8).reshape(4, 2)}]
    session = Session(export_to_onnx(f"{code}:two", tmp_path, data=data).path, threads=1)
    assert [port.shape for port in session.inputs] == [("batch", 3), (4, 2)]
    found = session.run({"left": np.zeros((5, 3), np.float32), "right_ids": np.ones((4, 2), np.int64)})
    assert found["sum"].shape == (5, 3) and found["count"].tolist() == [4, 4]
    assert found["sum"].max() == 8


def test_a_module_with_a_fixed_batch_is_exported_with_it_and_says_so(code: str, tmp_path: Path) -> None:
    done = export_to_onnx(f"{code}:fixed", tmp_path)
    assert Session(done.path, threads=1).inputs[0].shape == (2, 6)
    assert len(done.warnings) == 1 and "fixed at the example's" in done.warnings[0]


@pytest.mark.parametrize("free", [True, False])
def test_exported_programs(code: str, tmp_path: Path, free: bool) -> None:
    from quantcli.system.user_functions import load_function

    net = load_function(f"{code}:net")().eval()
    shapes = {"image": {0: torch.export.Dim("batch")}} if free else None
    torch.export.save(torch.export.export(net, (torch.ones(2, 1, 8, 8),), dynamic_shapes=shapes), tmp_path / "net.pt2")
    session = Session(export_to_onnx(tmp_path / "net.pt2", tmp_path).path, threads=1)
    images = np.random.default_rng(0).standard_normal((5 if free else 2, 1, 8, 8), np.float32)
    np.testing.assert_allclose(
        session.run({"image": images})["output_0"], net(torch.from_numpy(images)).detach().numpy(), atol=1e-5
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "has no absent"),
        ("silent", r"what inputs .*:silent is to be traced with\. Set the function"),
        ("wrong", r"example inputs of .*:wrong are picture; its module takes image"),
        ("decides", r"torch\.onnx cannot export .*:decides: "),
    ],
)
def test_what_cannot_be_traced_is_refused(code: str, tmp_path: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export_to_onnx(f"{code}:{function}", tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_an_export_that_computes_something_else_is_refused(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = export.read_source

    def altered(*arguments: Any) -> source.ExportSource:
        source = read(*arguments)
        run = source.run
        source.run = lambda example: {name: value * 1.01 for name, value in run(example).items()}
        return source

    monkeypatch.setattr(export, "read_source", altered)
    with pytest.raises(InputError, match=r"outputs reach 40\.\d dB SQNR, at least 60 dB are expected"):
        export_to_onnx(f"{code}:net", tmp_path)


@pytest.mark.parametrize(
    ("expected", "got", "decibels"),
    [
        ([1.0, 2.0], [1.0, 2.0], np.inf),
        ([3.0, 4.0], [3.0, 4.05], 40.0),
        ([1.0, np.nan, -np.inf], [1.0, np.nan, -np.inf], np.inf),
        ([1.0, np.nan], [1.0, 2.0], -np.inf),
        ([1.0, 2.0], [1.0, np.nan], -np.inf),
        ([1.0, np.inf], [1.0, -np.inf], -np.inf),
        ([1.0], [1.0, 1.0], -np.inf),
        ([0.0], [1e-9], -np.inf),
    ],
)
def test_sqnr_of_outputs(expected: list[float], got: list[float], decibels: float) -> None:
    assert export._sqnr_db(np.array(expected), np.array(got)) == pytest.approx(decibels)


def test_a_folder_quantized_in_a_way_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quip"}}')
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is quantized as quip, which quantcli does not read"):
        export_to_onnx(tmp_path, tmp_path / "out")


def test_an_encoder_decoder_is_given_the_ids_of_its_decoder(tmp_path: Path) -> None:
    config = tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    made = hugging_face_source(tmp_path)
    assert list(made.examples[0]) == ["input_ids", "attention_mask", "decoder_input_ids"]
    assert made.dynamic["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    assert made.run(made.examples[0])["last_hidden_state"].shape == (2, 10, 16)


def test_a_tower_has_the_size_of_images_in_a_configuration_of_its_own(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = tf.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = tf.CLIPConfig(vision_config=seeing, text_config=tf.CLIPTextConfig(**sizes))
    tf.CLIPForImageClassification(config).save_pretrained(tmp_path)
    assert hugging_face_source(tmp_path).examples[0]["pixel_values"].shape == (2, 3, 16, 16)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    settings["vision_config"]["num_channels"] = 3
    settings["image_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be run on made-up inputs"):
        hugging_face_source(tmp_path)
