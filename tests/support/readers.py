"""Every reader of files that come from elsewhere: honest files to start from, and how each is read to its end.

One list for two drivers: tests/system/test_hostile_files.py, which damages honest files, and
tests/benchmarks/fuzz_readers.py, which is led by coverage.
"""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file

from quantcli.errors import InputError, QuantcliError, UsageError

#: Lays out honest files in an empty folder.
Layout = Callable[[Path], None]


@dataclass(frozen=True)
class Reader:
    """One reader.

    - ``file``: name of the file that is not to be trusted.
    - ``seeds``: honest contents of it.
    - ``read``: opens it and reads everything in it; raises QuantcliError for what cannot be meant.
    - ``beside``: lays out what lies beside it.
    """

    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    beside: Layout = lambda folder: None


def refusal(reader: Reader, path: Path) -> QuantcliError | None:
    """What a reader says against a file, None where it takes it. Whatever else it raises is a defect."""
    try:
        reader.read(path)
    except (InputError, UsageError) as error:
        return error
    return None


# Checkpoints.

WEIGHTS = {
    "model.embed_tokens.weight": torch.linspace(-1, 1, 16 * 64).reshape(16, 64),
    "model.layers.0.mlp.down_proj.weight": torch.linspace(-1, 1, 64 * 64).reshape(64, 64),
    "model.norm.weight": torch.ones(64),
    "steps": torch.tensor(3),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 16,
    "tie_word_embeddings": True, "dtype": "float32", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def read_checkpoint(path: Path) -> None:
    from quantcli.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    for info in checkpoint.infos():
        checkpoint.load(info.name)
    assert checkpoint.manifest is not None


def read_and_plan(path: Path) -> None:
    from quantcli.commands.inspect import inspect

    inspect(path if path.suffix in (".onnx", ".gguf") else path.parent, ["int4", "nf4", "int8-dynamic", "fp16"])


def read_values(path: Path) -> None:
    """The values of a quantized checkpoint."""
    from quantcli.checkpoint.checkpoint import open_checkpoint
    from quantcli.checkpoint.decoded import decoded_checkpoint

    checkpoint = decoded_checkpoint(open_checkpoint(path if path.suffix == ".gguf" else path.parent))
    for info in checkpoint.infos():
        checkpoint.load(info.name)


def _weights(folder: Path) -> None:
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})


def _shards(folder: Path) -> None:
    names = sorted(WEIGHTS)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: WEIGHTS[name] for name in part}, folder / f"{number}.safetensors")


def _index() -> list[bytes]:
    places = {name: f"{number // 2}.safetensors" for number, name in enumerate(sorted(WEIGHTS))}
    return [json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()]


def _config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _safetensors() -> list[bytes]:
    metadata = {"format": "pt", "quantcli": json.dumps({"quantcli": "0.1", "layers": {"a": {"scheme": "int4"}}})}
    return [save(WEIGHTS, metadata), save({"a": torch.zeros(2)})]


def _torch_files() -> list[bytes]:
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({"state_dict": WEIGHTS, "epoch": 3}, buffer, **options)
        found.append(buffer.getvalue())
    return found


@cache
def _artifact(kind: str) -> Mapping[str, bytes]:
    """The files of a quantized artifact."""
    import tempfile

    import pytest

    from quantcli import convert
    from quantcli.conversion.checkpoint.proof import Skipped
    from quantcli.planning.recipe import validate
    from support.quantized_models import KINDS

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "quantcli.conversion.checkpoint.transformers_check._reason_to_skip", lambda *_: Skipped("left out")
        )
        model, out = Path(place) / "model", Path(place) / "out"
        model.mkdir()
        _weights(model)
        _config(model)
        convert(model, out, recipe=validate(KINDS[kind], "recipe"))
        return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


_ARTIFACTS = ("int4 asymmetric", "int8-dynamic", "gptq", "awq", "nf4-double")


def _artifact_beside(kind: str, left_out: str) -> Layout:
    def lay(folder: Path) -> None:
        for name, content in _artifact(kind).items():
            if name != left_out:
                (folder / name).write_bytes(content)

    return lay


def _gguf() -> list[bytes]:
    import tempfile

    import gguf

    from support.gguf_files import COLUMNS, write_gguf

    values = np.linspace(-1, 1, 8 * COLUMNS, dtype=np.float32).reshape(8, COLUMNS)
    tensors = {"token_embd.weight": (np.ones_like(values), "F32")}
    for number, kind in enumerate(("Q4_0", "Q8_0", "Q4_K", "Q6_K")):
        known = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[known]
        stored = gguf.quantize(values, known) if number < 2 else np.zeros((8, COLUMNS // block * size), np.uint8)
        name = ("ffn_down", "ffn_up", "ffn_gate", "attn_output")[number]
        tensors[f"blk.0.{name}.weight"] = stored, kind
    with tempfile.TemporaryDirectory() as place:
        return [write_gguf(Path(place) / "model.gguf", tensors).read_bytes()]


def read_gguf(path: Path) -> None:
    from quantcli.checkpoint.checkpoint import open_checkpoint

    read_values(path)
    assert open_checkpoint(path).folder is not None  # writes its tokenizer


# Graphs.


def _onnx() -> list[bytes]:
    from support.graphs import model, node

    product = model(
        [node("MatMul", ["x", "w"], ["h"], name="product"), node("Relu", ["h"], ["y"])],
        {"x": ["n", 8]}, {"y": ["n", 4]}, {"w": np.ones((8, 4), np.float32)},
    )  # fmt: skip
    layers = model(
        [
            node("Conv", ["x", "k"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", "s", "s", "s", "s"], ["b"]), node("Relu", ["b"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "w", "s"], ["y"], name="head", transB=1),
        ],
        {"x": ["n", 2, 4, 4]}, {"y": ["n", 4]},
        {"k": np.ones((4, 2, 3, 3), np.float32), "s": np.ones(4, np.float32), "w": np.ones((4, 4), np.float32)},
    )  # fmt: skip
    return [product.SerializeToString(), layers.SerializeToString()]


def _onnx_with_data() -> list[bytes]:
    import onnx

    proto = onnx.load_from_string(_onnx()[0])
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", "model.data"), ("offset", "0"), ("length", "128")):
        tensor.external_data.add(key=key, value=value)
    return [proto.SerializeToString()]


def read_onnx(path: Path) -> None:
    from quantcli.onnx.graph.model import constants, open_onnx

    read_and_plan(path)
    model = open_onnx(path, mapped=True)
    assert model.manifest is not None
    for tensor in constants(model.ir):
        with suppress(TypeError, ValueError):  # strings, and what the runtime refuses
            tensor.numpy()


def _external_data(folder: Path) -> None:
    (folder / "model.data").write_bytes(np.ones((8, 4), np.float32).tobytes())


# Data.


def _npz() -> list[bytes]:
    arrays = {"x": np.arange(24, dtype=np.float32).reshape(6, 4), "labels": np.arange(6)}
    found = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, **arrays)
        found.append(buffer.getvalue())
    return found


def _npy() -> list[bytes]:
    found = []
    for array in (np.ones((6, 4), np.float32), np.asfortranarray(np.ones((6, 4), ">f4"))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append(buffer.getvalue())
    return found


def _data(path: Path, *shapes: tuple[str, tuple[Any, ...], Any], **options: Any) -> None:
    from quantcli.core.ports import Port
    from quantcli.data.request import DataRequest
    from quantcli.data.samples import load_samples

    ports = [Port(name, np.dtype(dtype), shape) for name, shape, dtype in shapes]
    samples = load_samples(DataRequest(str(path), **options), ports, folder=None)
    for _ in samples:
        pass
    assert samples.sha256


def read_arrays(path: Path) -> None:
    _data(path, ("x", ("n", 4), np.float32))


def _image(kind: str) -> Callable[[], list[bytes]]:
    def make() -> list[bytes]:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
        return [buffer.getvalue()]

    return make


def read_image(path: Path) -> None:
    options = {"preprocess": path.parent.parent / "preprocess.yaml"}
    _data(path.parent, ("x", ("n", 3, 4, 4), np.float32), **options)


def _preprocess_above(folder: Path) -> None:
    (folder / "preprocess.yaml").write_text("resize: 4\ncrop: 4\n")


def _wav() -> list[bytes]:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(range(200)))
    return [buffer.getvalue()]


def _flac() -> list[bytes]:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-1, 1, 400), 8000, format="FLAC")
    return [buffer.getvalue()]


def read_sound(path: Path) -> None:
    from quantcli.data.sound_files import read_sound as read

    try:
        read(path, 16000)
    except (ValueError, OSError) as error:  # what whoever asks turns into a list of unreadable files
        raise InputError(f"{path}: {error}") from error


_RECORDS = (
    {"text": "what is said", "label": 1},
    {"text": "and answered", "label": 0},
)
_CHAT = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": [{"text": "so"}]}]}


def _jsonl() -> list[bytes]:
    lines = [json.dumps(record) for record in _RECORDS]
    pictured = {"image": "a.png", "conversations": [{"from": "human", "value": "<image> what"}]}
    heard = {"audio": {"path": "a.wav"}, "transcription": "words"}
    return [
        "\n".join(lines).encode(), json.dumps(_CHAT).encode(),
        b'{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "system": "c"}\n',
        json.dumps(pictured).encode(), json.dumps(heard).encode(),
    ]  # fmt: skip


def _parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for records in (list(_RECORDS), [_CHAT | {"messages": [{"role": "user", "content": "why"}]}]):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), buffer)
        found.append(buffer.getvalue())
    return found


def read_texts(path: Path) -> None:
    from quantcli.data.media_records import file_named, illustrated, medium_of, records_of, sound_of, transcript_of
    from quantcli.data.text_files import load_labelled_texts

    if (medium := medium_of(str(path))) is None:
        load_labelled_texts(path, lines=True)
        return
    for where, record in records_of(path):
        if medium == "sound":
            file_named(sound_of(record, where), path.parent, where)
            transcript_of(record)
        else:
            for name in illustrated(record, where).files:
                file_named(name, path.parent, where)


def _media(folder: Path) -> None:
    (folder / "a.png").write_bytes(_image("PNG")()[0])
    (folder / "a.wav").write_bytes(_wav()[0])


# What is written by people.


def _recipes() -> list[bytes]:
    return [
        b"scheme: int4\nalgorithm: mse\ngroup_size: 64\nskip: ['*.0.*']\nrest: bf16\nmax_shard_size: 5GB\n",
        b"scheme:\n  weights: {dtype: int8, granularity: channel, symmetric: true}\n  inputs: {dtype: int8}\n"
        b"rules:\n- match: 're:.*down.*'\n  scheme: int8\n- {match: a, skip: true}\ntarget: vllm==0.11\n",
        b"scheme: int4\nsteps:\n- smoothquant: {strength: 0.5}\n- gptq: {damping: 0.01}\n",
    ]


def read_recipe(path: Path) -> None:
    from quantcli.planning.recipe import build_scheme, load_recipe

    recipe = load_recipe(path)
    for scheme in (recipe.scheme, *(rule.scheme for rule in recipe.rules)):
        if scheme is not None:
            build_scheme(scheme)
    recipe.with_flags(algorithm="rtn")


def _preprocessing() -> list[bytes]:
    return [
        b"resize: 256\ncrop: [224, 224]\nmean: [0.485, 0.456, 0.406]\nstd: [0.2, 0.2, 0.2]\ninterpolation: bicubic\n",
        b"channels: gray\nlayout: nhwc\nrescale: 1\nmean: 0\nstd: 1.0\n",
    ]


def _preprocessor_config() -> list[bytes]:
    config = {
        "do_resize": True, "size": {"shortest_edge": 224}, "crop_pct": 0.9, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 0.00392,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_pad": False,
        "image_processor_type": "ViTImageProcessor",
    }  # fmt: skip
    return [json.dumps(config).encode()]


def read_preprocessing(path: Path) -> None:
    from PIL import Image

    from quantcli.data.image_preprocessing import load_preprocess

    preprocess = load_preprocess(path, None)
    size = max([preprocess.resize or 1] if not isinstance(preprocess.resize, tuple) else preprocess.resize)
    if size < 512:
        preprocess.apply(Image.new("RGB", (8, 6)))


# What quantcli writes, and reads again.


def _stats() -> list[bytes]:
    import tempfile

    from quantcli.calibration.observers import TensorStats
    from quantcli.calibration.statistics_file import Provenance, write

    array = np.array
    stats = TensorStats(
        array([5, 900], np.uint16), array([3, 4]), 0.0, 1.0, 0, 0, array([0.0]), array([1.0]), array([0.5])
    )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "stats.safetensors"
        write(path, Provenance("minmax", 2, 0, "0" * 64, "1" * 64, {"kind": "minhash"}), {"x": stats, "y": stats})
        return [path.read_bytes()]


def read_stats(path: Path) -> None:
    from quantcli.calibration import statistics_file
    from quantcli.calibration.ranges import METHODS

    provenance, stats = statistics_file.read(path)
    assert provenance.method in METHODS and stats is not None


def _sensitivity() -> list[bytes]:
    from quantcli.search.sensitivity_file import LayerFigures, Sensitivity, WayFigures
    from quantcli.version import __version__

    way = WayFigures(nbytes=3, factor=1.5, error=0.1)
    found = Sensitivity(
        identity={"quantcli": __version__}, measure="kl_nats", costs={"a": {"int4": 0.5}}, factors={"mlp": 1.0},
        measured={"all": {"kl_nats": None}}, graph={"n": LayerFigures(nbytes=9, work=2.0, ways={"int8": way})}, rest=3,
    )  # fmt: skip
    return [json.dumps(found.model_dump()).encode()]


def read_sensitivity(path: Path) -> None:
    from quantcli.search.sensitivity_file import SensitivityStore

    SensitivityStore(path, {}).save()


def _baseline() -> list[bytes]:
    model = {"path": "m", "role": "reference", "sha256": "0", "size_bytes": 5, "format": "onnx", "scheme": None}
    model |= {"metrics": {"top1": 0.5, "size_bytes": 5}}
    report = {
        "schema_version": 1, "command": "eval", "quantcli": "0.1.0", "models": [model],
        "layers": [], "gates": [], "warnings": [], "task": "classification", "samples": 3, "data_sha256": "0",
    }  # fmt: skip
    return [json.dumps(report).encode()]


def read_baseline(path: Path) -> None:
    from quantcli.reporting.baseline import judge, require_batch_size
    from quantcli.reporting.baseline import read_baseline as read
    from quantcli.reporting.gates import parse_gates
    from quantcli.reporting.report import ModelRow, Report

    baseline = read(path, "eval", ["m"])
    require_batch_size(baseline, 1)
    row = ModelRow("m", "reference", "onnx", None, "0", 5, {"top1": 0.25})
    report = Report("eval", [row], details={"task": "classification", "samples": 3, "data_sha256": "0"})
    gates = parse_gates(("top1_drop<=0.01", "size_ratio<1"), None)
    baseline.require(gates)
    judge(report, gates, baseline)
    report.to_json()


def _manifest() -> list[bytes]:
    return [_artifact("int4 asymmetric")["quantcli.json"]]


def _journal() -> list[bytes]:
    lines = [{"fingerprint": "f"}, {"name": "a", "sqnr_db": 3.5}, {"name": "b"}]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def read_journal(path: Path) -> None:
    from quantcli.conversion.staging import open_staging

    with open_staging(path.parent.parent / "out") as staging:
        staging.begin("f", force=False)
        staging.close()


def _genai_config() -> list[bytes]:
    config = {"model": {"decoder": {"head_size": 32, "filename": "model.onnx"}, "vocab_size": 16}, "search": {}}
    return [json.dumps(config).encode()]


def read_genai_config(path: Path) -> None:
    from quantcli.core.ports import Port
    from quantcli.models.decoder import sized_cache

    ports = [Port(f"past_key_values.0.{part}", np.dtype(np.float32), ("n", 2, "m", None)) for part in ("key", "value")]
    sized_cache(ports, path.parent / "model.onnx")


def _tokenizer() -> list[bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return [tokenizer.to_str().encode()]


def _tokenizer_config() -> list[bytes]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": 64,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }  # fmt: skip
    return [json.dumps(config).encode()]


def read_tokenizer(path: Path) -> None:
    from quantcli.models.hugging_face import load_tokenizer

    load_tokenizer(path.parent)("a b")


def _tokenizer_beside(left_out: str) -> Layout:
    def lay(folder: Path) -> None:
        _config(folder)
        for name, make in (("tokenizer.json", _tokenizer), ("tokenizer_config.json", _tokenizer_config)):
            if name != left_out:
                (folder / name).write_bytes(make()[0])

    return lay


def _quantized(file: str) -> dict[str, Reader]:
    return {
        f"{file.partition('.')[0]} of {kind}": Reader(
            file, lambda kind=kind: [_artifact(kind)[file]], read_values, _artifact_beside(kind, file)
        )
        for kind in _ARTIFACTS
    }


READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", _safetensors, read_checkpoint),
    "index": Reader("model.safetensors.index.json", _index, read_checkpoint, _shards),
    "config": Reader("config.json", lambda: [json.dumps(CONFIG).encode()], read_and_plan, _weights),
    "torch": Reader("model.pt", _torch_files, read_checkpoint),
    "manifest": Reader("quantcli.json", _manifest, read_and_plan, _artifact_beside("int4 asymmetric", "quantcli.json")),
    **_quantized("config.json"),
    **_quantized("model.safetensors"),
    "gguf": Reader("model.gguf", _gguf, read_gguf),
    "onnx": Reader("model.onnx", _onnx, read_onnx),
    "onnx with data": Reader("model.onnx", _onnx_with_data, read_onnx, _external_data),
    "genai_config": Reader("genai_config.json", _genai_config, read_genai_config),
    "tokenizer": Reader("tokenizer.json", _tokenizer, read_tokenizer, _tokenizer_beside("tokenizer.json")),
    "tokenizer_config": Reader(
        "tokenizer_config.json", _tokenizer_config, read_tokenizer, _tokenizer_beside("tokenizer_config.json")
    ),
    "npz": Reader("data.npz", _npz, read_arrays),
    "npy": Reader("data.npy", _npy, read_arrays),
    "png": Reader("images/a.png", _image("PNG"), read_image, _preprocess_above),
    "jpeg": Reader("images/a.jpeg", _image("JPEG"), read_image, _preprocess_above),
    "gif": Reader("images/a.gif", _image("GIF"), read_image, _preprocess_above),
    "tiff": Reader("images/a.tiff", _image("TIFF"), read_image, _preprocess_above),
    "webp": Reader("images/a.webp", _image("WEBP"), read_image, _preprocess_above),
    "bmp": Reader("images/a.bmp", _image("BMP"), read_image, _preprocess_above),
    "wav": Reader("a.wav", _wav, read_sound),
    "flac": Reader("a.flac", _flac, read_sound),
    "jsonl": Reader("data.jsonl", _jsonl, read_texts, _media),
    "parquet": Reader("data.parquet", _parquet, read_texts),
    "recipe": Reader("recipe.yaml", _recipes, read_recipe),
    "preprocessing": Reader("preprocess.yaml", _preprocessing, read_preprocessing),
    "preprocessor_config": Reader("preprocessor_config.json", _preprocessor_config, read_preprocessing),
    "statistics": Reader("stats.safetensors", _stats, read_stats),
    "sensitivity": Reader("sensitivity.json", _sensitivity, read_sensitivity),
    "baseline": Reader("report.json", _baseline, read_baseline),
    "journal": Reader(".out.partial/journal.jsonl", _journal, read_journal),
}
