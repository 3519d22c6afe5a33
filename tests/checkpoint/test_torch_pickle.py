"""torch files: what torch saved is read back without torch's loader, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantcli.checkpoint import open_checkpoint
from quantcli.checkpoint.torch_pickle import TorchReader
from quantcli.core.dtypes import TORCH_NAMES, torch_dtype
from quantcli.errors import InputError

Save = Callable[[Any], Path]


@pytest.fixture(params=["archive", "stream"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    """torch.save, as a zip archive and as before torch 1.6."""

    def run(contents: Any) -> Path:
        path = tmp_path / "model.bin"
        torch.save(contents, path, _use_new_zipfile_serialization=request.param == "archive")
        return path

    return run


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def assert_reads(path: Path, tensors: dict[str, Tensor]) -> TorchReader:
    """Every tensor is listed, and read the same, whole and by every range of rows."""
    reader = TorchReader(path)
    assert [info.name for info in reader.infos] == list(tensors)
    for info in reader.infos:
        expected = tensors[info.name].detach()
        assert torch_dtype(info.dtype) == expected.dtype and info.shape == tuple(expected.shape)
        assert info.nbytes == expected.nbytes and info.file == path
        for start in range(info.rows):
            for stop in range(start, info.rows + 1) if info.shape else [1]:
                read = reader.read_rows(info, start, stop)
                wanted = expected[start:stop] if info.shape else expected
                assert read.is_contiguous() and read.dtype == wanted.dtype and read.shape == wanted.shape
                assert torch.equal(bits(read), bits(wanted))
    return reader


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", map(torch_dtype, TORCH_NAMES), ids=TORCH_NAMES)
def test_dtypes(save: Save, dtype: torch.dtype) -> None:
    tensors = {"matrix": numbered(3, 2, dtype=dtype), "scalar": numbered(1, dtype=dtype)[0]}
    assert_reads(save(tensors), tensors)


def test_views(save: Save) -> None:
    base = numbered(6, 4)
    tensors = {
        "base": base,
        "transposed": base.T,
        "rows": base[2:5],
        "every other row": base[::2],
        "columns": base[:, 1:3],
        "every other column": base[:, ::2],
        "last": base[5, 3],
        "empty rows": base[:0],
        "empty columns": base[:, 4:],
        "expanded": numbered(1, 3).expand(4, 3),
        "expanded scalar": torch.tensor(2.0).expand(2, 2),
        "permuted": numbered(2, 3, 4).permute(2, 0, 1),
        "channels last": numbered(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "nothing": torch.empty(0),
        "nothing transposed": torch.empty(3, 0).T,
    }
    assert_reads(save(tensors), tensors)


def test_module_state(save: Save) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    assert_reads(save(state), state)
    assert_reads(save(dict(module.named_parameters())), dict(module.named_parameters()))


def test_tied_tensors_name_the_first(save: Save) -> None:
    weight = nn.Parameter(numbered(4, 2))
    tensors = {
        "embed.weight": weight,
        "head.weight": weight,
        "copy": weight.detach().clone(),
        "view": weight.detach()[1:],
        "transposed": weight.detach().T,
        "empty": weight.detach()[:0],
        "empty again": weight.detach()[:0],
    }
    reader = assert_reads(save(tensors), tensors)
    assert {info.name: info.shares for info in reader.infos if info.shares} == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "net", "weights"])
def test_state_dict_of_a_training_run(save: Save, key: str) -> None:
    tensors = {"a": numbered(2, 2)}
    run = {
        "rng_state": torch.get_rng_state(),
        "epoch": 3,
        "args": {"lr": 0.1, "dtype": torch.bfloat16, "size": torch.Size([1])},
        "optimizer": {"state": {0: {"exp_avg": numbered(2, 2)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    }
    assert_reads(save(run | {key: OrderedDict(tensors)}), tensors)


def test_records_beside_the_weights_are_passed_over(save: Save) -> None:
    tensors = {"a": numbered(2, 2)}
    records = {
        "args": argparse.Namespace(lr=0.1, path=Path("x"), betas={0.9, 0.99}), "counts": Counter("ab"), "b": b"bytes",
        "state": defaultdict(dict, {0: {"exp_avg": numbered(2, 2)}}), "device": torch.device("cpu"), "z": 1j,
        "best": np.float64(0.5), "raw": bytearray(b"x"), "when": datetime(2020, 1, 1),
    }  # fmt: skip
    assert_reads(save(records | {"state_dict": tensors}), tensors)
    assert_reads(save(defaultdict(dict, tensors)), tensors)


def test_state_dict_under_a_name_of_its_own(save: Save) -> None:
    tensors = {"a": numbered(2, 2)}
    optimizer = {"state": {0: {"exp_avg": numbered(2, 2)}}, "param_groups": []}
    assert_reads(save({"step": 7, "speaker_encoder": tensors, "optimizer": optimizer}), tensors)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"g": {"a": torch.zeros(1)}, "d": {"a": torch.zeros(1)}}, r"several state dicts \(g, d\)"),
        ({"g": {"a": torch.zeros(1)}, "a": torch.zeros(1)}, r"several state dicts \(g, its top level\)"),
        (
            {"model": {"a": torch.zeros(1)}, "state_dict": {"b": torch.zeros(1)}},
            r"several state dicts \(state_dict, model\)",
        ),
        ({"epoch": 3}, r"no state dict.*It holds 'epoch'"),
        ({"model": {}}, "no state dict"),
        ({}, "no state dict"),
        ([torch.zeros(1)], "no state dict"),
        (torch.zeros(1), "no state dict"),
        ({0: torch.zeros(1)}, "names are not text"),
        ({"\ud800": torch.zeros(1)}, "names are not text"),
        ({"a": torch.zeros(1, dtype=torch.complex64).conj().imag}, "negated or conjugated"),
        ({"a": torch.eye(2).to_sparse()}, r"torch\._utils\._rebuild_sparse_tensor"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, r"torch\.ComplexDoubleStorage"),
        ({"a": np.zeros(1)}, r"numpy\._?core\.multiarray\._reconstruct"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        ({"model": nn.Linear(1, 1)}, r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_refused(save: Save, contents: Any, reason: str) -> None:
    path = save(contents)
    with pytest.raises(InputError, match=reason) as caught:
        TorchReader(path)
    assert str(path) in caught.value.message


class Payload:
    """Leaves a file behind if it is ever run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_code_is_not_run(save: Save, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for contents in ({"a": torch.zeros(1), "b": Payload(mark)}, Payload(mark), {"model": {"a": Payload(mark)}}):
        with pytest.raises(InputError, match=rf"model\.bin is a pickle that needs {os.name}\.system"):
            TorchReader(save(contents))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"a": Payload(mark)}, protocol))
    with pytest.raises(InputError, match=rf"needs {os.name}\.system" if protocol > 1 else "is not a torch file"):
        TorchReader(path)
    assert not mark.exists()


def test_pickle_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"not one that torch\.save wrote"):
        TorchReader(path)


def test_a_pickle_cannot_change_what_was_checked(tmp_path: Path) -> None:
    """The opcode BUILD sets attributes; a tensor that was made must not take any."""
    forged = Forged("FloatStorage", (1,), (1,), state={"shape": ("x",)})
    with pytest.raises(InputError, match="not a readable torch state dict"):
        TorchReader(forge(tmp_path, forged))


@dataclass
class Forged:
    """A tensor in a pickle, with whatever it claims of itself."""

    storage: str = "FloatStorage"
    shape: Any = (2,)
    stride: Any = (1,)
    offset: Any = 0
    count: Any = 2
    key: Any = "0"
    state: Any = None

    def __reduce__(self) -> Any:
        arguments = (self, self.offset, self.shape, self.stride, False, OrderedDict())
        rebuild = torch._utils._rebuild_tensor_v2
        return (rebuild, arguments) if self.state is None else (rebuild, arguments, self.state)


class ForgingPickler(pickle.Pickler):
    """Writes a `Forged` as a tensor, and where it is met again, within itself, as its storage."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, protocol=2)
        self.inside: set[int] = set()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Forged):
            return None
        if id(value) in self.inside:
            return ("storage", getattr(torch, value.storage), value.key, "cpu", value.count)
        self.inside.add(id(value))
        return None


def forge(tmp_path: Path, forged: Any, data: bytes = bytes(8), **members: bytes) -> Path:
    """A zip archive as torch writes it, holding one forged tensor named ``a``."""
    path, stream = tmp_path / "model.pt", io.BytesIO()
    ForgingPickler(stream).dump({"a": forged})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", stream.getvalue())
        archive.writestr("model/data/0", data)
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return path


def test_a_forgery_may_be_honest(tmp_path: Path) -> None:
    data = torch.tensor([1.0, 2.0])
    members = {"byteorder": b"little", "extra/0": b"not its data"}
    assert_reads(forge(tmp_path, Forged(), bytes(bits(data).tolist()), **members), {"a": data})


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (Forged(shape=(3,)), "'a' lies outside its storage"),
        (Forged(offset=1), "'a' lies outside its storage"),
        (Forged(shape=(2, 2), stride=(1, 1)), "'a' lies outside its storage"),
        (Forged(offset=-1), "'a' has the impossible shape"),
        (Forged(shape=(-2,)), "'a' has the impossible shape"),
        (Forged(stride=(-1,), offset=1), "'a' has the impossible shape"),
        (Forged(shape=(2, 1)), "'a' has the impossible shape"),
        (Forged(shape=(1 << 40, 1 << 40), stride=(0, 0)), "'a' has the impossible shape"),
        (Forged(shape=(1,) * 65, stride=(0,) * 65), "'a' has the impossible shape"),
        (Forged(count=3), "'a' has data of the wrong size"),
        (Forged(count=-2), "'a' has data of the wrong size"),
        (Forged(storage="DoubleStorage"), "'a' has data of the wrong size"),
        (Forged(key="1"), "'a' has no data"),
        (Forged(key="../data.pkl"), "'a' has no data"),
        (Forged(key=0), "not a readable torch state dict"),
        (Forged(count=2.0), "not a readable torch state dict"),
        (Forged(shape=(2.0,)), "not a readable torch state dict"),
        (Forged(shape="2"), "not a readable torch state dict"),
        (Forged(shape=None), "not a readable torch state dict"),
        (Forged(storage="DoubleTensor"), r"needs torch\.DoubleTensor"),
    ],
)
def test_forged_tensor(tmp_path: Path, forged: Forged, reason: str) -> None:
    path = forge(tmp_path, forged)
    with pytest.raises(InputError, match=reason) as caught:
        TorchReader(path)
    assert str(path) in caught.value.message


def test_tensor_as_a_storage(tmp_path: Path) -> None:
    class Nested:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Forged(), 0, (1,), (1,), False, OrderedDict())

    with pytest.raises(InputError, match="not a readable torch state dict"):
        TorchReader(forge(tmp_path, Nested()))


def test_big_endian_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="big-endian"):
        TorchReader(forge(tmp_path, Forged(), byteorder=b"big"))
    path = tmp_path / "model.bin"
    torch.save({"a": numbered(1)}, path, _use_new_zipfile_serialization=False)
    little = path.read_bytes()
    big = re.sub(rb"(?s)(little_endianq.)\x88", b"\\g<1>\x89", little)
    assert big != little
    path.write_bytes(big)
    with pytest.raises(InputError, match="big-endian"):
        TorchReader(path)


def test_odd_archives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a zip file, not a torch state dict"):
        TorchReader(forge(tmp_path, Forged(), **{"more/data.pkl": b""}))
    path = forge(tmp_path, Forged())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="'a' has no data"):
        TorchReader(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(1, 1)).save(path)
    with pytest.raises(InputError, match="is a TorchScript archive"):
        TorchReader(path)


def test_pickle_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = forge(tmp_path, Forged())
    monkeypatch.setattr("quantcli.checkpoint.torch_pickle.MAX_PICKLE_BYTES", 10)
    with pytest.raises(InputError, match="too much for a state dict"):
        TorchReader(path)


def test_every_truncation_is_refused(save: Save) -> None:
    path = save({"a": numbered(2, 2), "b": numbered(3)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.bin"):
            TorchReader(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.bin is (a )?truncated.*Copy it again"):
        TorchReader(path)


def test_corruption_is_refused_or_harmless(save: Save) -> None:
    path = save({"a": numbered(2, 2), "b": OrderedDict(c=1)})
    whole = path.read_bytes()
    for seed in range(300):
        generator, raw = random.Random(seed), bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            raw[generator.randrange(len(raw))] = generator.randrange(256)
        path.write_bytes(raw)
        with contextlib.suppress(InputError):
            checkpoint = open_checkpoint(path)
            for info in checkpoint.infos():
                assert checkpoint.load(info.name).shape == info.shape


def test_listing_does_not_import_torch(save: Save) -> None:
    path = save({"a": numbered(2, 2)})
    code = (
        "import sys; from pathlib import Path; from quantcli.checkpoint import open_checkpoint;"
        f"print(open_checkpoint(Path({str(path)!r})).infos()[0].name, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["a", "False", "False"]
