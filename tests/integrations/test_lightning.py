"""The Lightning callback: the run equals a hand-written loop bit for bit, and nothing stays behind."""

from __future__ import annotations

import copy
import os
import pickle
import runpy
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manifold_mixup import ManifoldMixup, MixedTarget
from manifold_mixup.errors import (
    AlreadyAttached,
    BatchMismatch,
    DiscoveryFailed,
    LayerNotReached,
    MixedTargetMisuse,
    UnsupportedModel,
)
from networks import Mlp

pytest.importorskip("lightning")

import lightning.pytorch as lightning
import lightning_resume as runs

from manifold_mixup.integrations.lightning import ManifoldMixupCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
PREPARE = "from support import define_torchvision_operators; define_torchvision_operators()\n"
LAYERS = ["input", "first", "second"]
ARGUMENTS = {"alpha": 1.0, "layers": LAYERS, "seed": 5}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(lightning.LightningModule):
    """An ordinary LightningModule, which knows nothing of mixing: the network is its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = Mlp()
        self.first, self.second, self.head = net.first, net.second, net.head

    def forward(self, x):
        return self.head(self.second(self.first(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        assert isinstance(y, torch.Tensor)
        logits = self(x)
        self.log("loss", F.cross_entropy(logits, y), batch_size=len(y))
        self.log("accuracy", (logits.argmax(1) == y).double().mean(), batch_size=len(y))

    test_step = validation_step


class Holder(lightning.LightningModule):
    """The other habit: the network is a child, and training_step calls it by its name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Mlp()
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch[0]), batch[1])

    configure_optimizers = Classifier.configure_optimizers


class Recorder(lightning.Callback):
    """What the mixer drew, and what other callbacks are given."""

    def __init__(self, callback: ManifoldMixupCallback) -> None:
        self.callback, self.draws, self.batches = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.draws.append((self.callback.mixup.last.layer, self.callback.mixup.last.lam))
        self.batches.append(batch)


class Loader:
    """Batches as they are; Lightning takes a bare list for several loaders."""

    def __init__(self, data: list) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def batches(count: int = 5, rows: int = 8) -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator))
        for _ in range(count)
    ]


def fit(module, callback, data=None, validation=None, more=(), **trainer):
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [callback, *more], **trainer})
    trainer.fit(module, Loader(data or batches()), Loader(validation) if validation else None)
    return trainer


def by_hand(module, data=None, *, epochs: int = 2, accumulate: int = 1, network=None, step=None, **arguments):
    """The loop that Lightning runs, written out."""
    mixup = ManifoldMixup(network or module, **{**ARGUMENTS, **arguments})
    optimizer = module.configure_optimizers()
    module.train()
    draws, data = [], data or batches()
    for _ in range(epochs):
        for i, batch in enumerate(data):
            mixed = mixup(*batch)
            loss = step(mixed) if step else F.cross_entropy((network or module)(mixed[0]), mixed[1])
            if i % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(data):
                optimizer.step()
            draws.append((mixup.last.layer, mixup.last.lam))
    mixup.remove()
    return draws


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(one: nn.Module, other: nn.Module) -> bool:
    """Equal to rounding; what mixing changes is larger than that by orders of magnitude."""
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def untouched(module: nn.Module) -> bool:
    """No hook on any module and no method replaced; ``forward`` may stay as Lightning puts it back: bound."""
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()]
    forward = vars(module).get("forward", module.forward)
    own = getattr(forward, "__func__", None) is type(module).forward
    return not any(hooks) and "training_step" not in vars(module) and own


def test_an_unchanged_module_is_trained_as_by_hand_bit_for_bit():
    callback = ManifoldMixupCallback(**ARGUMENTS)
    recorder, data = Recorder(callback), batches()
    ours, theirs = Validated(), Classifier()
    trainer = fit(ours, callback, data, batches(2), [recorder])
    draws = by_hand(theirs, data)
    assert recorder.draws == draws
    assert {layer for layer, _ in draws} == set(LAYERS)
    assert same(ours, theirs)
    plain = Classifier()
    lightning.Trainer(**QUIET, max_epochs=2).fit(plain, Loader(data))
    assert not same(ours, plain)
    # Validation is that of the network as it stands, and other callbacks see the batch as it came.
    theirs.eval()
    logits = [theirs(x) for x, _ in batches(2)]
    labels = torch.cat([y for _, y in batches(2)])
    assert trainer.callback_metrics["accuracy"] == (torch.cat(logits).argmax(1) == labels).double().mean()
    assert torch.allclose(trainer.callback_metrics["loss"], F.cross_entropy(torch.cat(logits), labels), atol=1e-6)
    assert all(seen[1] is given[1] for seen, given in zip(recorder.batches, data * 2, strict=True))
    assert untouched(ours)


def test_no_mixing_is_lightning_without_the_callback():
    ours, plain = Classifier(), Classifier()
    fit(ours, ManifoldMixupCallback(**{**ARGUMENTS, "alpha": 0}))
    lightning.Trainer(**QUIET, max_epochs=2).fit(plain, Loader(batches()))
    assert same(ours, plain)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradient_accumulation(accumulate):
    ours, theirs = Classifier(), Classifier()
    fit(ours, ManifoldMixupCallback(**ARGUMENTS), accumulate_grad_batches=accumulate)
    by_hand(theirs, accumulate=accumulate)
    assert same(ours, theirs)


@pytest.mark.parametrize("model", [None, "net"])
def test_a_network_that_is_a_child(model):
    ours, theirs = Holder(), Holder()
    fit(ours, ManifoldMixupCallback(model=model, **ARGUMENTS))
    by_hand(theirs, network=theirs.net)
    assert same(ours, theirs)
    assert untouched(ours)


def test_calling_forward_directly_mixes_as_well():
    class Direct(Classifier):
        def training_step(self, batch):
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    ours, theirs = Direct(), Classifier()
    fit(ours, ManifoldMixupCallback(**ARGUMENTS))
    by_hand(theirs)
    assert same(ours, theirs)


def test_layers_are_found_on_the_first_batch_and_options_reach_the_mixer():
    callback = ManifoldMixupCallback(0.5, per="example", probability=0.7, seed=3)
    seen = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, *_):
            seen.append((callback.mixup.layers, callback.mixup.per, callback.mixup.probability, callback.mixup.alpha))

    class PerExample(Classifier):
        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none").mean()

    fit(PerExample(), callback, more=[Look()])
    reference = ManifoldMixup(Classifier()).discover(batches()[0][0])
    assert seen == [(reference, "example", 0.7, 0.5)] * 10


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    ("make", "names", "places"),
    [
        (lambda x, y: [x, y], (0, 1), {}),
        (Pair, (0, 1), {}),
        (lambda x, y: (y, x), (1, 0), {"target": 0}),
        (lambda x, y: (x, y, torch.arange(len(y))), (0, 1), {"target": 1, "inputs": 0}),
        (lambda x, y: {"image": x, "label": y}, ("image", "label"), {"target": "label"}),
        (lambda x, y: {"x": x, "y": y, "file": ["name"] * len(y)}, ("x", "y"), {"target": "y"}),
        (lambda x, y: {"a": x, "y": y, "id": torch.arange(len(y))}, ("a", "y"), {"target": "y", "inputs": ["a"]}),
    ],
)
def test_batches_of_many_forms(make, names, places):
    kinds = set()

    class Other(Classifier):
        def training_step(self, batch):
            kinds.add((type(batch), type(batch[names[1]])))
            return F.cross_entropy(self(batch[names[0]]), batch[names[1]])

    ours, theirs, data = Other(), Classifier(), batches()
    given = [make(x, y) for x, y in data]
    fit(ours, ManifoldMixupCallback(**places, **ARGUMENTS), given)
    by_hand(theirs, data)
    assert same(ours, theirs)
    assert kinds == {(type(given[0]), MixedTarget)}
    assert isinstance(given[0][names[1]], torch.Tensor)


def test_a_network_of_two_inputs_by_position_and_by_keyword():
    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, a, b):
            return self.head(torch.relu(self.a(a) + self.b(b)))

        def training_step(self, batch):
            if isinstance(batch, dict):
                return F.cross_entropy(self(b=batch["b"], a=batch["a"]), batch["y"])
            return F.cross_entropy(self(*batch[:2]), batch[2])

        configure_optimizers = Classifier.configure_optimizers

    data = [(x, x.flip(1), y) for x, y in batches()]
    arguments = {**ARGUMENTS, "layers": ["input"]}
    one, two, theirs = Two(), Two(), Two()
    fit(one, ManifoldMixupCallback(target=2, **arguments), data)
    fit(two, ManifoldMixupCallback(target="y", **arguments), [dict(zip("aby", row, strict=True)) for row in data])
    by_hand(
        theirs,
        [(row[:2], row[2]) for row in data],
        layers=["input"],
        step=lambda b: theirs.training_step((*b[0], b[1])),
    )
    assert same(one, theirs)
    assert same(two, theirs)


def test_two_batches_give_one():
    ours, theirs = Classifier(), Classifier()
    fit(ours, ManifoldMixupCallback(pairing="two-batches", probability=0.5, **ARGUMENTS))
    draws = by_hand(theirs, pairing="two-batches", probability=0.5)
    assert {layer for layer, _ in draws} >= {None, "input"}
    assert same(ours, theirs)


def test_soft_targets_for_losses_that_know_nothing_else():
    class Soft(Classifier):
        def training_step(self, batch):
            assert type(batch[1]) is torch.Tensor
            return -(batch[1] * self(batch[0]).log_softmax(1)).sum(1).mean()

    ours, theirs = Soft(), Classifier()
    fit(ours, ManifoldMixupCallback(soft_targets=3, **ARGUMENTS))
    by_hand(theirs)
    assert close(ours, theirs)


def test_soft_targets_without_mixed_features_are_refused():
    class Elsewhere(Holder):
        def training_step(self, batch):
            h = self.net.second(self.net.first(batch[0]))
            return -(batch[1] * self.net.head(h).log_softmax(1)).sum(1).mean()

    with pytest.raises(LayerNotReached):
        fit(Elsewhere(), ManifoldMixupCallback(soft_targets=3, **ARGUMENTS))


def test_manual_optimization():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    ours, theirs = Manual(), Classifier()
    ours.automatic_optimization = False
    fit(ours, ManifoldMixupCallback(**ARGUMENTS))
    by_hand(theirs)
    assert same(ours, theirs)


def test_an_optimizer_that_evaluates_its_closure_again_sees_one_draw():
    class Searching(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3, line_search_fn=None, lr=0.01)

        def training_step(self, batch):
            targets.append(batch[1])
            return super().training_step(batch, 0)

    targets: list[MixedTarget] = []
    callback = ManifoldMixupCallback(**ARGUMENTS)
    recorder = Recorder(callback)
    fit(Searching(), callback, max_epochs=1, more=[recorder])
    lams = [target.lam for target in targets]
    assert len(lams) > len(recorder.draws)
    assert list(dict.fromkeys(lams)) == [lam for _, lam in recorder.draws]


def test_the_same_batch_object_again_is_a_new_draw():
    class Still(Classifier):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch  # Lightning's own makes a new tuple

    callback = ManifoldMixupCallback(**ARGUMENTS)
    recorder = Recorder(callback)
    fit(Still(), callback, batches(1) * 6, max_epochs=1, more=[recorder])
    assert len({id(batch) for batch in recorder.batches}) == 1
    assert len({lam for _, lam in recorder.draws}) == 6


def test_bf16_mixed_equals_autocast_by_hand():
    ours, theirs = Classifier(), Classifier()
    fit(ours, ManifoldMixupCallback(**ARGUMENTS), precision="bf16-mixed")

    def step(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(theirs(batch[0]), batch[1])

    by_hand(theirs, step=step)
    assert same(ours, theirs)
    full = Classifier()
    by_hand(full)
    assert not same(ours, full)


def test_training_forwards_outside_of_training_step_do_not_mix():
    x = batches(1, rows=3)[0][0]  # mixed, it would be refused: the batch has other rows

    class Statistics(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert pl_module.training
            plain = copy.deepcopy(pl_module)
            assert torch.equal(pl_module(x), plain(x))

    fit(Classifier(), ManifoldMixupCallback(**ARGUMENTS), more=[Statistics()])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_module_that_is_kept_in_eval_mode_stays_so_and_is_not_mixed():
    ours, plain = Classifier().eval(), Classifier().eval()
    fit(ours, ManifoldMixupCallback(**ARGUMENTS))
    lightning.Trainer(**QUIET, max_epochs=2).fit(plain, Loader(batches()))
    assert not ours.training
    assert same(ours, plain)


def test_copies_made_while_training_have_their_own_methods_and_never_mix():
    class Copying(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for copied in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
                assert copied.training_step.__self__ is copied
                assert copied.forward.__self__ is copied
                x, y = batches(1)[0]
                again = copy.deepcopy(copied)
                assert torch.equal(copied.training_step((x, y), 0), F.cross_entropy(again(x), y))

    callback = ManifoldMixupCallback(**ARGUMENTS)
    fit(Classifier(), callback, max_epochs=1, more=[Copying()])
    assert isinstance(pickle.loads(pickle.dumps(callback)), ManifoldMixupCallback)


def test_validation_by_the_same_trainer_and_a_second_fit_that_goes_on():
    callback, twice = ManifoldMixupCallback(**ARGUMENTS), Validated()
    trainer = fit(twice, callback, validation=batches(2), max_epochs=1)
    trainer.validate(twice, Loader(batches(2)), verbose=False)
    trainer.test(twice, Loader(batches(2)), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, Loader(batches()), Loader(batches(2)))
    theirs = Classifier()
    optimizer = theirs.configure_optimizers()
    theirs.configure_optimizers = lambda: optimizer  # Lightning makes a new one for the second fit
    mixup = ManifoldMixup(theirs, **ARGUMENTS)
    for epoch in range(2):
        if epoch:
            optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
        for batch in batches():
            x, y = mixup(*batch)
            optimizer.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            optimizer.step()
    assert same(twice, theirs)


def test_another_training_with_the_same_callback_begins_at_the_seed():
    callback = ManifoldMixupCallback(**ARGUMENTS)
    first, second = Classifier(), Classifier()
    fit(first, callback)
    fit(second, callback)
    assert same(first, second)


@pytest.mark.parametrize("place", ["training_step", "validation_step", "callback", "interrupt"])
def test_nothing_is_left_after_a_fit_that_raised(place):
    class Fails(Validated):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if place == "training_step" and batch_idx == 1:
                raise RuntimeError("deliberate")
            if place == "interrupt" and batch_idx == 1:
                raise KeyboardInterrupt
            return loss

        def validation_step(self, batch, batch_idx):
            if place == "validation_step" and not self.trainer.sanity_checking:
                raise RuntimeError("deliberate")

    class Callback(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if place == "callback" and batch_idx == 1:
                raise RuntimeError("deliberate")

    module, callback = Fails(), ManifoldMixupCallback(**ARGUMENTS)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if place == "interrupt" else RuntimeError):
            fit(module, callback, validation=batches(1), more=[Callback()])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert untouched(module)
    assert callback.mixup is None
    ManifoldMixup(module)  # no other mixer holds it


def test_methods_that_were_replaced_before_are_put_back():
    module = Classifier()
    step = module.training_step = lambda batch, batch_idx: F.cross_entropy(module(batch[0]), batch[1])
    theirs = Classifier()
    fit(module, ManifoldMixupCallback(**ARGUMENTS))
    by_hand(theirs)
    assert same(module, theirs)
    assert module.training_step is step


def test_the_other_package_works_as_well():
    pytest.importorskip("pytorch_lightning")
    import pytorch_lightning

    assert not issubclass(ManifoldMixupCallback, pytorch_lightning.Callback)

    class Old(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = Mlp().children()

        forward, training_step = Classifier.forward, Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    ours, theirs = Old(), Classifier()
    pytorch_lightning.Trainer(**QUIET, max_epochs=2, callbacks=[ManifoldMixupCallback(**ARGUMENTS)]).fit(
        ours, Loader(batches())
    )
    by_hand(theirs)
    assert same(ours, theirs)


@pytest.mark.slow
def test_the_callback_is_one_of_the_package_in_use():
    code = """
import sys, pytorch_lightning
from manifold_mixup.integrations.lightning import ManifoldMixupCallback
assert issubclass(ManifoldMixupCallback, pytorch_lightning.Callback)
assert "lightning" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- resuming, ranks, compilers


def test_a_run_that_stopped_in_mid_epoch_goes_on_with_the_same_draws(tmp_path):
    full, draws, _ = runs.run(tmp_path / "full")
    runs.run(tmp_path / "part", stop_at=runs.SAVED + 1)
    again, rest, _ = runs.run(tmp_path / "part", resume=True)
    assert rest == {step: draw for step, draw in draws.items() if step > runs.SAVED}
    assert same(again, full)
    assert len(set(draws.values())) == len(draws) == runs.EPOCHS * runs.STEPS_PER_EPOCH


@pytest.mark.slow
def test_a_run_that_was_killed_in_mid_epoch_goes_on_with_the_same_draws(tmp_path):
    full, draws, _ = runs.run(tmp_path / "full")
    killed = subprocess.run(
        [sys.executable, HERE / "lightning_resume.py", "killed", tmp_path], env=ENVIRONMENT, timeout=240
    )
    assert killed.returncode == -signal.SIGKILL
    saved = sorted(int(path.stem.partition("=")[2]) for path in tmp_path.glob("*.ckpt"))
    assert saved[-1] == runs.SAVED < runs.KILLED - 1
    again, rest, _ = runs.run(tmp_path, resume=True)
    assert rest == {step: draw for step, draw in draws.items() if step > runs.SAVED}
    assert same(again, full)


@pytest.mark.slow
def test_two_ranks_draw_differently_share_weights_and_resume(tmp_path):
    subprocess.run(
        [sys.executable, HERE / "lightning_resume.py", "ddp", tmp_path], check=True, env=ENVIRONMENT, timeout=240
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert not set(ranks[0]["draws"].values()) & set(ranks[1]["draws"].values())
    for result in ranks:
        assert result["resumed"] == {step: d for step, d in result["draws"].items() if step > runs.SAVED}
        for name, weight in result["weights"].items():
            assert torch.equal(weight, ranks[0]["weights"][name])
            assert torch.equal(weight, result["again"][name])
    # The same by hand, in one process: the mean of the gradients of both.
    module, loaders = runs.Classifier(), [runs.loader(rank) for rank in (0, 1)]
    optimizer, states, mixup = module.configure_optimizers(), [], None
    for rank in (0, 1):
        mixup = ManifoldMixup(module, alpha=1.0, layers=LAYERS, seed=5 + 0x9E3779B97F4A7C15 * rank)
        mixup.discover(next(iter(runs.loader()))[0])
        states.append(mixup.state_dict())
        if rank == 0:
            mixup.remove()
    for _ in range(runs.EPOCHS):
        for pair in zip(*loaders, strict=True):
            optimizer.zero_grad()
            for rank, batch in enumerate(pair):
                mixup.load_state_dict(states[rank])
                (module.training_step(mixup(*batch))["loss"] / 2).backward()
                states[rank] = mixup.state_dict()
            optimizer.step()
    for name, weight in module.state_dict().items():
        assert torch.allclose(weight, ranks[0]["weights"][name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_networks(whole):
    torch._dynamo.reset()
    ours, theirs = Holder(), Holder()
    if whole:
        module = torch.compile(Classifier(), backend="eager")
        theirs = Classifier()
    else:
        ours.net = torch.compile(ours.net, backend="eager")
        module = ours
    fit(module, ManifoldMixupCallback(**ARGUMENTS))
    by_hand(theirs, network=None if whole else theirs.net)
    trained = module._orig_mod if whole else ours.net._orig_mod
    assert close(trained, theirs if whole else theirs.net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.modules())


# ---------------------------------------------------------------- errors


def test_using_the_target_as_a_tensor_names_what_to_use():
    class Logging(Classifier):
        def training_step(self, batch):
            return (self(batch[0]).argmax(1) == batch[1]).float().mean()

    with pytest.raises(MixedTargetMisuse, match=r"target\.accuracy\(logits\).*target\.y are the unmixed labels"):
        fit(Logging(), ManifoldMixupCallback(**ARGUMENTS))


def test_a_torchmetrics_accuracy_names_what_to_use():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Logging(Holder):
        def training_step(self, batch):
            torchmetrics.Accuracy(task="multiclass", num_classes=3)(self.net(batch[0]), batch[1])

    with pytest.raises(MixedTargetMisuse, match=r"target\.accuracy\(logits\)"):
        fit(Logging(), ManifoldMixupCallback(**ARGUMENTS))


def test_a_network_that_was_not_called_is_named():
    class Both(Holder):
        def forward(self, x):
            return self.net(x)

    with pytest.raises(LayerNotReached) as caught:
        fit(Both(), ManifoldMixupCallback(seed=0))
    assert "self(x), the LightningModule's own forward" in caught.value.__notes__[0]
    assert "the children with parameters are 'net'" in caught.value.__notes__[0]
    fit(Both(), ManifoldMixupCallback(seed=0, model="net"))


@pytest.mark.parametrize("model", [None, "encode"])
def test_a_network_that_is_not_to_be_found(model):
    class Parts(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 3)

        def training_step(self, batch):
            return F.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])

        configure_optimizers = Classifier.configure_optimizers

    module = Parts()
    with pytest.raises(ValueError, match=r"Parts .*model=\.\.\..*'encoder', 'decoder'"):
        fit(module, ManifoldMixupCallback(model=model))
    assert untouched(module)


@pytest.mark.parametrize(
    ("batch", "places", "message"),
    [
        ({"x": torch.ones(4, 6), "y": torch.zeros(4).long()}, {}, "dict of 'x', 'y'; its target cannot be None"),
        ({"x": torch.ones(4, 6), "y": torch.zeros(4).long()}, {"target": "label"}, "cannot be 'label'"),
        ((torch.ones(4, 6), torch.zeros(4).long(), torch.ones(4)), {}, "tuple of 0, 1, 2; its target cannot be None"),
        ((torch.ones(4, 6), torch.zeros(4).long()), {"inputs": 5}, r"cannot be 1 with inputs \[5\]"),
        (torch.ones(4, 6), {}, "The batch is a Tensor"),
    ],
)
def test_a_batch_whose_target_is_not_clear(batch, places, message):
    with pytest.raises(BatchMismatch, match=message):
        fit(Classifier(), ManifoldMixupCallback(**places, **ARGUMENTS), [batch])


def test_a_network_that_does_not_take_the_batch_says_what_to_set():
    data = [(x, y, torch.arange(len(y))) for x, y in batches()]
    with pytest.raises(DiscoveryFailed) as caught:
        fit(Classifier(), ManifoldMixupCallback(target=1, **ARGUMENTS), data)
    assert "inputs=..., target=..., model=..." in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1}, "alpha must be"),
        ({"layers": "layer1"}, "layers must be"),
        ({"pairing": "sorted"}, "pairing must be"),
        ({"probability": 2}, "probability must"),
        ({"per": "row"}, "per must be"),
        ({"beta": 1}, "beta"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ManifoldMixupCallback(**arguments)


def test_two_mixers_are_refused():
    module = Classifier()
    mixup = ManifoldMixup(module)
    with pytest.raises(AlreadyAttached):
        fit(module, ManifoldMixupCallback())
    mixup.remove()

    class Second(ManifoldMixupCallback):
        pass

    with pytest.raises(AlreadyAttached):
        fit(Holder(), ManifoldMixupCallback(), more=[Second(model="net.first")])
    with pytest.raises(AlreadyAttached, match="one ManifoldMixupCallback"):
        fit(TwoNetworks(), ManifoldMixupCallback(model="a"), more=[Second(model="b")])


class TwoNetworks(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = Mlp(), Mlp()

    def training_step(self, batch):
        return F.cross_entropy(self.a(batch[0]), batch[1]) + F.cross_entropy(self.b(batch[0]), batch[1])

    configure_optimizers = Classifier.configure_optimizers


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_fetches_its_own_batches_is_refused():
    class Fetching(Classifier):
        def training_step(self, dataloader_iter):
            raise AssertionError

    with pytest.raises(UnsupportedModel, match="dataloader_iter"):
        fit(Fetching(), ManifoldMixupCallback())


# ---------------------------------------------------------------- the example


def test_the_example_learns(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(HERE.parents[1] / "examples" / "lightning_callback.py"))
    accuracy = example["main"](["--epochs", "3"])
    assert accuracy > 0.85
    assert f"validation accuracy after 3 epochs: {accuracy:.3f}" in capsys.readouterr().out
    assert example["main"](["--epochs", "3"]) == accuracy
    assert example["main"](["--epochs", "3", "--alpha", "0"]) != accuracy
    with pytest.raises(SystemExit, match="0"):
        example["main"](["--help"])
    assert "--epochs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
