"""``.pt2`` files that would run code: torch's own loader does, and ours refuses them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.models.program_file import is_arithmetic, load_program


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = torch.ones(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.layer(x) * self.scale
        return {"y": y.reshape(-1), "rows": 2 * y.shape[0]}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a free size, a constant, an absent input and an example."""
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    torch.export.save(torch.export.export(_Net(), (torch.ones(4, 4),), dynamic_shapes=shapes), path)
    return path


Change = Callable[[dict[str, bytes]], None]


def changed(program: Path, place: Path, change: Change) -> Path:
    """A copy whose parts, by name without the archive's own, a function changes in place."""
    with zipfile.ZipFile(program) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    prefix = next(iter(parts)).partition("/")[0]
    inner = {name.removeprefix(f"{prefix}/"): content for name, content in parts.items()}
    change(inner)
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in inner.items():
            archive.writestr(f"{prefix}/{name}", content)
    return place


def edited(change: Callable[[Any], None], part: str = "models/model.json") -> Change:
    def edit(parts: dict[str, bytes]) -> None:
        document = json.loads(parts[part])
        change(document)
        parts[part] = json.dumps(document).encode()

    return edit


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def pickled_inputs(marker: Path) -> Change:
    def put(parts: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(((torch.ones(4, 4), _Exploit(marker)), {}), buffer)
        parts["data/sample_inputs/model.pt"] = buffer.getvalue()

    return put


def pickled_weight(marker: Path) -> Change:
    def put(parts: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        torch.save(_Exploit(marker), buffer)
        parts["data/weights/weight_0"] = buffer.getvalue()

    def declare(document: Any) -> None:
        document["config"]["layer.weight"]["use_pickle"] = True

    def both(parts: dict[str, bytes]) -> None:
        put(parts)
        edited(declare, "data/weights/model_weights_config.json")(parts)

    return both


def opaque_constant(marker: Path) -> Change:
    def put(parts: dict[str, bytes]) -> None:
        parts["data/constants/opaque_obj_0"] = pickle.dumps(_Exploit(marker))

        def declare(document: Any) -> None:
            document["config"]["scale"]["path_name"] = "opaque_obj_0"

        edited(declare, "data/constants/model_constants_config.json")(parts)

    return put


def expression(marker: Path) -> Change:
    text = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def put(parts: dict[str, bytes]) -> None:
        model = parts["models/model.json"].decode()
        first = model.index('"expr_str": "') + len('"expr_str": "')
        parts["models/model.json"] = (model[:first] + text + model[model.index('"', first) :]).encode()

    return put


def guard(marker: Path) -> Change:
    text = f"__import__('pathlib').Path({str(marker)!r}).touch() is None"
    return edited(lambda document: document.update(guards_code=[text]))


def library(marker: Path) -> Change:
    return lambda parts: parts.update({"data/aotinductor/model/a.so": b"\x7fELF"})


def input_name(marker: Path) -> Change:
    text = f"x=__import__('pathlib').Path({str(marker)!r}).touch()"

    def rename(document: Any) -> None:
        renamed = json.dumps(document).replace('"name": "x"', json.dumps({"name": text})[1:-1])
        document.clear()
        document.update(json.loads(renamed))

    return edited(rename)


def test_an_honest_program_is_loaded(program: Path) -> None:
    loaded = load_program(program)
    found = loaded.module()(torch.ones(5, 4))
    assert found["y"].shape == (15,) and found["rows"] == 10


HOSTILE = {
    "pickled inputs": (pickled_inputs, "cannot be loaded"), "pickled weight": (pickled_weight, "cannot be loaded"),
    "opaque constant": (opaque_constant, "holds a pickled object"), "size": (expression, "which is no arithmetic"),
    "guard": (guard, "which is no arithmetic"), "library": (library, "holds a compiled library"),
    "name": (input_name, "which is none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_a_program_is_run(program: Path, tmp_path: Path, kind: str) -> None:
    make, said = HOSTILE[kind]
    path = changed(program, tmp_path / "bad.pt2", make(tmp_path / "marker"))
    with pytest.raises(InputError, match=said) as error:
        load_program(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["pickled inputs", "pickled weight", "size", "guard"])
def test_torch_itself_would_run_it(program: Path, tmp_path: Path, kind: str) -> None:
    path = changed(program, tmp_path / "bad.pt2", HOSTILE[kind][0](tmp_path / "marker"))
    try:
        torch.export.load(path).module()(torch.ones(4, 4))
    except Exception as error:  # whatever it says, it is too late
        assert str(error)
    assert (tmp_path / "marker").exists()


def test_a_part_that_occurs_twice(program: Path, tmp_path: Path) -> None:
    path = changed(program, tmp_path / "bad.pt2", lambda parts: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(InputError, match="occurs twice"):
        load_program(path)


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("Mul(Integer(2), Symbol('s77', positive=True, integer=True))", True), ("2*s0 + 1", True),
        ("L['args'][0][0].size()[0] >= 2", True), ("exec(s0)", False), ("(1).__class__", False),
        ("[a for a in b]", False), ("lambda: 1", False), ("Symbol('a').func.mro()", False), ("(", False),
        ("f'{a}'", False), ("a := 3", False),
    ],
)  # fmt: skip
def test_what_is_arithmetic(text: str, harmless: bool) -> None:
    assert is_arithmetic(text) is harmless
