"""TorchUncertainty's ClassificationRoutine, trained with the Lightning callback, equals a loop by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from manifold_mixup import ManifoldMixup
from manifold_mixup.errors import MixedTargetMisuse, NotACutPoint

pytest.importorskip("torch_uncertainty")

import lightning.pytorch as lightning
from torch_uncertainty.models.mlp import batched_mlp, packed_mlp
from torch_uncertainty.routines import ClassificationRoutine
from torch_uncertainty.transforms import RepeatTarget

from manifold_mixup.integrations.lightning import ManifoldMixupCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no logger configured"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"alpha": 1.0, "seed": 5}


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, outputs))


def ensemble(make) -> nn.Module:
    """Two members in one network: n rows come in, 2n go out."""
    torch.manual_seed(0)
    options = {"alpha": 2, "gamma": 1} if make is packed_mlp else {}
    return make(in_features=6, num_outputs=3, hidden_dims=[12, 12], num_estimators=2, **options)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def train(model: nn.Module, callback: ManifoldMixupCallback, **options) -> lightning.Trainer:
    routine = ClassificationRoutine(
        model=model,
        num_classes=3,
        loss=options.pop("loss", nn.CrossEntropyLoss()),
        optim_recipe=torch.optim.SGD(model.parameters(), lr=0.1),
        **options,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(routine, loader(), loader())
    return trainer


def by_hand(model: nn.Module, loss, **arguments) -> None:
    mixup = ManifoldMixup(model, **ARGUMENTS, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for batch in loader():
            x, y = mixup(*batch)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    mixup.remove()


def distance(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("model", [None, "model"])
def test_the_routine_is_trained_as_by_hand_and_measures_the_plain_network(model):
    ours, theirs, plain = network(), network(), network()
    trainer = train(ours, ManifoldMixupCallback(model=model, **ARGUMENTS))
    by_hand(theirs, nn.functional.cross_entropy)
    assert distance(ours, theirs) == 0
    train(plain, ManifoldMixupCallback(alpha=0))
    assert distance(ours, plain) > 1e-3
    x, y = loader().dataset.tensors
    accuracy = (theirs(x).argmax(1) == y).float().mean()
    assert float(trainer.callback_metrics["val/cls/Acc"]) == pytest.approx(float(accuracy))


@pytest.mark.parametrize(
    ("make", "layers"), [(packed_mlp, ["input", "layers.0", "layers.1"]), (batched_mlp, ["input"])]
)
def test_repeated_targets_of_ensembles_come_as_soft_labels(make, layers):
    ours, theirs, plain = ensemble(make), ensemble(make), ensemble(make)
    settings = {"is_ensemble": True, "format_batch_fn": RepeatTarget(2)}
    callback = ManifoldMixupCallback(model="model", layers=layers, soft_targets=3, **ARGUMENTS)
    train(ours, callback, **settings)

    def loss(logits, y):
        one, other = logits.chunk(2)
        return (nn.functional.cross_entropy(one, y) + nn.functional.cross_entropy(other, y)) / 2

    by_hand(theirs, loss, layers=layers)
    assert distance(ours, theirs) < 1e-6
    train(plain, ManifoldMixupCallback(alpha=0, model="model", soft_targets=3), **settings)
    assert distance(ours, plain) > 1e-4


def test_an_ensemble_that_repeats_the_batch_is_refused_behind_its_entrance():
    callback = ManifoldMixupCallback(model="model", layers=["layers.0"], soft_targets=3)
    with pytest.raises(NotACutPoint, match="one row per example"):
        train(ensemble(batched_mlp), callback, is_ensemble=True, format_batch_fn=RepeatTarget(2))


def test_the_routines_own_mixup_on_top_is_refused():
    with pytest.raises(MixedTargetMisuse):
        train(network(), ManifoldMixupCallback(**ARGUMENTS), mixup_params={"mixtype": "mixup", "mixup_alpha": 1.0})


def test_the_example_learns(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "torch_uncertainty_routine.py"))["main"]
    metrics = main(["--epochs", "3"])
    assert metrics["test/cls/Acc"] > 0.85
    assert f"test/cal/ECE after 3 epochs: {metrics['test/cal/ECE']:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--epochs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
