"""How long the search for cut points takes, in forwards of the same network.

    python benchmarks/discovery.py [--batch 32] [--rounds 7]

Per network: the median time of a plain forward of the batch (eval mode, no grad) and of `cut_points` on it, taking
turns, and their ratio. Discovery runs on two and three rows of the batch, so the ratio falls as the batch grows.
Needs timm (the extra `vision`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from manifold_mixup import cut_points
from support import define_torchvision_operators

NETWORKS = {
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "mobilenetv3_small_100": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "crossvit_tiny_240": 240,
    "hrnet_w18_small": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    define_torchvision_operators()
    import timm

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch of {arguments.batch}")
    print(f"{'network':24}{'size':>6}{'forward ms':>12}{'discovery ms':>14}{'ratio':>8}")
    for name, size in NETWORKS.items():
        model = timm.create_model(name, num_classes=10).eval()
        x = torch.randn(arguments.batch, 3, size, size)
        plain, discovery = [], []
        for _ in range(arguments.rounds + 1):
            start = time.perf_counter()
            with torch.no_grad():
                model(x)
            middle = time.perf_counter()
            cut_points(model, x)
            plain.append(middle - start)
            discovery.append(time.perf_counter() - middle)
        a, b = statistics.median(plain[1:]), statistics.median(discovery[1:])
        print(f"{name:24}{size:6}{a * 1e3:12.1f}{b * 1e3:14.1f}{b / a:8.2f}", flush=True)


if __name__ == "__main__":
    main()
