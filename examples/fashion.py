r"""A small depthwise-separable network for pictures of clothes, and its data: what quantization-aware training is for.

Run: python examples/fashion.py FOLDER

The data are Fashion-MNIST's 70,000 labelled pictures of 28 x 28 pixels, as the Debian package dataset-fashion-mnist
installs them; where it is not installed, scikit-learn's 1797 digits. FOLDER gets weights.safetensors, train.npz and
test.npz. The network is trained here, in some minutes; it is a MODEL as well:

    quantcli convert fashion:network --weights FOLDER/weights.safetensors -o FOLDER/fashion.onnx \
        --recipe configs/cnn-w4a8-qat.yaml --data FOLDER/train.npz
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FILES = ("weights.safetensors", "train.npz", "test.npz")
EPOCHS, BATCH = 6, 128


def data_name() -> str:
    """What `data` gives here."""
    return "Fashion-MNIST" if PACKAGE.is_dir() else "scikit-learn's digits (dataset-fashion-mnist is not installed)"


def data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``train`` and ``test``: pictures float32 ``[n, 1, height, width]`` from -1 to 1, and labels."""
    if PACKAGE.is_dir():
        return {name: (_images(PACKAGE, part), _labels(PACKAGE, part)) for name, part in _PARTS.items()}
    pixels, labels = load_digits(return_X_y=True)
    scaled = (pixels / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    first, second, ours, theirs = train_test_split(scaled, labels, test_size=1 / 3, random_state=0, stratify=labels)
    return {"train": (first, ours), "test": (second, theirs)}


_PARTS = {"train": "train", "test": "t10k"}


def _images(folder: Path, part: str) -> np.ndarray:
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16)
    return (pixels.reshape(-1, 1, 28, 28) / np.float32(127.5) - 1).astype(np.float32)


def _labels(folder: Path, part: str) -> np.ndarray:
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """A filter for each channel, then a mixture of channels: MobileNet's block (arXiv:1704.04861)."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    ]


def network() -> nn.Module:
    """The network, untrained: pictures in, a score for each of ten classes out."""
    layers = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
        *_separable(24, 48, 2), *_separable(48, 96, 2), *_separable(96, 96, 1), *_separable(96, 96, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    layers.example_input_array = torch.zeros(2, 1, *[28 if PACKAGE.is_dir() else 8] * 2)
    return layers.eval()


def fit(layers: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train in floating point."""
    optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    layers.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layers(images[rows]), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    layers.eval()


def write(folder: Path) -> None:
    """Train the network, unless it is there, and write its weights and the data."""
    if all((folder / name).is_file() for name in FILES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = data()
    for name, (images, labels) in found.items():
        np.savez(folder / f"{name}.npz", input=images, labels=labels)
    images, labels = (torch.from_numpy(values) for values in found["train"])
    torch.manual_seed(0)
    layers = network()
    fit(layers, images, labels)
    save_file(layers.state_dict(), folder / "weights.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
