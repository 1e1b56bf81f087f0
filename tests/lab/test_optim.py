"""Learning rates against PyTorch's own schedulers, and the average of the weights against its definition."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.optim import learning_rate, make_average, make_optimizer, make_schedule


def rates(make, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [3, 50, 101])
@pytest.mark.parametrize("warmup", [None, 0.5])
def test_one_cycle_is_that_of_pytorch(steps, warmup):
    settings = TrainConfig(schedule="one-cycle", steps=steps, warmup=warmup, lr=0.4)
    ours = rates(lambda o: make_schedule(o, settings, steps, 10), steps)
    theirs = rates(
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.4, total_steps=steps, pct_start=0.3 if warmup is None else warmup, cycle_momentum=False
        ),
        steps,
    )
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_cosine_is_that_of_pytorch():
    ours = rates(lambda o: make_schedule(o, TrainConfig(schedule="cosine", steps=40), 40, 10), 40)
    assert ours == pytest.approx(rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 40), 40))


@pytest.mark.parametrize(("length", "unit"), [({"steps": 40}, 1), ({"epochs": 40}, 7)])
def test_steps_are_those_of_pytorch_in_epochs_or_steps(length, unit):
    settings = TrainConfig(schedule="step", milestones=[10, 30], gamma=0.2, **length)
    steps = 40 * unit
    ours = rates(lambda o: make_schedule(o, settings, steps, 7), steps)
    theirs = rates(lambda o: lr_scheduler.MultiStepLR(o, [10 * unit, 30 * unit], 0.2), steps)
    assert ours == pytest.approx(theirs)
    assert ours[0] == 0.4
    assert ours[-1] == pytest.approx(0.4 * 0.2**2)


def test_a_step_falls_to_a_tenth_unless_told_otherwise():
    factor = learning_rate(TrainConfig(schedule="step", milestones=[2], steps=4), 4, 1)
    assert [factor(step) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.1])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_finite_rates(steps):
    for schedule in ("constant", "cosine", "one-cycle"):
        factor = learning_rate(TrainConfig(schedule=schedule, steps=steps), steps, 1)
        assert all(0 <= factor(step) <= 1 for step in range(steps + 1))


def test_the_average_is_its_recursion_buffers_included():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = make_average(model, TrainConfig(ema=0.9))
    optimizer = make_optimizer(model.parameters(), TrainConfig(optimizer="sgd", lr=0.5))
    expected = copy.deepcopy(dict(model.state_dict()))
    for step in range(5):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                first = step == 0  # the average begins with the first weights that it is shown
                expected[name] = value.clone() if first else 0.9 * expected[name] + 0.1 * value
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, expected[name], atol=1e-5), name


def test_no_average_unless_asked_for():
    assert make_average(nn.Linear(2, 2), TrainConfig()) is None
