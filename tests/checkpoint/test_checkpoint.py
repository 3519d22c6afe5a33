"""Model folders and files: which weights are found, what joins them, and what is refused before a weight is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantcli.checkpoint import open_checkpoint
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.hugging_face import companions
from quantcli.core.manifest import Manifest
from quantcli.errors import InputError
from quantcli.onnx.graph.model import is_onnx

INDEX = "model.safetensors.index.json"
A, B = torch.arange(6.0).reshape(3, 2), torch.arange(4, dtype=torch.int8)


def write_json(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    """A folder of shards, by default with the index that describes them."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name) if name.endswith("s") else torch.save(tensors, folder / name)
    honest = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = INDEX if next(iter(shards)).endswith("s") else "pytorch_model.bin.index.json"
    write_json(folder / index, {"metadata": {}, "weight_map": honest if weight_map is None else weight_map})
    return folder


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert {info.name for info in checkpoint.infos()} == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.load(name), tensor)


def refusal(path: Path) -> str:
    """The message and hint with which a path is refused; they always name it."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.message
    return str(caught.value)


class TestFiles:
    """One file is a model without a folder."""

    def test_safetensors(self, tmp_path: Path) -> None:
        path = tmp_path / "Model.SafeTensors"
        save_file({"a": A, "b": B}, path, {"format": "pt"})
        write_json(tmp_path / "config.json", {"not": "its own"})
        checkpoint = open_checkpoint(path)
        assert_holds(checkpoint, {"a": A, "b": B})
        assert (checkpoint.path, checkpoint.folder, checkpoint.config) == (path, None, None)
        assert checkpoint.metadata == {"format": "pt"} and checkpoint.warnings == ()
        assert checkpoint.files == (path,) and checkpoint.size_bytes == path.stat().st_size
        with pytest.raises(KeyError):
            checkpoint.load("c")

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".PT"])
    def test_torch(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"model{suffix}"
        torch.save({"a": A}, path)
        assert_holds(open_checkpoint(path), {"a": A})

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("tf_model.h5", "Keras or TensorFlow"),
            ("flax_model.msgpack", "Flax"),
            ("m.tflite", "TFLite"),
            ("m.onnxx", "not a kind of model"),
            ("model", "not a kind of model"),
        ],
    )
    def test_other_kinds(self, tmp_path: Path, name: str, reason: str) -> None:
        path = tmp_path / name
        path.write_bytes(b"\x08")
        assert reason in refusal(path) and "A MODEL is" in refusal(path)

    @pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pt"])
    def test_git_lfs_pointer(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert "Git LFS pointer" in refusal(path) and "git lfs pull" in refusal(path)

    def test_no_tensor(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "m.safetensors")
        assert "holds no tensor" in refusal(tmp_path / "m.safetensors")

    def test_missing_and_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "does not exist" in refusal(tmp_path / "m.safetensors")
        assert "does not exist" in refusal(tmp_path / "m\0.safetensors")
        assert "cannot be read: File name too long" in refusal(tmp_path / ("m" * 300))
        (tmp_path / "m.bin").touch()
        assert "is empty: it has 0 bytes" in refusal(tmp_path / "m.bin")

        def denied(self: Path, *_: Any, **__: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "open", denied)
        assert "cannot be read: Permission denied" in refusal(tmp_path / "m.bin")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_named_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.safetensors")
        assert "neither a file nor a folder" in refusal(tmp_path / "m.safetensors")


class TestFolders:
    """A folder is what transformers would load from it."""

    def test_config_and_weights(self, tmp_path: Path) -> None:
        save_file({"a": A}, tmp_path / "model.safetensors")
        write_json(tmp_path / "config.json", {"model_type": "bert"})
        checkpoint = open_checkpoint(tmp_path)
        assert_holds(checkpoint, {"a": A})
        assert checkpoint.path == checkpoint.folder == tmp_path
        assert checkpoint.config == {"model_type": "bert"}

    def test_pytorch_model(self, tmp_path: Path) -> None:
        torch.save({"a": A}, tmp_path / "pytorch_model.bin")
        torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
        assert_holds(open_checkpoint(tmp_path), {"a": A})

    def test_order_of_preference(self, tmp_path: Path) -> None:
        """The one that transformers takes: a single file before shards, safetensors before pickles."""
        sharded(tmp_path, {"pytorch_model-1-of-1.bin": {"4": A}})
        assert_holds(open_checkpoint(tmp_path), {"4": A})
        torch.save({"3": A}, tmp_path / "pytorch_model.bin")
        assert_holds(open_checkpoint(tmp_path), {"3": A})
        sharded(tmp_path, {"model-1-of-1.safetensors": {"2": A}})
        assert_holds(open_checkpoint(tmp_path), {"2": A})
        save_file({"1": A}, tmp_path / "model.safetensors")
        assert_holds(open_checkpoint(tmp_path), {"1": A})

    def test_other_names(self, tmp_path: Path) -> None:
        save_file({"a": A}, tmp_path / "weights.safetensors")
        assert_holds(open_checkpoint(tmp_path), {"a": A})
        write_json(tmp_path / "unet.safetensors.index.json", {"weight_map": {"a": "weights.safetensors"}})
        save_file({"b": B}, tmp_path / "more.safetensors")
        assert_holds(open_checkpoint(tmp_path), {"a": A})

    def test_a_variant(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"model.fp16-1-of-1.safetensors": {"a": A}})
        (tmp_path / INDEX).rename(tmp_path / "model.safetensors.index.fp16.json")
        assert_holds(open_checkpoint(tmp_path), {"a": A})
        assert_holds(open_checkpoint(tmp_path / "model.safetensors.index.fp16.json"), {"a": A})

    def test_a_pickle_of_diffusers(self, tmp_path: Path) -> None:
        torch.save({"a": A}, tmp_path / "diffusion_pytorch_model.bin")
        assert_holds(open_checkpoint(tmp_path), {"a": A})

    def test_several_files_and_no_index(self, tmp_path: Path) -> None:
        save_file({"a": A}, tmp_path / "1.safetensors")
        save_file({"a": A}, tmp_path / "2.safetensors")
        assert "2 safetensors files and no index" in refusal(tmp_path)

    def test_not_a_model(self, tmp_path: Path) -> None:
        assert "is not a model" in refusal(tmp_path)
        write_json(tmp_path / "config.json", {})
        assert "has a config.json but no weights" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "not valid JSON"),
            ("", "not valid JSON"),
            ("[1]", "not a JSON object"),
            ("[" * 100_000, "not valid JSON"),
            ('{"a": "\udcff"}', "not valid JSON"),
        ],
        ids=["cut", "empty", "list", "deep", "not UTF-8"],
    )
    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_malformed_json(self, tmp_path: Path, name: str, content: str, reason: str) -> None:
        sharded(tmp_path, {"x.safetensors": {"a": A}})
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=reason) as caught:
            open_checkpoint(tmp_path)
        assert str(tmp_path / name) in caught.value.message

    def test_enormous_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sharded(tmp_path, {"x.safetensors": {"a": A}})
        monkeypatch.setattr("quantcli.checkpoint.hugging_face.MAX_JSON_BYTES", 10)
        assert "too much for what it should be" in refusal(tmp_path)

    def test_manifest(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": A}, path, {"quantcli": '{"quantcli": "1"}'})
        assert open_checkpoint(path).manifest == Manifest(quantcli="1")
        assert write_json(tmp_path / "quantcli.json", {"quantcli": "2"})
        assert open_checkpoint(tmp_path).manifest == Manifest(quantcli="2")
        for damaged in ("{", "[" * 100_000):
            save_file({"a": A}, path, {"quantcli": damaged})
            with pytest.raises(InputError, match=r"model\.safetensors holds a damaged quantcli manifest"):
                _ = open_checkpoint(path).manifest
        save_file({"a": A}, path)
        assert open_checkpoint(path).manifest == Manifest()


class TestShards:
    """The index and the shards must agree."""

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_joined_by_the_index(self, tmp_path: Path, suffix: str) -> None:
        sharded(tmp_path, {f"2.{suffix}": {"b": B}, f"1.{suffix}": {"a": A}})
        write_json(tmp_path / "config.json", {"model_type": "bert"})
        for path in (tmp_path, next(tmp_path.glob("*.index.json"))):
            checkpoint = open_checkpoint(path)
            assert_holds(checkpoint, {"a": A, "b": B})
            assert checkpoint.folder == tmp_path and checkpoint.config == {"model_type": "bert"}
            assert [file.name for file in checkpoint.files] == [f"1.{suffix}", f"2.{suffix}"]
            assert checkpoint.size_bytes == sum(file.stat().st_size for file in checkpoint.files)

    def test_missing_shard(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
        (tmp_path / "2.safetensors").unlink()
        assert "names the shard 2.safetensors, which is not there" in refusal(tmp_path)

    def test_corrupt_shard(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
        (tmp_path / "2.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match=r"2\.safetensors is not a valid safetensors file"):
            open_checkpoint(tmp_path)

    def test_tensor_that_is_not_in_its_shard(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"1.safetensors": {"a": A}}, {"a": "1.safetensors", "b": "1.safetensors"})
        assert "says that 'b' is in 1.safetensors, which does not hold it" in refusal(tmp_path)

    def test_tensor_that_is_not_in_the_index(self, tmp_path: Path) -> None:
        shards = {"1.safetensors": {"a": A, "b": B, "c": B + 2}, "2.safetensors": {"b": B + 1, "c": B + 3}}
        sharded(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"})
        checkpoint = open_checkpoint(tmp_path)
        # transformers takes what lies in the shards, and of several the last.
        assert_holds(checkpoint, {"a": A, "b": B + 1, "c": B + 3})
        assert [warning.partition("; ")[2] for warning in checkpoint.warnings] == [
            "taken all the same: c (2.safetensors).", "ignored: b (1.safetensors).",
        ]  # fmt: skip

    def test_tied_to_a_tensor_that_is_not_in_the_index(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"1.bin": {"a": A, "b": A}}, {"b": "1.bin"})
        assert [(info.name, info.shares) for info in open_checkpoint(tmp_path).infos()] == [("b", None), ("a", None)]

    @pytest.mark.parametrize(
        "name", ["../x", "a/../../x", "/abs", "C:\\x", "C:x", "..\\x", "a\\..\\x", "\\x", "\\\\host\\share\\x"]
    )
    def test_shard_outside_the_folder(self, tmp_path: Path, name: str) -> None:
        sharded(tmp_path / "m", {"1.safetensors": {"a": A}}, {"a": f"{name}.safetensors"})
        save_file({"a": A}, tmp_path / "x.safetensors")
        assert "lies outside its folder" in refusal(tmp_path / "m")

    @pytest.mark.parametrize("name", ["", ".", "x\0y"])
    def test_shard_that_is_no_file(self, tmp_path: Path, name: str) -> None:
        sharded(tmp_path, {"1.safetensors": {"a": A}}, {"a": name})
        assert "which is not there" in refusal(tmp_path)

    @pytest.mark.parametrize("weight_map", [None, [], "a", {"a": 1}, {"a": None}, {"a": ["1.safetensors"]}])
    def test_malformed_weight_map(self, tmp_path: Path, weight_map: Any) -> None:
        write_json(tmp_path / INDEX, {"weight_map": weight_map})
        assert "has no weight_map" in refusal(tmp_path)

    def test_empty_weight_map(self, tmp_path: Path) -> None:
        write_json(tmp_path / INDEX, {"weight_map": {}})
        assert "holds no tensor" in refusal(tmp_path)

    def test_links_of_the_hub_cache(self, tmp_path: Path) -> None:
        snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
        snapshot.mkdir(parents=True)
        sharded(blobs, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
        for number, blob in enumerate(sorted(blobs.iterdir())):
            (snapshot / blob.name).symlink_to(Path("../../blobs") / f"{number:064x}")
            blob.rename(blobs / f"{number:064x}")
        checkpoint = open_checkpoint(snapshot)
        assert_holds(checkpoint, {"a": A, "b": B})
        assert checkpoint.size_bytes > 0 and checkpoint.sha256()

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_many_shards_from_many_threads(self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quantcli.checkpoint.checkpoint.MAX_OPEN_FILES", 3)
        tensors = {f"t{number}": torch.full((4, 2), float(number)) for number in range(70)}
        sharded(tmp_path, {f"{name}.{suffix}": {name: tensor} for name, tensor in tensors.items()})
        checkpoint = open_checkpoint(tmp_path)
        barrier = threading.Barrier(8)

        def read(thread: int) -> bool:
            barrier.wait()
            infos = checkpoint.infos()[thread * 7 :] + checkpoint.infos()[: thread * 7]
            return all(torch.equal(checkpoint.read_rows(info, 1, 3), tensors[info.name][1:3]) for info in infos)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))
        assert len(checkpoint._readers) == 3

    def test_least_recently_used_file_is_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quantcli.checkpoint.checkpoint.MAX_OPEN_FILES", 2)
        sharded(tmp_path, {f"{name}.safetensors": {name: A} for name in "abc"})
        checkpoint = open_checkpoint(tmp_path)
        before = open_files()
        for name in "abac":
            checkpoint.load(name)
        assert [file.stem for file in checkpoint._readers] == ["a", "c"]
        assert open_files() - before in (2, 0)


def open_files() -> int:
    """Descriptors of this process; 0 where it cannot be told."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.is_dir() else 0


class TestHash:
    """sha256() is what `sha256sum` can reproduce."""

    def test_one_file(self, tmp_path: Path) -> None:
        save_file({"a": A}, tmp_path / "model.safetensors")
        digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
        assert open_checkpoint(tmp_path).sha256() == digest
        assert open_checkpoint(tmp_path / "model.safetensors").sha256() == digest

    def test_several_files(self, tmp_path: Path) -> None:
        """As of: sha256sum FILES | sha256sum."""
        sharded(tmp_path, {"x.safetensors": {"a": A}, "a/x.safetensors": {"b": B}, "a-b.safetensors": {"c": B}})
        lines = ""
        for name in ("a-b.safetensors", "a/x.safetensors", "x.safetensors"):
            lines += f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        assert open_checkpoint(tmp_path).sha256() == hashlib.sha256(lines.encode()).hexdigest()

    def test_any_change_shows(self, tmp_path: Path) -> None:
        sharded(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}})
        before = open_checkpoint(tmp_path).sha256()
        sharded(tmp_path, {"1.safetensors": {"a": A}, "2.safetensors": {"b": B + 1}})
        assert open_checkpoint(tmp_path).sha256() != before


def test_companions(tmp_path: Path) -> None:
    wanted = [
        "1_Pooling/config.json",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "README.md",
        "USE_POLICY.md",
        "chat_template.jinja",
        "config.json",
        "linked.json",
        "merges.txt",
        "modeling.py",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
    ]
    unwanted = [
        ".cache/huggingface/x.json",
        ".gitattributes",
        ".hidden.json",
        "1_Dense/pytorch_model.bin",
        "consolidated.00.pth",
        "flax_model.msgpack",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
    ]
    model, blobs = tmp_path / "model", tmp_path / "blobs"
    for name in (*wanted, *unwanted):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).touch()
    blobs.mkdir()
    (model / "linked.json").rename(blobs / "0")
    (model / "linked.json").symlink_to(blobs / "0")
    (model / "broken.json").symlink_to(blobs / "1")
    (model / "loop").symlink_to(model, target_is_directory=True)
    (model / "folder.json").mkdir()
    assert [path.as_posix() for path in companions(model)] == wanted


def test_a_folder_around_models_names_one_of_them(tmp_path: Path) -> None:
    inner = tmp_path / "0_Transformer"
    inner.mkdir()
    (inner / "config.json").write_text("{}", encoding="utf-8")
    (inner / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is not a model") as caught:
        open_checkpoint(tmp_path)
    assert str(inner) in str(caught.value.hint)


def test_a_folder_around_a_transformer_with_an_export_beside_is_no_onnx_model(tmp_path: Path) -> None:
    for folder, file in (("0_Transformer", "model.safetensors"), ("onnx", "model.onnx")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(b"")
    assert not is_onnx(tmp_path)
    (tmp_path / "0_Transformer" / "model.safetensors").unlink()
    assert is_onnx(tmp_path)


def test_a_folder_of_several_graphs_asks_for_one(tmp_path: Path) -> None:
    """As transformers.js keeps several dtypes, or onnxruntime-genai a graph of another name."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    for name in ("model_q4", "model_int8"):
        (tmp_path / "onnx" / f"{name}.onnx").touch()
    assert "name one: " in refusal(tmp_path) and str(tmp_path / "onnx" / "model_int8.onnx") in refusal(tmp_path)
