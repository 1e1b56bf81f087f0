"""The networks whose training steps are timed, with random weights and batches of random data.

Sizes are chosen so that a step on two cores takes between a twentieth of a second and half of one: batches of 32,
PreActResNet18 as in the paper's CIFAR runs, ResNet-50 on 64 x 64 and ViT-Tiny on 96 x 96 images, BERT-Tiny on 64
tokens.
``quick`` builds the same kinds of networks so small that a step takes milliseconds, to try the scripts.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import define_torchvision_operators

CLASSES = 10


@dataclass(frozen=True)
class Network:
    """How to build a network and a batch for it; ``optimizer`` takes the parameters."""

    name: str
    build: Callable[[bool], nn.Module]  # quick or not
    batch: Callable[[bool], Any]  # what the model takes: a tensor, or a mapping of keyword arguments
    optimizer: Callable[[Any], torch.optim.Optimizer]
    channels_last: bool = False
    compiled: bool = False  # whether the default run compiles it, which takes minutes for the large ones


class PreActBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice; the projection reads the normalised input (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + skip


class PreActResNet18(nn.Module):
    """The paper's CIFAR network: four stages of two blocks. Written here, so that this needs nothing but PyTorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            blocks = PreActBlock(inputs, outputs, 2 if stage > 1 else 1), PreActBlock(outputs, outputs, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            h = stage(h)
        return self.head(h.mean((2, 3)))


def _timm(name: str, **sizes: Any) -> nn.Module:
    define_torchvision_operators()
    import timm

    return timm.create_model(name, num_classes=CLASSES, **sizes)


def _bert(quick: bool) -> nn.Module:
    define_torchvision_operators()
    import transformers

    hidden = 32 if quick else 128
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        vocab_size=100 if quick else 30522,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def _images(size: int, quick_size: int) -> Callable[[bool], Tensor]:
    return lambda quick: torch.randn(4, 3, quick_size, quick_size) if quick else torch.randn(32, 3, size, size)


def _tokens(masked: bool) -> Callable[[bool], Mapping[str, Tensor]]:
    def batch(quick: bool) -> Mapping[str, Tensor]:
        rows, length = (4, 8) if quick else (32, 64)
        tokens = {"input_ids": torch.randint(100, (rows, length))}
        if masked:  # right padding; a quarter of the tokens on average
            ends = torch.randint(length // 2, length + 1, (rows, 1))
            tokens["attention_mask"] = (torch.arange(length) < ends).long()
        return tokens

    return batch


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    # The fused kernels are the fastest: what mixing adds is set against the shortest step there is.
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


NETWORKS = {
    network.name: network
    for network in (
        Network(
            "preact_resnet18",
            lambda quick: PreActResNet18(4 if quick else 64),
            _images(32, 8),
            _sgd,
            channels_last=True,
            compiled=True,
        ),
        Network(
            "resnet50",
            lambda quick: _timm("resnet50", **({"layers": (1, 1, 1, 1), "base_width": 8} if quick else {})),
            _images(64, 32),
            _sgd,
            channels_last=True,
        ),
        Network(
            "vit_tiny",
            lambda quick: _timm(
                "vit_tiny_patch16_224",
                **({"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2} if quick else {"img_size": 96}),
            ),
            _images(96, 32),
            _adamw,
        ),
        Network("bert_tiny", _bert, _tokens(masked=False), _adamw, compiled=True),
        Network("bert_tiny_mask", _bert, _tokens(masked=True), _adamw),
    )
}
