"""Small torch models that are exported to ONNX: a convolutional network, an encoder layer, one with two inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10
#: Shape of one sample of each, by the name of its function here.
SHAPES = {"cnn": (3, 12, 12), "encoder": (8, 64)}


def _unit(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Convolutional(nn.Module):
    """Ordinary, depthwise and pointwise convolutions, a residual sum, pooling, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 32, kernel_size=3, padding=1)
        self.deep = nn.Sequential(_unit(32, 32, kernel_size=3, padding=1, groups=32), _unit(32, 64, kernel_size=1))
        self.body = _unit(64, 64, kernel_size=3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.max_pool2d(self.deep(self.stem(x)), 2)
        hidden = hidden + self.body(hidden)
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


class Encoder(nn.Module):
    """One layer of a transformer, and scores of classes from the mean of its tokens."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.mixed(self.first(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Pair(nn.Module):
    """Two inputs, two outputs: scores and features."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(64, 128), nn.Linear(32, 128), nn.Linear(128, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.left(a) + self.right(b))
        return {"logits": self.head(features), "features": features}


class Untraceable(nn.Module):
    """What it computes depends on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.example_input_array = torch.ones(2, 64)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        while float(found.abs().max()) > 1:
            found = found / 2
        return found


def _prepared(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Norms with statistics of their own, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                assert values is not None
                values.uniform_(low, high, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    # Scores that differ, as after training.
    network.head.weight.data *= 8
    network.example_input_array = torch.randn(2, *shape, generator=generator)
    return network.eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return _prepared(Convolutional(), SHAPES["cnn"])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return _prepared(Encoder(), SHAPES["encoder"])


def pair() -> nn.Module:
    torch.manual_seed(0)
    network = Pair().eval()
    network.example_input_array = (torch.randn(2, 64), torch.randn(2, 32))
    return network


def untraceable() -> nn.Module:
    return Untraceable()
