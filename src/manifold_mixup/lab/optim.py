"""What moves the weights: the optimiser, the learning rate as a function of the step, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manifold_mixup.lab.config import TrainConfig

__all__ = ["lay_out_like_parameters", "learning_rate", "make_average", "make_optimizer", "make_schedule"]

WARMUP = 0.3
START, END = 25.0, 1e4  # one-cycle: the peak over the first rate, and the first rate over the last one


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """Adam or SGD; the fused kernels take a third of the time on small networks."""
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    return torch.optim.Adam(parameters, **shared)


def lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory format of its parameters, in place.

    A checkpoint holds contiguous tensors, and the fused kernels walk through parameter, gradient and state in memory
    order: a momentum in another order than its channels-last weight would be added to the wrong elements.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainConfig, steps: int, per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate as a function of the step alone, so that resuming cannot change it."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(settings, steps, per_epoch))


def learning_rate(settings: TrainConfig, steps: int, per_epoch: int) -> Callable[[int], float]:
    """The factor of ``lr`` at each step.

    ``cosine`` falls from 1 to 0 along half a cosine. ``step`` is multiplied by ``gamma`` at every milestone.
    ``one-cycle`` rises from 1/25 to 1 over the share ``warmup`` of the steps and falls to 1/250,000, both along half a
    cosine (Smith and Topin 2018, arXiv 1708.07120, in the form of ``torch.optim.lr_scheduler.OneCycleLR``; the momentum
    does not move).

    Args:
        settings: Which schedule.
        steps: All steps of the run.
        per_epoch: Steps of an epoch, the unit of the milestones if the run's length is given in epochs.
    """
    if settings.schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    if settings.schedule == "step":
        unit = per_epoch if settings.epochs else 1
        milestones = [milestone * unit for milestone in settings.milestones]
        gamma = 0.1 if settings.gamma is None else settings.gamma
        return lambda step: gamma ** sum(step >= milestone for milestone in milestones)
    if settings.schedule == "one-cycle":
        rise = (WARMUP if settings.warmup is None else settings.warmup) * steps - 1

        def one_cycle(step: int) -> float:
            if step < rise:
                return _between(1 / START, 1.0, step / rise)
            return _between(1.0, 1 / (START * END), min((step - rise) / max(steps - 1 - rise, 1), 1.0))

        return one_cycle
    return lambda step: 1.0


def _between(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def make_average(model: nn.Module, settings: TrainConfig) -> AveragedModel | None:
    """An exponential moving average of weights and buffers, or None; made before a method hooks the network."""
    if settings.ema is None:
        return None
    ema = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    return average.requires_grad_(False)
