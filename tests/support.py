"""What tests need of their surroundings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_kept: list[torch.library.Library] = []  # the operators live as long as the object that defined them


def define_torchvision_operators() -> None:
    """Declare the operators that torchvision's Python code registers rules for, where its C++ library cannot load.

    PyPI's torchvision is built for CUDA. Beside a CPU build of PyTorch its library does not load, and the import fails
    because ``torchvision::nms`` does not exist. The tests use no such operator, so that it is known is enough.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(found.origin).parent.glob("_C*.*"):
            torch.ops.load_library(str(library))
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
