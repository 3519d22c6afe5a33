"""Modules of plain torch through the block-sequential engine: their outputs, their inputs' names, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.artifacts import decoded_file, quantize_inputs
from support.tokenizers import tokenizer
from torch import Tensor, nn

from quantcli import convert
from quantcli.blocks.calls import Call
from quantcli.cli.app import main
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import validate
from quantcli.ptq.folds import find_folds, holds

CODE = '''
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, activation=torch.relu):
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(width), activation
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    def forward(self, x):
        return x + self.down(self.activation(self.up(self.norm(x))))

class Wide(Block):
    pass

class Stack(nn.Module):
    """Rows of features; the input has no name for callers."""
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList([Block(64) for _ in range(3)])
        self.register_buffer("before", torch.zeros(32))
        self.behind = nn.BatchNorm1d(16)
    def forward(self, x, /):
        x = self.first(x - self.before)
        for block in self.blocks:
            x = block(x)
        return self.behind(self.last(x))

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
    def forward(self, x, mask):
        split = lambda y: y.unflatten(-1, (4, -1)).transpose(1, 2)
        parts = split(self.query(x)), split(self.key(x)), split(self.value(x))
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.mlp = Attention(width), Block(width)
        self.norm = nn.LayerNorm(width)
    def forward(self, states, mask):
        return self.mlp(states + self.attention(self.norm(states), mask))

class Encoder(nn.Module):
    """Token ids and a mask that it must have; layers are called with names; the output is a dict, its head is tied."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Layer(64) for _ in range(2)])
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, tokens, attention_mask):
        mask = attention_mask[:, None, None].bool()
        states = self.embed(tokens)
        for layer in self.layers:
            states = layer(mask=mask, states=states)
        return {"scores": self.head(states), "states": states}

class Mixture(nn.Module):
    """Sends every token to one expert."""
    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList([Block(width) for _ in range(4)])
    def forward(self, x, chosen):
        result = x.clone()
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                result[chosen == number] = expert(x[chosen == number])
        return result

class Experts(nn.Module):
    """The last expert is never chosen."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixture(64) for _ in range(2)])
    def forward(self, x):
        chosen = x[..., :3].argmax(-1)
        for layer in self.layers:
            x = layer(x, chosen)
        return x

class Ties(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(32) for _ in range(2)])
        self.layers[1].up.weight = self.layers[0].up.weight
    def forward(self, x):
        return self.layers[1](self.layers[0](x))

class Chunked(nn.Module):
    """Tokens first, samples second."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(32) for _ in range(2)])
    def forward(self, x):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)

class Torchs(nn.Module):
    """Layers of torch's own, whose attention never calls its linear layers."""
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    def forward(self, x):
        return self.encoder(x)

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([Block(32) for _ in range(2)])
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

stack, encoder, experts, ties, chunked, torchs, text = Stack, Encoder, Experts, Ties, Chunked, Torchs, Text

def sequence():
    return nn.Sequential(*[Block(32) for _ in range(3)])

def flat():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

def unequal():
    return nn.Sequential(nn.Linear(32, 32), nn.Sequential(Block(32), Wide(32)))

def switches():
    """Blocks of the same modules, which do different things with them."""
    return nn.Sequential(Block(32), Block(32, nn.functional.gelu), Block(32))

def wrong():
    return "no module"
'''

#: Modules that are lists themselves.
SEQUENTIAL = ("sequence", "flat", "unequal", "switches")
GROUPS = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the modules' code is."""
    place = tmp_path_factory.mktemp("nets")
    (place / "plain_nets.py").write_text(CODE)
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def network(name: str) -> nn.Module:
    """A module whose activations have outliers, as those of trained ones do."""
    torch.manual_seed(0)
    built: nn.Module = getattr(import_module("plain_nets"), name)().eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(torch.exp(1.2 * torch.randn(parameter.shape)))
            if name == "switches" and key.endswith("up.weight"):
                parameter.mul_(torch.exp(1.2 * torch.randn(len(parameter), 1)))
    return built


def weights_of(name: str, place: Path) -> Path:
    """Its weights in a file; of tied ones, the first."""
    state = {key: part.clone() for key, part in network(name).state_dict().items() if key != "head.weight"}
    save_file(state, place / f"{name}.safetensors")
    return place / f"{name}.safetensors"


def inputs_of(name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs with few degrees of freedom, as data has."""
    rng = np.random.default_rng(seed)
    if name == "encoder":
        ids = rng.integers(0, 50, (count, 12)) // rng.integers(1, 9, (count, 1))
        return {"tokens": ids, "attention_mask": np.ones_like(ids)}
    mix = np.random.default_rng(0).standard_normal((6, 64 if name == "experts" else 32))
    rows = (count,) if name in ("stack", "flat") else (count, 10)
    noise = 0.1 * rng.standard_normal((*rows, mix.shape[1]))
    return {"input" if name in SEQUENTIAL else "x": (rng.standard_normal((*rows, 6)) @ mix + noise).astype("f4")}


def data_for(name: str, place: Path, count: int = 64, seed: int = 1) -> Path:
    np.savez(place / f"{name}.npz", **inputs_of(name, count, seed))
    return place / f"{name}.npz"


def converted(name: str, out: Path, data: Path | None = None, **recipe: Any) -> Path:
    """Convert a module's weights into a single file in a folder of its own."""
    out.mkdir()
    wishes = validate({"scheme": GROUPS, "rest": "keep"} | recipe, "recipe")
    convert(
        f"plain_nets:{name}", out / "model.safetensors", weights=weights_of(name, out.parent), recipe=wishes, data=data
    )
    return out / "model.safetensors"


def outputs(model: nn.Module, name: str) -> Tensor:
    """What a module makes of inputs that nothing was calibrated on."""
    found: Any = None
    with torch.no_grad():
        found = model(*map(torch.from_numpy, inputs_of(name, 40, 2).values()))
    return found["scores"] if isinstance(found, dict) else found  # type: ignore[no-any-return]


def error(name: str, artifact: Path, method: str, *, dynamic: bool = False) -> float:
    """Relative squared error of an artifact's outputs, its codes decoded by others' code."""
    model, wanted = network(name), outputs(network(name), name)
    missing, unexpected = model.load_state_dict(decoded_file(artifact, method), strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}
    if name == "encoder":
        model.head.weight = model.embed.weight  # type: ignore[union-attr]
    if dynamic:
        quantize_inputs(model, artifact.parent)
    return float((outputs(model, name) - wanted).square().mean() / wanted.square().mean())


def notes(artifact: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries of layers."""
    with safe_open(artifact, "pt") as opened:
        return json.loads(opened.metadata()["quantcli"])["layers"]  # type: ignore[no-any-return]


CASES = {
    "gptq": ("gptq", GROUPS),
    "awq": ("awq", GROUPS),
    "autoround": ("compressed-tensors", GROUPS),
    "tune": ("compressed-tensors", GROUPS),
    "smoothquant": ("compressed-tensors", "int8-dynamic"),
}
STEPS: dict[str, list[Any]] = {
    "autoround": [{"autoround": {"iterations": 40}}],
    "tune": ["gptq", {"tune": {"batch_size": 8}}],
}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *product(["stack", "encoder"], CASES),
        # Nothing is folded into experts that no token reaches, so smoothquant leaves these as they are.
        *product(["experts"], ["gptq", "awq", "autoround", "tune"]),
        ("sequence", "gptq"),
    ],
)
def test_outputs_are_nearer_than_with_plain_rounding(tmp_path: Path, name: str, algorithm: str) -> None:
    form, scheme = CASES[algorithm]
    steps = STEPS.get(algorithm, [algorithm])
    data = data_for(name, tmp_path, count=32 if name == "experts" else 64)
    found = converted(name, tmp_path / "found", data, scheme=scheme, format=form, steps=steps)
    plain = converted(name, tmp_path / "plain", scheme=scheme, format=form, algorithm="rtn")
    ours, theirs = (error(name, each, form, dynamic=scheme == "int8-dynamic") for each in (found, plain))
    assert 0 < ours < 0.8 * theirs


def test_experts_that_see_no_token(tmp_path: Path) -> None:
    artifact = converted("experts", tmp_path / "out", data_for("experts", tmp_path), steps=["gptq"])
    codes = {name: entry for name, entry in notes(artifact).items() if name.endswith(("up.weight", "down.weight"))}
    assert len(codes) == 2 * 4 * 2
    for name, entry in codes.items():
        unseen = ".experts.3." in name
        assert entry["algorithm"] == ("mse" if unseen else "gptq")
        assert entry.get("note") == ("no token seen: mse in place of gptq" if unseen else None)


def test_folds_of_one_block_need_not_hold_in_another() -> None:
    alike: Any = network("switches")
    call = Call(torch.randn(2, 10, 32))
    folds = find_folds(alike[0], call, ["up", "down"])
    assert [fold.source for fold in folds] == ["norm", "up"]
    assert [holds(block, call, folds) for block in alike] == [True, False, True]
    assert all(torch.equal(part, network("switches").state_dict()[name]) for name, part in alike.state_dict().items())


def test_blocks_of_the_same_modules_with_other_code(tmp_path: Path) -> None:
    data = data_for("switches", tmp_path)
    found = converted("switches", tmp_path / "found", data, scheme="int8-dynamic", steps=["smoothquant"])
    plain = converted("switches", tmp_path / "plain", scheme="int8-dynamic", algorithm="rtn")
    ours, theirs = (error("switches", each, "compressed-tensors", dynamic=True) for each in (found, plain))
    assert ours < 0.5 * theirs


def test_what_torchs_own_layers_hide_is_rounded_plainly(tmp_path: Path) -> None:
    data = data_for("torchs", tmp_path)
    found = converted("torchs", tmp_path / "found", data, algorithm="gptq")
    hidden = "encoder.layers.1.self_attn.out_proj.weight"
    assert notes(found)[hidden]["note"] == "inputs not observed: mse in place of gptq"
    assert notes(found)["encoder.layers.1.linear2.weight"]["algorithm"] == "gptq"
    plain = converted("torchs", tmp_path / "plain", algorithm="rtn")
    form = "compressed-tensors"
    assert error("torchs", found, form) < 0.8 * error("torchs", plain, form)
    static = converted("torchs", tmp_path / "static", data, scheme="int8-static", algorithm="rtn")
    assert notes(static)[hidden]["reason"] == "in no layer of its own, where the range of inputs is not observed"
    assert "encoder.layers.1.linear2.input_scale" in load_file(static)


def test_blocks_are_named_in_a_recipe(tmp_path: Path) -> None:
    data = data_for("unequal", tmp_path)
    artifact = converted("unequal", tmp_path / "named", data, algorithm="gptq", blocks=["1"])
    entries = notes(artifact)
    assert {entries[f"1.{block}.{layer}.weight"]["algorithm"] for block in "01" for layer in ("up", "down")} == {"gptq"}
    assert entries["0.weight"]["algorithm"] == "mse"
    with pytest.raises(UsageError, match=r"'body' names no list of modules\. This model's lists are 1\."):
        converted("unequal", tmp_path / "other", data, algorithm="gptq", blocks=["body"])


@pytest.mark.parametrize(
    ("name", "algorithm", "message"),
    [
        (
            "flat",
            "autoround",
            r"No list of equal .* autoround learns from one block after the other.*gptq or awq",
        ),
        ("ties", "gptq", r"layers\.0\.up\.weight, layers\.1\.up\.weight are one weight in Ties.*--skip layers\.0\.up"),
        ("chunked", "autoround", r"of shape \[10, \d+, 32\] for \d+ samples, and autoround .*batch_first=True"),
    ],
)
def test_modules_that_cannot_be_run_block_by_block(tmp_path: Path, name: str, algorithm: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        converted(name, tmp_path / "out", data_for(name, tmp_path), algorithm=algorithm)


def test_what_shares_no_weight_or_looks_at_all_samples_goes_on(tmp_path: Path) -> None:
    skipped = converted("ties", tmp_path / "ties", data_for("ties", tmp_path), algorithm="gptq", skip=["*.up"])
    assert notes(skipped)["layers.1.down.weight"]["algorithm"] == "gptq"
    turned = converted("chunked", tmp_path / "turned", data_for("chunked", tmp_path), algorithm="gptq")
    assert notes(turned)["layers.0.up.weight"]["algorithm"] == "gptq"


def damaged(name: str, place: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    state = load_file(weights_of(name, place))
    edit(state)
    save_file(state, place / "damaged.safetensors")
    return place / "damaged.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("blocks.1.up.weight"), r"does not fit Stack of .*: it lacks blocks\.1\.up\.weight\."),
        (lambda state: state.pop("behind.running_mean"), r"it lacks behind\.running_mean\."),
        (lambda state: state.update({"module.x": torch.ones(2)}), r"the module has no module\.x\."),
        (
            lambda state: state.update({"before": torch.ones(2)}),
            r"before is \[2\] and \[32\] in the module\. .*state_dict",
        ),
    ],
    ids=["missing", "missing buffer", "unknown", "shape"],
)
def test_weights_that_do_not_fit(tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    weights, data = damaged("stack", tmp_path, edit), data_for("stack", tmp_path)
    with pytest.raises(InputError, match=message):
        convert(
            "plain_nets:stack", tmp_path / "o.safetensors", weights=weights, scheme="int4", algorithm="gptq", data=data
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_stored_buffers_are_the_modules_own_while_it_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcli.training.tuning import ModelTuning

    seen: dict[str, Tensor] = {}
    original = ModelTuning.run

    def run(self: ModelTuning, *args: Any) -> Any:
        seen.update({name: buffer.clone() for name, buffer in self.skeleton.module.named_buffers()})
        return original(self, *args)

    monkeypatch.setattr(ModelTuning, "run", run)
    stored = {"before": torch.arange(32.0), "behind.running_mean": torch.arange(16.0)}
    weights = damaged("stack", tmp_path, lambda state: state.update(stored))
    recipe = validate({"scheme": GROUPS, "steps": ["gptq", {"tune": {"batch_size": 32}}]}, "recipe")
    out = tmp_path / "out.safetensors"
    convert("plain_nets:stack", out, weights=weights, recipe=recipe, data=data_for("stack", tmp_path))
    assert all(torch.equal(seen[name], values) for name, values in stored.items())


@pytest.mark.parametrize("steps", [["gptq"], ["awq", {"autoround": {"iterations": 3}}]], ids=["gptq", "chain"])
def test_an_interrupted_conversion_continues(tmp_path: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_for("encoder", tmp_path)
    wanted = converted("encoder", tmp_path / "wanted", data, steps=steps)
    weights = weights_of("encoder", tmp_path)
    options: dict[str, Any] = {"weights": weights, "data": data, "threads": 1}
    options["recipe"] = validate({"scheme": GROUPS, "rest": "keep", "steps": steps}, "recipe")
    out = tmp_path / "out" / "model.safetensors"
    out.parent.mkdir()

    def stop(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("plain_nets:encoder", out, progress=stop, **options)
    journal = out.parent / f".{out.name}.partial" / "journal.jsonl"
    assert '"layers.0.mlp.up.weight"' in journal.read_text() and '"layers.1.mlp.up.weight"' not in journal.read_text()
    with pytest.raises(UsageError, match="begun with another recipe, input or version"):
        convert("plain_nets:Encoder", out, **options)
    convert("plain_nets:encoder", out, **options)
    assert out.read_bytes() == wanted.read_bytes()


def test_without_data_it_is_the_file_that_is_converted(tmp_path: Path) -> None:
    weights, out = weights_of("stack", tmp_path), tmp_path / "out.safetensors"
    arguments = ["--scheme", "int4", "--format", "gptq", "--group-size", "32", "--quiet"]
    assert main(["convert", "plain_nets:stack", "--weights", str(weights), "-o", str(out), *arguments]) == 0
    assert main(["convert", str(weights), "-o", str(tmp_path / "file.safetensors"), *arguments]) == 0
    assert out.read_bytes() == (tmp_path / "file.safetensors").read_bytes()
    # The name of the output tells as well that it is no ONNX.
    plain = ["convert", "plain_nets:stack", "--weights", str(weights), "-o", str(tmp_path / "half.safetensors")]
    assert main([*plain, "--scheme", "fp16", "--quiet"]) == 0
    assert load_file(tmp_path / "half.safetensors")["last.weight"].dtype == torch.float16


def test_state_dicts_of_torch(tmp_path: Path) -> None:
    weights, data = tmp_path / "w.pt", data_for("encoder", tmp_path)
    torch.save(network("encoder").state_dict(), weights)
    recipe = validate({"scheme": GROUPS, "rest": "keep", "algorithm": "gptq"}, "recipe")
    convert("plain_nets:encoder", tmp_path / "out.safetensors", weights=weights, recipe=recipe, data=data)
    wanted = converted("encoder", tmp_path / "wanted", data, algorithm="gptq")
    found, other = load_file(tmp_path / "out.safetensors"), load_file(wanted)
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name], other[name]) for name in other)


def test_text_by_another_folders_tokenizer(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, causal=False)
    (tmp_path / "data.txt").write_text("a b c d\ne f g h i j\n" * 8)
    options: dict[str, Any] = {"weights": weights_of("text", tmp_path), "data": tmp_path / "data.txt"}
    options["recipe"] = validate({"scheme": GROUPS, "algorithm": "gptq"}, "recipe")
    with pytest.raises(InputError, match=r"is text, and there is no tokenizer.*--tokenizer FOLDER"):
        convert("plain_nets:text", tmp_path / "out.safetensors", **options)
    convert("plain_nets:text", tmp_path / "out.safetensors", tokenizer=words, **options)
    assert notes(tmp_path / "out.safetensors")["layers.1.down.weight"]["algorithm"] == "gptq"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["plain_nets:stack", "--format", "gptq"],
            2,
            "plain_nets:stack is code, .* --weights FILE, or use --format onnx",
        ),
        (["plain_nets:no", "--weights", "w"], 3, "plain_nets has no no"),
        (["plain_nets:stack", "--weights", "absent.pt"], 3, "absent.pt does not exist"),
        (
            ["plain_nets:wrong", "--weights", "{}", "--data", "d.npz", "--algorithm", "gptq"],
            3,
            "returned str, not a torch",
        ),
        (["plain_nets:stack", "--weights", "{}", "--algorithm", "gptq"], 2, "gptq needs calibration data"),
        (["plain_nets:stack", "--weights", "{}", "--data", "{}.npz"], 3, "does not exist"),
        (["{}", "--weights", "{}"], 2, "--weights is for a model that is package.module:function"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    given = [each.format(weights_of("stack", tmp_path)) for each in arguments]
    out = tmp_path / "out.safetensors"
    assert main(["convert", *given, "-o", str(out), "--scheme", "int4"]) == status
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not out.exists()


def test_data_that_does_not_fit_the_modules_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", y=np.zeros((3, 32), np.float32))
    with pytest.raises(InputError, match=r"x: any tensor is expected, got nothing; y is no input"):
        converted("stack", tmp_path / "a", tmp_path / "d.npz", algorithm="gptq")
    np.savez(tmp_path / "e.npz", x=np.zeros((3, 31), np.float32))
    with pytest.raises(InputError, match=r"Stack cannot be run on the calibration data \(x \[3, 31\]\)"):
        converted("stack", tmp_path / "b", tmp_path / "e.npz", algorithm="gptq")
