"""The learned region, the batch that the network sees, and the loss, against their definitions."""

import pytest
import torch
from torch import nn

from lab.small import DIGITS, SPIRAL, equal, one_run, train
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.criterion import make_criterion
from manifold_mixup.lab.errors import Interrupted, UsageError
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.training import Hooks

RESIDUAL = {**DIGITS, "model": {"name": "preact_resnet8", "options": {"width": 4}}}


def network(shape=(2, 8, 8)):
    torch.manual_seed(0)
    return build_model("preact_resnet8", {"width": 4}, shape, 3)


def batch(n, shape=(2, 8, 8)):
    """Images of one colour each, which is their number; labels too."""
    x = torch.arange(n).float().view(n, *[1] * len(shape)).expand(n, *shape).clone()
    return x, torch.arange(n)


def attached(model=None, seed=0, **options):
    method = make_method("adamixup", options)
    return method, method.attach(model or network(), [], seed)


class Fixed(nn.Module):
    """A generator that says the same for every pair."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), 3)


@pytest.mark.parametrize(
    "logits",
    [(0.0, 0.0, 0.0), (2.0, -1.0, 0.5), (100.0, 0.0, 0.0), (0.0, 100.0, 0.0), (0.0, 0.0, 100.0), (17.3, 17.3, -80.0)],
)
def test_lambda_is_uniform_on_its_region_which_lies_between_zero_and_one(logits):
    method, transform = attached(head="head")  # named, so that numbers can be given in place of images
    method.companion().generator = Fixed(*logits)
    low, width, _ = torch.tensor(logits).double().softmax(0)
    lam = transform(*batch(4000, (1,)))[1].lam.detach().double()
    assert len(lam) == 2000
    assert lam.min() >= max(low - 1e-6, 0)
    assert lam.max() <= min(low + width + 1e-6, 1)
    assert lam.mean().item() == pytest.approx(
        (low + width / 2).item(), abs=5 * width.item() / 12**0.5 / 2000**0.5 + 1e-6
    )
    assert lam.var().item() == pytest.approx((width**2 / 12).item(), rel=0.1, abs=1e-9)


def test_rounding_cannot_carry_lambda_beyond_one(monkeypatch):
    method, transform = attached(head="head")
    above = torch.tensor([1.0, 3e-7, 0.0])  # probabilities that add up to a little more than 1
    monkeypatch.setattr(method.companion(), "region", lambda x, other, masks: above.expand(len(x), 3))
    lam = transform(*batch(100, (1,)))[1].lam
    assert torch.equal(lam, torch.ones(50))


def test_at_first_every_region_is_about_the_middle_third():
    method, transform = attached()
    low, high = None, None
    transform(torch.randn(16, 2, 8, 8), torch.arange(16))
    low, high = method.facts().values()
    assert low == pytest.approx(1 / 3, abs=0.01)
    assert high == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
def test_the_batch_is_mixed_a_then_a_then_b(n):
    _, transform = attached()
    x, y = batch(n)
    size = (n + 1) // 2
    for _ in range(5):
        seen, target = transform(x, y)
        assert seen.shape == (2 * size + n - size, 2, 8, 8)
        assert torch.equal(seen[size:], x)
        assert torch.equal(target.y, y[:size])
        assert sorted(target.partner.tolist()) == list(range(size))  # everyone of A once, and nobody of B
        for i in range(size):
            expected = target.lam[i] * x[i] + (1 - target.lam[i]) * x[target.partner[i]]
            assert torch.allclose(seen[i], expected, atol=1e-6)


def test_a_seed_gives_the_policy_and_the_draws_and_another_seed_others():
    results = []
    for seed in (0, 0, 1):
        method, transform = attached(seed=seed)
        target = transform(torch.ones(8, 2, 8, 8), torch.arange(8))[1]
        policy = torch.cat([p.flatten() for p in method.companion().intrusion.parameters()])
        results.append((target.lam, target.partner, policy))
    same = [[torch.equal(a, b) for a, b in zip(results[0], other, strict=True)] for other in results[1:]]
    assert same[0] == [True, True, True]
    assert not same[1][0]
    assert not same[1][2]


def test_the_generator_reads_the_masked_mean_of_a_pair():
    method, transform = attached(seed=4)
    given = []
    method.companion().generator = Fixed(0.0, 0.0, 0.0)
    method.companion().generator.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    x, y = batch(40)
    target = transform(x, y)[1]
    own, other = x[:20], x[target.partner]
    # m1 x + m2 x' over 2, with m1 and m2 within ±2 and of variance 0.7737
    assert given[0].shape == own.shape
    assert (given[0].abs() <= own + other + 1e-5).all()
    unit = given[0][1:] * 2 / (own[1:] ** 2 + other[1:] ** 2).sqrt()
    assert abs(unit.mean().item()) < 0.1
    assert unit.var().item() == pytest.approx(0.7737, rel=0.15)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"loss": "bce-softmax"}], ids=str)
@pytest.mark.parametrize("intrusion", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("n", [1, 7, 8])
def test_the_loss_is_that_of_its_parts_one_example_after_the_other(settings, intrusion, n):
    model = network()
    method, transform = attached(model, intrusion=intrusion)
    criterion = make_criterion(TrainConfig.model_validate(settings))
    x, y = torch.randn(n, 2, 8, 8), torch.arange(n) % 3
    features = []
    model.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    seen, target = transform(x, y)
    output = model(seen)
    loss = method.loss(criterion, output, target)
    size = (n + 1) // 2
    total = 0.0
    for i in range(size):
        row, own = output[i : i + 1], output[size + i : size + i + 1]
        lam, one, other = target.lam[i], target.y[i : i + 1], target.partner[i : i + 1]
        total = total + lam * criterion(row, one) + (1 - lam) * criterion(row, other) + criterion(own, one)
    expected = total / (2 * size)
    verdicts = method.companion().intrusion(features[-1]).log_softmax(1)
    real = [0] * size + [1] * n
    expected = expected - intrusion * sum(verdicts[i, k] for i, k in enumerate(real)) / len(real)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = [*model.parameters(), *method.companion().parameters()]
    ours = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None) or intrusion == 0
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_everything_beside_the_network_learns():
    method, transform = attached(model := network())
    seen, target = transform(torch.randn(8, 2, 8, 8), torch.arange(8) % 3)
    method.loss(make_criterion(TrainConfig()), model(seen), target).backward()
    own = {id(p) for p in model.parameters()}
    for name, parameter in method.companion().named_parameters():
        assert id(parameter) not in own
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_generator_is_the_network_with_another_head():
    model = network()
    method, _ = attached(model)
    generator = method.companion().generator
    ours, theirs = dict(generator.named_parameters()), dict(model.named_parameters())
    shared = ours.keys() & theirs.keys()
    assert theirs.keys() - shared == {"head.weight", "head.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert {tuple(ours[name].shape) for name in ours.keys() - shared} == {(100, 16), (100,), (3, 100), (3,)}
    assert [tuple(p.shape) for p in method.companion().intrusion.parameters()] == [(10, 16), (10,), (2, 10), (2,)]


@pytest.mark.parametrize("base", [SPIRAL, RESIDUAL], ids=["spiral", "residual"])
def test_the_policy_is_trained_and_an_interrupted_run_ends_with_the_same_bits(base, tmp_path):
    run = one_run(base, methods=[{"name": "adamixup"}])
    straight, fitted, _ = train(run, tmp_path / "straight")
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > 5

    with pytest.raises(Interrupted, match="step 5"):
        train(run, tmp_path / "broken", Hooks(stop=stop))
    resumed, refitted, _ = train(run, tmp_path / "broken")
    assert equal(resumed, straight)
    assert refitted.facts["region_low"] == fitted.facts["region_low"]
    assert 0 <= fitted.facts["region_low"] < fitted.facts["region_high"] <= 1
    assert abs(fitted.facts["region_low"] - 1 / 3) > 1e-4


def test_switched_off_there_is_no_policy():
    method, transform = attached(enabled=False)
    x, y = batch(4)
    assert transform(x, y) == (x, y)
    assert method.companion() is None
    assert method.state_dict() == method.facts() == {}


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="method 'adamixup' trains a second network"):
        attached()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    attached()


class Unusual(nn.Module):
    """The head comes first among the modules."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 3), nn.Linear(2, 4)

    def forward(self, x):
        return self.head(self.body(x).relu())


def test_the_head_is_checked_and_can_be_named():
    criterion, x, y = make_criterion(TrainConfig()), torch.randn(6, 2), torch.arange(6) % 3
    _, transform = attached(Unusual())
    with pytest.raises(UsageError, match=r"last linear layer 'body' is not its head.*options\.head"):
        transform(x, y)
    method, transform = attached(model := Unusual(), head="head")
    seen, target = transform(x, y)
    assert method.loss(criterion, model(seen), target).isfinite()
    with pytest.raises(UsageError, match="'stem' is a Conv2d, but a linear layer is needed"):
        attached(head="stem")
    with pytest.raises(UsageError, match="say with options.head which module returns the logits"):
        attached(nn.Sequential(nn.Conv1d(1, 2, 1)))
    problems = make_method("adamixup", {"head": "haed"}).problems(["", "stem", "head"], [])
    assert problems == ["options.head: the model has no module named 'haed': did you mean 'head'?"]


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        return self.one(x) + self.two(x)


def test_one_of_two_heads_is_refused():
    _, transform = attached(TwoHeads())
    with pytest.raises(UsageError, match="not all that reaches the network's output goes through .* 'two'"):
        transform(torch.randn(6, 2), torch.arange(6) % 3)


def test_a_head_that_was_not_called_is_an_error():
    method, transform = attached(model := network(), head="head")
    seen, target = transform(torch.randn(6, 2, 8, 8), torch.arange(6) % 3)
    model.eval()
    with pytest.raises(UsageError, match="'head' is not given one row of features for every example"):
        method.loss(make_criterion(TrainConfig()), model(seen), target)


def test_half_precision_features_are_judged_in_single_precision():
    model = network()
    method, transform = attached(model)
    seen, target = transform(torch.randn(8, 2, 8, 8), torch.arange(8) % 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(seen)
    assert method.loss(make_criterion(TrainConfig()), output, target).dtype == torch.float32
