"""Small networks that also tell how to run them by hand, piece by piece, for the exactness tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Piece = tuple[str | None, Callable[[Tensor], Tensor]]


class Net(nn.Module):
    """Modules and a forward ``(net, *inputs) -> output`` that a test may replace."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._forward(self, *args, **kwargs)


class Mlp(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def pieces(self) -> list[Piece]:
        return [("first", self.first), ("second", self.second), (None, self.head)]

    @staticmethod
    def batch(n: int) -> Tensor:
        return torch.randn(n, 6)


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))


class PreActResNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.layer1, self.layer2 = Block(4), Block(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))

    def pieces(self) -> list[Piece]:
        tail: Piece = (None, lambda h: self.head(h.mean((2, 3))))
        return [("stem", self.stem), ("layer1", self.layer1), ("layer2", self.layer2), tail]

    @staticmethod
    def batch(n: int) -> Tensor:
        return torch.randn(n, 2, 5, 5)


class Transformer(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=bool(i)) for i in range(2)
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))

    def pieces(self) -> list[Piece]:
        blocks: list[Piece] = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        return [("embed", self.embed), *blocks, (None, lambda h: self.head(h.mean(1)))]

    @staticmethod
    def batch(n: int) -> Tensor:
        return torch.randn(n, 4, 5)


class Recurrent(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.lstm1 = nn.LSTM(5, 6, batch_first=True)
        self.lstm2 = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm1(x)
        h, _ = self.lstm2(h)
        return self.head(h[:, -1])

    def pieces(self) -> list[Piece]:
        return [
            ("lstm1", lambda h: self.lstm1(h)[0]),
            ("lstm2", lambda h: self.lstm2(h)[0]),
            (None, lambda h: self.head(h[:, -1])),
        ]

    @staticmethod
    def batch(n: int) -> Tensor:
        return torch.randn(n, 4, 5)


NETWORKS = [Mlp, PreActResNet, Transformer, Recurrent]
