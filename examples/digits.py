"""A small convolutional network for handwritten digits, trained here in seconds, with data to calibrate and test it.

Run: python examples/digits.py FOLDER

The data are scikit-learn's 1797 scanned digits of 8 x 8 pixels: two thirds to train on, a third held out. FOLDER
gets digits.onnx (any batch size), calibration.npz (training images) and test.npz (held-out images and labels).
The network itself is a MODEL too: quantcli eval examples.digits:model FOLDER/digits.onnx --data FOLDER/test.npz
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from quantcli import evaluate
from quantcli.export.export import export_to_onnx

EPOCHS, BATCH = 12, 64
FILES = ("digits.onnx", "calibration.npz", "test.npz")


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images ``[n, 1, 8, 8]`` from 0 to 1, held-out images, and the labels of both."""
    pixels, labels = load_digits(return_X_y=True)
    scaled = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return tuple(train_test_split(scaled, labels, test_size=1 / 3, random_state=0, stratify=labels))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


@cache
def model() -> nn.Module:
    """The trained network: images in, a score for each of ten digits out."""
    train, _, labels, _ = images()
    threads = torch.get_num_threads()
    # Sums of one thread always come in the same order, so that every run gives the same network.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(
                *_block(1, 32), *_block(32, 64), nn.MaxPool2d(2), *_block(64, 128),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
            )  # fmt: skip
            _fit(network, torch.from_numpy(train), torch.from_numpy(labels))
    finally:
        torch.set_num_threads(threads)
    network.example_input_array = torch.from_numpy(train[:2])
    return network.eval()


def _fit(network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    batches = EPOCHS * -(-len(inputs) // BATCH)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            loss = nn.functional.cross_entropy(network(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def prepare(folder: Path) -> Path:
    """Put the files into ``folder`` unless they are there, and return the folder."""
    if all((folder / name).is_file() for name in FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train, test, _, labels = images()
    name = export_to_onnx(f"{'digits' if __name__ == '__main__' else __name__}:model", folder).path.name
    np.savez(folder / "calibration.npz", input=train)
    np.savez(folder / "test.npz", input=test, labels=labels)
    (folder / name).replace(folder / "digits.onnx")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = prepare(Path(sys.argv[1]))
    report = evaluate(target / "digits.onnx", data=str(target / "test.npz"), task="classification")
    print(f"{target}: {report.models[0].metrics['top1']:.2%} of the held-out digits are recognized.")
