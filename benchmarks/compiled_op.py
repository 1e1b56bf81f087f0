"""How the mixing operation should be written for `torch.compile`: forms side by side, as time and as generated code.

    python benchmarks/compiled_op.py [--rounds 15] [--threads 2] [--sizes small] [--code FOLDER]

Forward and backward, compiled by inductor for the CPU, in one process, the forms taking turns in every round. Every
figure is a ratio to the floor of the same round, median [quartiles] over the rounds; the floor is one compiled
`torch.lerp(h, other, λ)` of the same size, whose two operands lie there ready and both get a gradient.

* traced: `manifold_mixup.interpolation.apply_traced`, what a compiled model runs;
* plain: `λ·h + (1 - λ)·h[index]` with autograd's own backward;
* lerp: `torch.lerp` in float32 both ways, the backward a gather by the inverse permutation;
* indexing: as traced, with `h[index]` in place of `index_select`;
* operator: a custom operator around the eager operation, which the compiler does not look into;
* narrow: as traced, in the dtype of h (what half precision would cost less without float32 in between).

Alone, the operation is all that is compiled. In the network it stands between convolution, batch norm and ReLU and the
same again, and the figure is how much longer a step of that network takes than without mixing, in floors. `kernels` are
loops over memory of forward and backward, in the network beyond those that it has without mixing. `atomic` says whether
one of them adds atomically, as the backward of indexing does, for which no permutation has need.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from manifold_mixup.interpolation import Plan, apply_traced
from manifold_mixup.pairing import draw_partner

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SIZES = {
    "full": {"128x64x32x32": (128, 64, 32, 32), "64x197x768": (64, 197, 768)},
    "small": {"32x64x16x16": (32, 64, 16, 16), "16x197x192": (16, 197, 192)},
}
LAM = 0.37

# The compiler makes an object of every autograd function that it traces; torch warns of that.
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)


# ------------------------------------------------------------------ the forms


def traced(h: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
    return apply_traced(h, "permutation", index, inverse, lam)


def plain(h: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    weight = lam.to(wide)
    return (weight * h.to(wide) + (1 - weight) * h[index].to(wide)).to(h.dtype)


def by_inverse(mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Form:
    """An autograd function of which forward and backward are both ``mix(h, index, lam)``."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
            ctx.save_for_backward(inverse, lam)
            return mix(h, index, lam)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
            inverse, lam = ctx.saved_tensors
            return mix(grad, inverse, lam), None, None, None

    return Function.apply


def _lerp(h: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.lerp(h.index_select(0, index).to(wide), h.to(wide), lam.to(wide)).to(h.dtype)


def _indexing(h: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    weight = lam.to(wide)
    return (weight * h.to(wide) + (1 - weight) * h[index].to(wide)).to(h.dtype)


def _narrow(h: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    weight = lam.to(h.dtype)
    return weight * h + (1 - weight) * h.index_select(0, index)


@torch.library.custom_op("manifold_mixup_benchmark::mix", mutates_args=())
def operator(h: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
    out = h.index_select(0, index) if h.is_contiguous() else h.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return torch.lerp(out, h, float(lam))


@operator.register_fake
def _(h: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
    return torch.empty_like(h)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    index, inverse, lam = ctx.saved_tensors
    return operator(grad, inverse, index, lam), None, None, None


operator.register_autograd(_back, setup_context=_keep)

FORMS: dict[str, Form] = {
    "traced": traced,
    "plain": plain,
    "lerp": by_inverse(_lerp),
    "indexing": by_inverse(_indexing),
    "operator": operator,
    "narrow": by_inverse(_narrow),
}


# ------------------------------------------------------------------ what is timed


@dataclass
class Draw:
    """One draw on ``rows`` rows, as tensors."""

    index: Tensor
    inverse: Tensor
    lam: Tensor

    @classmethod
    def new(cls, rows: int) -> Draw:
        partner = draw_partner("random", rows, torch.Generator().manual_seed(0))
        return cls(partner.indices, partner.turned.indices, torch.tensor(LAM, dtype=torch.float64))


class Network(nn.Module):
    """Convolution, batch norm and ReLU before the mixing and after it; linear layers where the rows are tokens."""

    def __init__(self, shape: tuple[int, ...], form: Form | None) -> None:
        super().__init__()
        images, width = len(shape) == 4, shape[1] if len(shape) == 4 else shape[2]
        layer: Any = (lambda: nn.Conv2d(width, width, 1)) if images else (lambda: nn.Linear(width, width))
        norm: Any = nn.BatchNorm2d if images else nn.LayerNorm
        self.before = nn.Sequential(layer(), norm(width), nn.ReLU())
        self.after = nn.Sequential(layer(), norm(width), nn.ReLU())
        self.form = form

    def forward(self, x: Tensor, index: Tensor, inverse: Tensor, lam: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(h if self.form is None else self.form(h, index, inverse, lam))


@dataclass
class Contender:
    """A compiled forward and backward, with what inductor made of it."""

    run: Callable[[], None]
    kernels: int
    atomic: bool

    @classmethod
    def new(cls, name: str, operation: Callable[[], Tensor], grad: Tensor, codes: Path | None) -> Contender:
        def run() -> None:
            operation().backward(grad)

        _, code = run_and_get_code(run)
        text = "\n".join(code)
        if codes:
            (codes / f"{name}.py").write_text(text, encoding="utf-8")
        return cls(run, text.count("async_compile.cpp_pybinding("), "atomic_add" in text or "index_put" in text)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def ready(t: Tensor, channels_last: bool) -> Tensor:
    t = t.to(memory_format=torch.channels_last) if channels_last else t
    return t.requires_grad_()


def contenders(label: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, codes: Path | None) -> Any:
    torch.manual_seed(0)
    draw = Draw.new(shape[0])
    h, other, grad = (ready(torch.randn(shape, dtype=dtype), channels_last) for _ in range(3))
    grad = grad.detach()

    def alone(name: str, function: Callable[..., Tensor], *arguments: Tensor) -> Contender:
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def operation() -> Tensor:
            h.grad = other.grad = None
            return compiled(h, *arguments)

        return Contender.new(f"{label}-{name}", operation, grad, codes)

    def inside(name: str, form: Form | None) -> Contender:
        torch.manual_seed(0)
        network = Network(shape, form).to(dtype)
        network = network.to(memory_format=torch.channels_last) if channels_last else network
        compiled = torch.compile(network, fullgraph=True, dynamic=False)

        def operation() -> Tensor:
            network.zero_grad()
            return compiled(h.detach(), draw.index, draw.inverse, draw.lam)

        return Contender.new(f"{label}-network-{name}", operation, grad, codes)

    weight = draw.lam.to(dtype)
    found = {"floor": alone("floor", lambda h, other: torch.lerp(h, other, weight), other)}
    found |= {name: alone(name, form, draw.index, draw.inverse, draw.lam) for name, form in FORMS.items()}
    found |= {"network": inside("none", None)}
    return found | {f"network {name}": inside(name, form) for name, form in FORMS.items()}


def check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All forms are the same map: against the eager plan."""
    draw, h = Draw.new(shape[0]), torch.randn(shape, dtype=dtype)
    partner = draw_partner("random", shape[0], torch.Generator().manual_seed(0))
    expected = Plan.mix(partner, LAM).run(h)
    for form in FORMS.values():
        torch.testing.assert_close(form(h, draw.index, draw.inverse, draw.lam), expected, rtol=2e-2, atol=2e-2)


def measure(label: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, options: Any) -> None:
    torch._dynamo.reset()
    check(shape, dtype)
    found = contenders(label.replace(" ", "-"), shape, dtype, channels_last, options.code)
    times: dict[str, list[float]] = {name: [] for name in found}
    for contender in found.values():
        contender.run()
    for _ in range(options.rounds):
        for name, contender in found.items():
            times[name].append(contender.seconds())

    def ratio(values: list[float]) -> str:
        low, middle, high = statistics.quantiles((v / f for v, f in zip(values, times["floor"], strict=True)), n=4)
        return f"{middle:5.2f} [{low:5.2f}, {high:5.2f}]"

    floor = statistics.median(times["floor"]) * 1e3
    print(
        f"\n{label}: floor {floor:.1f} ms with {found['floor'].kernels} kernels, "
        f"network {ratio(times['network'])} floors"
    )
    print(f"{'':10}{'alone':>22}{'kernels':>9}{'atomic':>8}{'in the network':>24}{'kernels':>9}{'atomic':>8}")
    for name in FORMS:
        alone, inside = found[name], found[f"network {name}"]
        added = [a - b for a, b in zip(times[f"network {name}"], times["network"], strict=True)]
        print(
            f"{name:10}{ratio(times[name]):>22}{alone.kernels:>9}{'yes' if alone.atomic else 'no':>8}{ratio(added):>24}"
            f"{inside.kernels - found['network'].kernels:>+9}{'yes' if inside.atomic else 'no':>8}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--only", default="", help="only the rows whose name contains this")
    parser.add_argument("--code", type=Path, help="write the generated code into this folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.code:
        options.code.mkdir(parents=True, exist_ok=True)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    for name, shape in SIZES[options.sizes].items():
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                label = f"{name} {str(dtype).removeprefix('torch.')}{' channels-last' if channels_last else ''}"
                if options.only in label:
                    measure(label, shape, dtype, channels_last, options)


if __name__ == "__main__":
    main()
