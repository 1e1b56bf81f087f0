"""The timm adapter gives what timm.data.Mixup gives, mixes hidden states as well, and works in timm's training step."""

from __future__ import annotations

import copy
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn

from manifold_mixup import errors
from manifold_mixup.integrations.timm import Mixup

CLASSES = 5
EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_training.py"


class Small(nn.Sequential):
    """Its first module is handed what the network sees of the input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.seen: list[Tensor] = []
        self[0].register_forward_pre_hook(lambda _, args: self.seen.append(args[0].detach().clone()))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, 2, 2, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def vit(depth: int = 4) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 1, num_classes=CLASSES, embed_dim=16, depth=depth, num_heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that outputs depend on their inputs, and on where they are mixed
    return model


def through(model: VisionTransformer, x: Tensor, layer: str, lam: float) -> Tensor:
    """The forward by hand, in two halves, mixed with the flipped batch after the layer."""

    def mixed(h: Tensor, name: str) -> Tensor:
        return lam * h + (1 - lam) * h.flip(0) if name == layer else h

    h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(mixed(x, "input")))))
    for i, block in enumerate(model.blocks):
        h = mixed(block(h), f"blocks.{i}")
    return model.forward_head(model.norm(h))


def distance(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ beside timm's class


@pytest.mark.parametrize("mode", ["batch", "pair"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_the_input_alone_it_is_timms_mixup(mode, smoothing, monkeypatch):
    model, (x, target) = Small(), batch()
    options = {"mixup_alpha": 0.8, "mode": mode, "label_smoothing": smoothing, "num_classes": CLASSES}
    ours = Mixup(model, **options, layers=["input"], seed=0)
    theirs = timm.data.Mixup(**options)
    for _ in range(3):
        same, soft = ours(x, target)
        assert same is x
        model(same)
        lam = ours.mixup.last.lam
        drawn = lam if mode == "batch" else lam[: len(x) // 2].numpy()
        monkeypatch.setattr(np.random, "beta", lambda *_, size=None, drawn=drawn: drawn)
        their_x, their_soft = theirs(x.clone(), target)
        torch.testing.assert_close(model.seen[-1], their_x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(soft, their_soft, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(their_x, x, atol=1e-2)


def test_dense_targets_are_smoothed_as_timm_does(monkeypatch):
    model, (x, _) = Small(), batch()
    dense = (torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    options = {"label_smoothing": 0.2, "num_classes": CLASSES, "multi_label": True}
    ours = Mixup(model, **options, layers=["input"], seed=0)
    _, soft = ours(x, dense)
    model(x)
    monkeypatch.setattr(np.random, "beta", lambda *_: ours.mixup.last.lam)
    torch.testing.assert_close(soft, timm.data.Mixup(**options)(x.clone(), dense)[1])


def test_it_takes_the_arguments_of_timms_class():
    theirs = inspect.signature(timm.data.Mixup).parameters
    model, *ours = inspect.signature(Mixup).parameters.values()
    assert model.name == "model"
    same = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert same == [(p.name, p.default) for p in theirs.values()]
    public = {name for name in vars(timm.data.Mixup()) if not name.startswith("_")}
    assert public <= set(vars(Mixup(Small())))


def test_an_odd_batch_leaves_the_middle_row_alone():
    model, (x, target) = Small(), batch(7)
    mixup_fn = Mixup(model, num_classes=CLASSES, label_smoothing=0.0, layers=["input"], seed=0)
    _, soft = mixup_fn(x, target)
    model(x)
    assert mixup_fn.mixup.last.partner.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(soft[3], F.one_hot(target, CLASSES)[3].float())
    torch.testing.assert_close(model.seen[-1][3], x[3])
    assert not torch.allclose(model.seen[-1][0], x[0])


def test_in_eval_mode_targets_are_smoothed_and_nothing_is_mixed():
    model, (x, target) = Small().eval(), batch()
    _, soft = Mixup(model, num_classes=CLASSES, seed=0)(x, target)
    torch.testing.assert_close(soft, mixup_target(target, CLASSES, 1.0, 0.1))
    model(x)
    assert torch.equal(model.seen[-1], x)


# ------------------------------------------------------------------------------------------------ inside timm's step


def batches(n: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        yield torch.randn(6, 1, 8, 8, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def step_by_hand(model: VisionTransformer, x: Tensor, y: Tensor, draw: Any, share: float, **options: Any) -> None:
    soft = mixup_target(y, CLASSES, draw.lam, 0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.get("amp", False)):
        output = through(model, x, draw.layer, draw.lam)
        loss = -(soft * F.log_softmax(output.float(), 1)).sum(1).mean()
        if options.get("bce"):
            loss = F.binary_cross_entropy_with_logits(output, soft)
    (share * loss).backward()


@pytest.mark.parametrize("options", [{}, {"amp": True}, {"bce": True}, {"task": True}, {"accumulate": 2}], ids=str)
def test_a_training_step_of_timm(options):
    model = vit()
    reference = copy.deepcopy(model)
    average, expected = ModelEmaV3(model, decay=0.5), ModelEmaV3(reference, decay=0.5)
    mixup_fn = Mixup(model, mixup_alpha=0.8, num_classes=CLASSES, layers=["input", "blocks.0", "blocks.2"], seed=1)
    loss_fn = BinaryCrossEntropy() if options.get("bce") else SoftTargetCrossEntropy()
    task = ClassificationTask(model, loss_fn, verbose=False) if options.get("task") else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hand = torch.optim.SGD(reference.parameters(), lr=0.1)
    scaler, accumulate, layers = NativeScaler("cpu"), options.get("accumulate", 1), set()
    model.train()
    for i, (x, y) in enumerate(batches()):
        input_, target = mixup_fn(x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("amp", False)):
            loss = task(input_, target)["loss"] if task else loss_fn(model(input_), target)
        update = (i + 1) % accumulate == 0
        scaler(loss / accumulate, optimizer, clip_grad=1e6, parameters=model.parameters(), need_update=update)
        layers.add(mixup_fn.mixup.last.layer)
        step_by_hand(reference, x, y, mixup_fn.mixup.last, 1 / accumulate, **options)
        if update:
            optimizer.zero_grad()
            average.update(model, step=i)
            by_hand.step()
            by_hand.zero_grad()
            expected.update(reference, step=i)
    assert layers == {"input", "blocks.0", "blocks.2"}
    assert distance(model, reference) < (2e-3 if options.get("amp") else 1e-5)
    assert distance(average.module, expected.module) < (2e-3 if options.get("amp") else 1e-5)
    # The average is not mixed, though the draw for the last batch is still in force for the model.
    average.module.train()
    assert torch.equal(average.module(x), average.module.eval()(x))
    assert not torch.allclose(model(x), model.eval()(x), atol=1e-3)


def test_switched_off_in_the_last_epochs():
    model, (x, target) = Small(), batch()
    mixup_fn = Mixup(model, num_classes=CLASSES, layers=["input"], seed=0)
    mixup_fn(x, target)
    model(x)
    assert not torch.equal(model.seen[-1], x)
    mixup_fn.mixup_enabled = False  # the draw before must not stay in force
    _, soft = mixup_fn(x, target)
    model(x)
    assert torch.equal(model.seen[-1], x)
    torch.testing.assert_close(soft, mixup_target(target, CLASSES, 1.0, 0.1))
    mixup_fn.mixup_enabled = True
    mixup_fn(x, target)
    model(x)
    assert not torch.equal(model.seen[-1], x)


def test_alpha_and_probability_may_be_changed():
    mixup_fn = Mixup(Small(), mixup_alpha=0.0, prob=0.0, num_classes=CLASSES, layers=["input"], seed=0)
    drawn = []
    for alpha, prob in [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]:
        mixup_fn.mixup_alpha, mixup_fn.mix_prob = alpha, prob
        mixup_fn(*batch())
        drawn.append(mixup_fn.mixup.last.lam)
    assert drawn[:2] == [1.0, 1.0]
    assert 0 < drawn[2] < 1


def test_a_resumed_run_draws_the_same():
    one = Mixup(model := Small(), num_classes=CLASSES, layers=["input", "1"], seed=0)
    one(*batch())
    model(batch()[0])
    state = one.state_dict()
    other = Mixup(Small(), num_classes=CLASSES, layers=["input", "1"], seed=9)
    other.load_state_dict(state)
    assert torch.equal(one(*batch())[1], other(*batch())[1])
    assert one.mixup.last.layer == other.mixup.last.layer


# ------------------------------------------------------------------------------------------------ what is refused


def test_targets_whose_features_were_never_mixed_are_an_error_at_the_next_call():
    model, (x, target) = Small(), batch()
    mixup_fn = Mixup(model, num_classes=CLASSES, seed=0)
    mixup_fn(x, target)
    model.eval()(x)  # not the forward that was meant
    with pytest.raises(errors.LayerNotReached, match="targets of the previous batch were mixed"):
        mixup_fn(x, target)
    model.train()
    mixup_fn(x, target)
    with pytest.raises(errors.LayerNotReached, match="targets of the previous batch were mixed"):
        mixup_fn.check_previous()
    mixup_fn(x, target)
    model(x)
    mixup_fn.check_previous()
    mixup_fn(x, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutmix_alpha": 1.0}, r"cutmix_alpha=1\.0.*timm\.data\.Mixup"),
        ({"cutmix_minmax": (0.2, 0.8)}, r"cutmix_minmax=\(0\.2, 0\.8\)"),
        ({"mode": "elem"}, "'elem'.*mode='pair'"),
        ({"mode": "half"}, "must be 'batch' or 'pair'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"mixup_alpha": -1.0}, "alpha"),
        ({"prob": 2.0}, "probability"),
    ],
)
def test_arguments_that_have_no_meaning_here(options, message):
    with pytest.raises(ValueError, match=message):
        Mixup(Small(), **options)


def test_the_model_comes_first():
    with pytest.raises(TypeError, match="first argument is the model, but it is 0.8"):
        Mixup(0.8)


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, torch.zeros(8, CLASSES), "Class indices.*multi_label=True"),
        ({}, torch.zeros(8, 1).long(), "Class indices"),
        ({"multi_label": True}, torch.zeros(8).long(), r"shape \(n, 5\)"),
        ({"multi_label": True}, torch.zeros(8, 3), r"shape \(n, 5\)"),
        ({}, torch.full((8,), CLASSES), r"outside \[0, 5\)"),
    ],
)
def test_targets_of_another_kind(options, target, message):
    with pytest.raises(ValueError, match=message):
        Mixup(Small(), num_classes=CLASSES, seed=0, **options)(batch()[0], target)


def test_repr_names_the_mixer():
    assert repr(Mixup(Small(), 0.4, num_classes=5)).startswith("Mixup(ManifoldMixup(Small, alpha=0.4, layers='auto'")


# ------------------------------------------------------------------------------------------------ the example


def test_the_example(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main(["--epochs", "6", "--mixup-off-epoch", "5"]) > 80
    assert "mixed at ['input', 'blocks." in capsys.readouterr().out


def test_the_example_has_a_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLE))["main"](["--help"])
    assert "--mixup-off-epoch" in capsys.readouterr().out
