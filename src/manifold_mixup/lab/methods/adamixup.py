"""AdaMixUp (Guo, Mao and Zhang 2019, arXiv 1809.02499): mixing weights from a region that is learned."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from manifold_mixup.cutpoints import cut_points
from manifold_mixup.lab.errors import UsageError, nearest
from manifold_mixup.lab.methods.base import BatchTransform, Criterion, Method
from manifold_mixup.lab.methods.generators import DeviceGenerators, send, truncated_normal_like
from manifold_mixup.lab.methods.head import check_head, find_head
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.streams import generator, stream_seed
from manifold_mixup.target import MixedTarget

__all__ = ["AdaMixUp", "AdaMixUpOptions", "Policy", "Split"]

POLICY, INTRUSION = 100, 10  # units before the three numbers of the policy, and before the two of the discriminator
INITIAL = 1e-3  # standard deviation of the first weights of both, as in the authors' code


class AdaMixUpOptions(Options):
    """The paper's method has no strength to set."""

    enabled: bool = Field(default=True, description="false trains without mixing")
    intrusion: float = Field(
        default=1.0, ge=0, description="weight of the loss that tells mixed examples from real ones"
    )
    head: str = Field(default="", description="the linear layer that returns the logits; empty is the last one")


class Split(NamedTuple):
    """What the loss has to know about a batch ``[mixed A; A; B]``.

    Attributes:
        y: Labels of A, ``(a,)``.
        partner: Labels of A's partners, ``(a,)``.
        lam: The weights of the mixing, which carry gradients, ``(a,)``.
    """

    y: Tensor
    partner: Tensor
    lam: Tensor


class Policy(nn.Module):
    """What is trained beside the network: the generator of mixing regions and the intrusion discriminator's head.

    The generator is a copy of the classifier with its first weights, in which two linear layers stand for the head.
    No activation stands between the two of either head, as in the authors' code.

    Args:
        model: The classifier.
        head: Name of its head.
        seed: Of the first weights of both heads.
    """

    def __init__(self, model: nn.Module, head: str, seed: int) -> None:
        super().__init__()
        features = model.get_submodule(head).in_features
        assert isinstance(features, int)
        draws = generator(seed, "heads")
        policy = _two_layers(features, POLICY, 3, draws)
        self.generator: nn.Module = policy
        if head:
            self.generator = copy.deepcopy(model).train()
            parent, _, name = head.rpartition(".")
            setattr(self.generator.get_submodule(parent), name, policy)
        self.intrusion = _two_layers(features, INTRUSION, 2, draws)

    def region(self, x: Tensor, other: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        """Where the weights of pairs may lie: from the first of three numbers on, as wide as the second one.

        Args:
            x: Examples, ``(a, ...)``.
            other: Their partners, of the same shape.
            masks: Two tensors of that shape, which weigh their numbers.

        Returns:
            Probabilities, ``(a, 3)``: lowest weight, width, rest.
        """
        logits: Tensor = self.generator((masks[0] * x + masks[1] * other) / 2)
        return logits.softmax(dim=1)


def _two_layers(inputs: int, hidden: int, outputs: int, draws: torch.Generator) -> nn.Sequential:
    """Two linear layers with small weights, so that at first every region is the middle third."""
    layers = []
    for n_in, n_out in ((inputs, hidden), (hidden, outputs)):
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, n_in, n_out)  # type: ignore[no-untyped-call]
        nn.init.normal_(layer.weight, std=INITIAL, generator=draws)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    return nn.Sequential(*layers)


class AdaMixUp(Method[AdaMixUpOptions]):
    """Learn for every pair of examples from which region its mixing weight is drawn.

    A batch is cut into two halves. The first one, A, is mixed with itself in another order: the policy reads a pair and
    says (a, δ), and λ = a + u δ with u uniform on [0, 1). B stays as it is. The loss is the mean of the classifier's on
    mixed A and on A, plus that of the intrusion discriminator, which reads the classifier's features and tells mixed
    examples from those of A and B. All parts are minimised together.

    The network sees ``[mixed A; A; B]`` in one forward.
    """

    name = "adamixup"
    title = "AdaMixUp: mixing weights from a learned region"
    source = "Guo, Mao and Zhang 2019, arXiv 1809.02499"
    Options = AdaMixUpOptions

    _policy: Policy | None = None
    _handle: RemovableHandle | None = None
    _features: Tensor | None = None  # what the head was given in the current forward
    _seen: Tensor | None = None  # ends of the regions of the last batch, on average

    def problems(self, modules: Collection[str], hidden: Sequence[str]) -> list[str]:
        """A head that the network does not have."""
        name, known = self.options.head, [name for name in modules if name]
        if not name or name in known:
            return []
        return [f"options.head: the model has no module named {name!r}: {nearest(name, known)}"]

    def attach(self, model: nn.Module, hidden: Sequence[str], seed: int) -> BatchTransform:
        """Make the policy, and listen to what the head is given.

        Raises:
            UsageError: Several processes train, or the head is no linear layer.
        """
        if not self.options.enabled:
            return super().attach(model, hidden, seed)
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise UsageError(
                "method 'adamixup' trains a second network, which several processes would not share: use one"
            )
        name = self.options.head or find_head(model, "head")
        head = model.get_submodule(name)
        if not isinstance(head, nn.Linear):
            raise UsageError(f"options.head: {name!r} is a {type(head).__name__}, but a linear layer is needed")
        self._policy = Policy(model, name, seed)
        self._model, self._head, self._checked = model, name, bool(self.options.head)
        self._generator = torch.Generator().manual_seed(stream_seed(seed, "weights"))
        self._masks = DeviceGenerators(stream_seed(seed, "masks"))
        self._handle = head.register_forward_pre_hook(self._listen)
        return self._transform

    def companion(self) -> nn.Module | None:
        """The policy."""
        return self._policy

    def _listen(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            self._features = args[0]

    def _transform(self, x: Tensor, y: Tensor) -> tuple[Tensor, Split]:
        assert self._policy is not None
        if not self._checked:
            self._check(x)
        size = (len(x) + 1) // 2
        own, unseen, labels = x[:size], x[size:], y[:size]
        order = send(torch.randperm(size, generator=self._generator), x.device)
        other = own[order]
        masks = truncated_normal_like(own, self._masks), truncated_normal_like(own, self._masks)
        low, width, _ = self._policy.region(own, other, masks).unbind(dim=1)
        u = send(torch.rand(size, generator=self._generator), x.device)
        lam = (low + u * width).clamp(max=1.0)  # a and δ may add up to a little more than 1 by rounding
        weight = lam.view(-1, *[1] * (x.dim() - 1))
        mixed = own * weight + other * (1 - weight)
        self._seen = torch.stack([low.mean(), (low + width).mean()]).detach()
        return torch.cat([mixed, own, unseen]), Split(labels, labels[order], lam)

    def _check(self, x: Tensor) -> None:
        """Make sure that the last linear layer returns the logits.

        Raises:
            UsageError: It does not, or something goes past it.
        """
        points = cut_points(self._model, x)
        check_head(self._head, points, "head")
        if all(point.name != self._head for point in points):
            raise UsageError(
                f"not all that reaches the network's output goes through its last linear layer {self._head!r}; name "
                "the head with options.head"
            )
        self._checked = True

    def loss(self, criterion: Criterion, output: Any, target: Any) -> Tensor:
        """The mean loss of the classifier on mixed and real examples of A, plus that of the discriminator.

        Raises:
            UsageError: The layer named as the head was not called once with a row of features for every example.
        """
        if not isinstance(target, Split):
            return super().loss(criterion, output, target)
        assert self._policy is not None
        features, self._features = self._features, None
        if features is None or features.dim() != 2 or len(features) != len(output):
            raise UsageError(f"options.head: {self._head!r} is not given one row of features for every example")
        size = len(target.y)
        mixed = criterion(output[:size], MixedTarget(target.y, target.partner, target.lam))
        real = criterion(output[size : 2 * size], target.y)
        verdict = self._policy.intrusion(features.float())
        truth = (torch.arange(len(output), device=output.device) >= size).long()
        return (mixed + real) / 2 + self.options.intrusion * F.cross_entropy(verdict, truth)

    def detach(self) -> None:
        """Take the hook off the network."""
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of the draws, and the regions of the last batch."""
        if self._policy is None:
            return {}
        return {"generator": self._generator.get_state(), "masks": self._masks.state_dict(), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self._policy is not None:
            self._generator.set_state(state["generator"])
            self._masks.load_state_dict(state["masks"])
            self._seen = state["seen"]

    def facts(self) -> dict[str, Any]:
        """Between which weights the last batch was mixed: the ends of its regions, on average."""
        if self._seen is None:
            return {}
        low, high = self._seen.tolist()
        return {"region_low": round(low, 6), "region_high": round(high, 6)}
