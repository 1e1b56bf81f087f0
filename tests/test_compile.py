"""Under `torch.compile` the mixer gives eager's numbers, in one graph, and compiles nothing once S has been seen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manifold_mixup import ManifoldMixup, errors
from networks import Mlp, PreActResNet, Transformer

# The compiler makes an object of every autograd function that it traces, and looks at the grad of what is no leaf:
# torch warns of the one, and hides the other warning from users, but not from a filter that makes warnings errors.
# Inductor imports modules of torch that use what torch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

NETWORKS = [Mlp, PreActResNet, Transformer]
ROWS, MOST, AFTER = 8, 60, 50
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "example": {"per": "example"},
    "halves": {"pairing": "halves"},
    "pairs of halves": {"pairing": "halves", "per": "example"},
    "two batches": {"pairing": "two-batches"},
    "with repetition": {"pairing": lambda y, generator: torch.randint(len(y), (len(y),), generator=generator)},
    "now and then": {"probability": 0.7},
}
Step = Callable[[Any, Any], Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def loss_of(run: Callable[[Any], Tensor]) -> Step:
    return lambda x, y: F.cross_entropy(run(x), y, reduction="none").mean()


class Pair:
    """A network and its twin with mixers that draw alike; one is compiled, the other runs eagerly."""

    def __init__(self, model: nn.Module, layers: Any = None, **arguments: Any) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        self.layers: Any = layers or ["input", *(name for name, _ in model.pieces() if name)]
        self.arguments = {"layers": self.layers, "seed": 0, **arguments}
        self.reference = ManifoldMixup(self.twin, **self.arguments)
        self.mixup: ManifoldMixup | None = None

    def attach(self, to: nn.Module | None = None) -> None:
        self.mixup = ManifoldMixup(self.model if to is None else to, **self.arguments)

    def check_step(self, step: Step, eager: Step, x: Tensor, y: Tensor, tolerance: float) -> None:
        """One backward by each: the same loss and the same gradients."""
        losses = []
        for model, mixup, act in ((self.model, self.mixup, step), (self.twin, self.reference, eager)):
            losses.append(act(*mixup(x, y)))
            model.zero_grad()
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
        for mine, reference in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, rtol=10 * tolerance, atol=10 * tolerance)

    def check_training(self, step: Step, network: type[nn.Module], tolerance: float, eager: Step | None = None) -> None:
        """Both train until all of S has been seen, and then 50 steps more in which nothing may be compiled."""
        if self.mixup is None:
            self.attach()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (self.model, self.twin)]
        dtype = next(self.model.parameters()).dtype
        wanted = {*self.layers, *([None] if self.mixup.probability < 1 else [])}
        seen: set[str | None] = set()

        def one() -> None:
            x, y = network.batch(ROWS).to(dtype), torch.randint(3, (ROWS,))
            self.check_step(step, eager or loss_of(self.twin), x, y, tolerance)
            for optimizer in optimizers:
                optimizer.step()

        # The first step does not count: what is a number there (the target's λ, if the loss is compiled, too) is taken
        # for a constant, and the compiler learns in the second step that it is not.
        one()
        for _ in range(MOST):
            one()
            drawn = self.mixup.last.layer
            seen.update(drawn if isinstance(drawn, list) else [drawn])
            if wanted <= seen:
                break
        assert wanted <= seen
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(AFTER):
                one()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert not torch._dynamo.utils.counters["graph_break"]
        for mine, reference in zip(self.model.buffers(), self.twin.buffers(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=10 * tolerance, atol=10 * tolerance)


def slowly(*rows: Any) -> list[Any]:
    return [pytest.param(*row, marks=[pytest.mark.slow]) for row in rows]


# ------------------------------------------------------------------ the numbers of eager, nothing recompiled

FAST = [(Mlp, "batch"), (Mlp, "example"), (PreActResNet, "batch"), (Transformer, "example")]
REST = [(Mlp, way) for way in WAYS if way not in ("batch", "example")] + [
    (PreActResNet, "example"),
    (Transformer, "batch"),
]


@pytest.mark.parametrize(("network", "way"), [*FAST, *slowly(*REST)])
def test_compiled_equals_eager_in_one_graph_and_recompiles_nothing(network, way):
    pair = Pair(network().double(), **WAYS[way])
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    pair.check_training(loss_of(compiled), network, 1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("network", "way"), [*FAST, *REST])
def test_inductor_equals_eager_in_one_graph_and_recompiles_nothing(network, way):
    pair = Pair(network(), **WAYS[way])
    compiled = torch.compile(pair.model, fullgraph=True)
    pair.check_training(loss_of(compiled), network, 1e-5)


HOW = ["before", "after", "in place before", "in place after", "without fullgraph"]


@pytest.mark.parametrize(
    ("how", "backend"),
    [("before", "aot_eager"), ("in place before", "aot_eager"), *slowly(*itertools.product(HOW, ["inductor"]))],
)
def test_every_way_to_compile_a_model_is_the_same(how, backend):
    options = {"backend": backend, "fullgraph": how != "without fullgraph"}
    pair = Pair(Mlp(), ["input", "second"])
    run = pair.model
    if how.endswith("after"):
        pair.attach()
    if how.startswith("in place"):
        pair.model.compile(**options)
    else:
        run = torch.compile(pair.model, **options)
    if not how.endswith("after"):
        pair.attach(run)
    pair.check_training(loss_of(run), Mlp, 1e-5)


@pytest.mark.slow
def test_reduce_overhead_is_plain_inductor_where_there_are_no_cuda_graphs():
    pair = Pair(Mlp(), ["input", "second"])
    compiled = torch.compile(pair.model, fullgraph=True, mode="reduce-overhead")
    pair.check_training(loss_of(compiled), Mlp, 1e-5)


@pytest.mark.parametrize("network", [Mlp, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))])
def test_a_model_compiled_and_run_before_the_mixer_came_mixes_or_is_an_error(network):
    pair = Pair(network(), "auto")
    compiled = torch.compile(pair.model, backend="eager")
    x, y = Mlp.batch(ROWS), torch.randint(3, (ROWS,))
    compiled(x), pair.twin(x)
    pair.attach()
    for _ in range(6):
        inputs, target = pair.mixup(x, y)
        expected = pair.twin(pair.reference(x, y)[0])
        try:
            output = compiled(inputs)
            loss = F.cross_entropy(output, target)
        except errors.LayerNotReached:
            continue
        torch.testing.assert_close(output, expected)
        assert loss.isfinite()


def test_evaluation_between_the_steps_does_not_mix_and_training_goes_on_with_the_same_graphs():
    pair = Pair(Mlp().double(), ["input"])
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    pair.check_training(loss_of(compiled), Mlp, 1e-9)
    x, y = Mlp.batch(ROWS).double(), torch.randint(3, (ROWS,))
    pair.model.eval()
    torch.testing.assert_close(compiled(x), copy.deepcopy(pair.twin).eval()(x))
    pair.model.train()
    with torch.compiler.set_stance("fail_on_recompile"):
        pair.check_step(loss_of(compiled), loss_of(pair.twin), x, y, 1e-9)


@pytest.mark.slow
def test_more_layers_than_the_compiler_keeps_graphs_need_a_higher_limit():
    """One graph for every layer of S: Dynamo keeps eight for a function unless it is told to keep more."""
    pair = Pair(nn.Sequential(*(nn.Linear(6, 6) for _ in range(11))).double(), [str(i) for i in range(10)])
    compiled = torch.compile(pair.model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=16):
        pair.check_training(loss_of(compiled), Mlp, 1e-9)


# ------------------------------------------------------------------ the loss inside the compiled function

LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]).double()),
    "by the target": lambda output, y: y.loss(nn.NLLLoss(), output.log_softmax(1)),
    "soft labels": lambda output, y: F.cross_entropy(output, y.soft(3, dtype=output.dtype)) + y.accuracy(output),
}


@pytest.mark.parametrize("loss", ["module", "soft labels", *slowly(["function"], ["by the target"])])
def test_model_and_loss_in_one_graph(loss):
    pair, criterion = Pair(Mlp().double(), ["input", "second"]), LOSSES[loss]
    step = torch.compile(lambda x, y: criterion(pair.model(x), y), backend="aot_eager", fullgraph=True)
    pair.check_training(step, Mlp, 1e-9, eager=lambda x, y: criterion(pair.twin(x), y))


# ------------------------------------------------------------------ together with checkpointing and autocast


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.head.weight.sum()  # reentrant checkpointing wants an input with a gradient
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def checkpointed(reentrant: bool, **arguments: Any) -> Pair:
    pair = Pair(Checkpointed(reentrant).double(), ["input", "blocks.1.0", "blocks.2"], **arguments)
    pair.twin.reentrant = None
    return pair


@pytest.mark.parametrize(
    ("reentrant", "way"), [(False, "batch"), *slowly((False, "example"), (True, "batch"), (True, "example"))]
)
def test_a_checkpointed_network_in_one_graph(reentrant, way):
    """Dynamo's checkpoint takes no side effects, such as counting what was mixed, unless it is told to."""
    pair = checkpointed(reentrant, **WAYS[way])
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        pair.check_training(loss_of(torch.compile(pair.model, backend="aot_eager", fullgraph=True)), Mlp, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_network_stays_right_where_dynamo_does_not_compile_it(reentrant):
    pair = checkpointed(reentrant)
    pair.attach()
    compiled = torch.compile(pair.model, backend="aot_eager")
    for _ in range(8):
        x, y = Mlp.batch(ROWS).double(), torch.randint(3, (ROWS,))
        pair.check_step(loss_of(compiled), loss_of(pair.twin), x, y, 1e-9)


@pytest.mark.parametrize(
    ("backend", "way"), [("aot_eager", "batch"), *slowly(("inductor", "batch"), ("inductor", "example"))]
)
def test_compiled_under_autocast(backend, way):
    pair = Pair(Mlp(), ["input", "first"], **WAYS[way])
    compiled = torch.compile(pair.model, backend=backend, fullgraph=True)

    def cast(run: nn.Module) -> Step:
        def step(x: Tensor, y: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output = run(x)
            return F.cross_entropy(output.float(), y, reduction="none").mean()

        return step

    # bfloat16 has 8 bits, and compiled code rounds less often than eager does.
    pair.check_training(cast(compiled), Mlp, 2e-2, eager=cast(pair.twin))
