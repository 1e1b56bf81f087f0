"""A forward that leaves no trace on the model."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no grad; afterwards modes, buffers and every random state are what they were."""
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    held = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, b, b.detach().clone(), b._version) for m, name, b in held]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    devices = {t.device for t in [*parameters, *(b for _, _, b in held)]}
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    fast = torch.backends.mha.get_fastpath_enabled()  # fused layers and nested tensors, which training never takes
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real forward says it again
        stack.enter_context(
            torch.random.fork_rng(accelerators, device_type=accelerators[0].type if accelerators else "cuda")
        )
        if "torch._dynamo" in sys.modules:  # importing it takes a second, and nothing is compiled before it is
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, content, version in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(content)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
