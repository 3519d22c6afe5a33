"""Every example in docs/ runs: commands on small models under the names that the pages use, recipes by being read.

A block marked ``console`` holds commands, which run in the order of the page; one marked ``yaml`` is a whole recipe.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import golden
from support.tiny_decoders import save_decoder
from support.tokenizers import WORDS, save_tokenizer

from quantcli import convert
from quantcli.cli.app import main
from quantcli.planning.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: Pages whose examples export a model or train one.
SLOW = {"onnx", "qat", "algorithms", "bench", "containers", "recipes", "decoders", "transformers-js"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

MODULE = """
import torch

class Network(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x)

def function():
    torch.manual_seed(0)
    return Network(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10),
    ).eval()

def metric(outputs, labels):
    return {"mean": float(outputs[0]["logits"].mean())}
"""


def blocks(page: Path, language: str) -> list[str]:
    return [text for tag, text in _BLOCK.findall(page.read_text()) if tag == language]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, without ``quantcli`` and without comments."""
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the pages' names mean something."""
    # Groups of 64, as the pages have them, divide every layer.
    monkeypatch.setattr(golden, "INTERMEDIATE", 128)
    models = tmp_path / "built"
    golden.build(models)
    for name, source in {"MODEL": "llama", "ENCODER": "bert"}.items():
        save_tokenizer(models / source)
        config = json.loads((models / source / "config.json").read_text())
        (models / source / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
        (models / source).rename(tmp_path / name)
    save_decoder("llama", tmp_path / "LLM")
    (models / "cnn.onnx").rename(tmp_path / "MODEL.onnx")
    generator = np.random.default_rng(0)
    words = generator.choice(WORDS, (80, 30))
    (tmp_path / "text.txt").write_text("\n".join(" ".join(line) for line in words))
    for name in ("calibration", "train", "test"):
        pictures = generator.standard_normal((24, 3, 16, 16)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=pictures, labels=generator.integers(0, 10, 24))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(MODULE)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _state_dict(place: Path) -> None:
    import runpy

    import torch

    torch.save(runpy.run_path(str(place / "package" / "module.py"))["function"]().state_dict(), place / "weights.pt")


def _marked(page: Path) -> object:
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])


@pytest.mark.parametrize("page", [_marked(page) for page in PAGES if commands(page)])
def test_commands_run(page: Path, place: Path, no_runtime_check: None, capsys: pytest.CaptureFixture[str]) -> None:
    _state_dict(place)
    convert(place / "MODEL", place / "ARTIFACT", scheme="int4", group_size=32)
    for line in commands(page):
        arguments, redirected = (line[:-2], line[-1]) if line[-2] == ">" else (line, None)
        capsys.readouterr()
        status = main([*arguments, "--quiet"])
        captured = capsys.readouterr()
        assert status == 0, f"{shlex.join(arguments)}: {captured.err}"
        if redirected is not None:
            Path(redirected).write_text(captured.out)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.stem)
def test_recipes_are_valid(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        load_recipe(recipe)


def test_every_recipe_in_configs_is_on_the_page_about_recipes() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [path.name for path in (ROOT / "configs").iterdir() if f"`configs/{path.name}`" not in page] == []


def test_only_known_languages_mark_blocks() -> None:
    """Another mark would leave an example out without a word."""
    marks = {tag for page in PAGES for tag, _ in _BLOCK.findall(page.read_text())}
    assert marks <= {"console", "yaml", "text", "python", "js"}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
