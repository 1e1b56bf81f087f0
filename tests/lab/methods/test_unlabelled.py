"""Methods that look at unlabelled examples, in the loop: interrupted runs, the teacher that is measured, refusals."""

import pytest
import torch

from lab.small import PIXELS, coloured, equal
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import Unlabelled
from manifold_mixup.lab.errors import Interrupted, UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.training import Hooks, fit

OPTIONS = {"width": 0.1, "dropout": 0.3, "negative_slope": 0.01}
CHOICES = [
    ("consistency", {}),
    ("consistency", {"target_mode": "eval", "targets": "probabilities"}),
    ("ict", {"decay": 0.8}),
    ("ict", {"decay": 0.8, "teacher_mode": "train", "layers": "auto"}),
]


def train(folder, name, options, hooks=None, *, pool=24, **settings):
    """Train a small wide network on small images: its last weights, what is measured, and the method."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"steps": 8, "batch_size": 6, "optimizer": "sgd", "momentum": 0.9, "lr": 0.05, **settings}
    method = make_method(name, options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("wrn_28_2", OPTIONS, (3, 8, 8), 3)
        fitted = fit(
            model,
            method,
            coloured(12),
            coloured(9, seed=1),
            TrainConfig.model_validate(values),
            hidden=hidden_layers("wrn_28_2", OPTIONS),
            seed=0,
            folder=folder,
            config_hash="x",
            hooks=hooks or Hooks(),
            pixels=PIXELS,
            unlabelled=Unlabelled(coloured(pool, seed=2).x, 10) if pool else None,
        )
    return {key: value.clone() for key, value in model.state_dict().items()}, fitted, method


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_an_interrupted_run_ends_with_the_same_bits(name, options, tmp_path):
    weights, straight, _ = train(tmp_path / "straight", name, options)
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > 5

    with pytest.raises(Interrupted, match="step 5"):
        train(tmp_path / "broken", name, options, Hooks(stop=stop))
    resumed, finished, _ = train(tmp_path / "broken", name, options)
    assert equal(resumed, weights)
    assert equal(finished.last, straight.last)
    assert equal(finished.best, straight.best)
    for key in ("layers", "mixing", "mixing_unlabelled", "loss"):
        assert finished.facts[key] == straight.facts[key]
    assert sum(straight.facts["mixing_unlabelled"]["layers"].values()) == 8


def test_the_teacher_is_what_a_run_leaves(tmp_path):
    weights, fitted, method = train(tmp_path, "ict", {"decay": 0.8})
    assert equal(fitted.last, method.teacher().state_dict())
    assert not equal(fitted.last, weights)


def test_settings_are_other_trainings(tmp_path):
    seen = []
    for i, (name, options) in enumerate([*CHOICES, ("ict", {"decay": 0.4}), ("ict", {"mix": "logits"})]):
        _, fitted, _ = train(tmp_path / str(i), name, options, steps=3)
        assert not any(equal(fitted.last, other) for other in seen), (name, options)
        seen.append(fitted.last)


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_half_precision_trains(name, tmp_path):
    _, fitted, _ = train(tmp_path, name, {}, precision="bf16-mixed", steps=3)
    assert all(value.isfinite().all() for value in fitted.last.values())


@pytest.mark.parametrize("name", ["consistency", "ict"])
def test_without_a_pool_the_first_step_says_what_is_missing(name, tmp_path):
    with pytest.raises(UsageError, match="learns from unlabelled examples"):
        train(tmp_path, name, {}, pool=0)
