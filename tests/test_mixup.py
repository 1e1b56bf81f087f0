"""Every guarantee and every error of the mixer; each test fails where its guarantee is taken away."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, namedtuple

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from manifold_mixup import ManifoldMixup, errors
from networks import Net, PreActResNet


def mlp(width: int = 12, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(3, (n,))


def inert(model: nn.Module) -> nn.Module:
    """A deep copy: it never mixes, so it shows what the plain network does."""
    return copy.deepcopy(model)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"alpha": -1}, ValueError, "-1"),
        ({"alpha": float("nan")}, ValueError, "nan"),
        ({"alpha": float("inf")}, ValueError, "inf"),
        ({"alpha": "2"}, ValueError, "'2'"),
        ({"layers": "layer1"}, ValueError, r"layers=\['layer1'\]"),
        ({"layers": [3]}, TypeError, "names"),
        ({"layers": ["input"], "per": "sample"}, ValueError, "'sample'"),
        ({"pairing": "sorted"}, ValueError, "'sorted'"),
        ({"per": "example", "pairing": "two-batches"}, ValueError, "per='batch'"),
        ({"probability": 1.5}, ValueError, "1.5"),
        ({"seed": 1.5}, TypeError, "1.5"),
        ({"check": False}, ValueError, "name it"),
    ],
)
def test_arguments_out_of_range_are_named_and_nothing_is_attached(arguments, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        ManifoldMixup(model, **arguments)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_repr_is_the_constructor_call():
    mixup = ManifoldMixup(mlp(), 1.0, ["input"], per="example", probability=0.5, seed=3)
    assert repr(mixup) == (
        "ManifoldMixup(Sequential, alpha=1.0, layers=['input'], per='example', pairing='random', "
        "probability=0.5, seed=3, check=True)"
    )


def test_a_layer_that_does_not_exist_is_named_with_its_neighbours():
    with pytest.raises(errors.LayerNotFound, match="'layer3'.*Did you mean 'layer2' or 'layer1'"):
        ManifoldMixup(PreActResNet(), layers=["layer3"])
    for name in ("2#0", "2#x", ""):
        with pytest.raises(errors.LayerNotFound):
            ManifoldMixup(mlp(), layers=[name])


# ------------------------------------------------------------------ exactly once, or an error


def test_the_loss_refuses_mixed_labels_when_the_model_was_not_called():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    x, y = mixup(*batch())
    with pytest.raises(errors.LayerNotReached, match="no training forward"):
        F.cross_entropy(inert(model)(x), y)
    for use in (lambda: y.accuracy(torch.randn(8, 3)), lambda: y.loss(F.cross_entropy, torch.randn(8, 3))):
        with pytest.raises(errors.LayerNotReached):
            use()
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad is not None


def test_running_the_submodules_alone_is_not_a_forward():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["0"], seed=0)
    x, y = mixup(*batch())
    h = model[0](x)
    assert torch.equal(h, inert(model)[0](x))
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(model[1:](h), y)


def test_an_eval_forward_does_not_count():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    x, y = mixup(*batch())
    model.eval()
    output = model(x)
    model.train()
    assert torch.equal(output, inert(model).eval()(x))
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(output, y)


def test_a_layer_that_did_not_run_is_an_error_in_the_forward():
    model = Net(lambda m, x: m.head(m.body(x) if m.deep else x), body=nn.Linear(6, 6), head=nn.Linear(6, 3))
    model.deep = True
    mixup = ManifoldMixup(model, layers=["body"], seed=0)
    x, _ = mixup(*batch())
    model(x)
    model.deep = False
    with pytest.raises(errors.LayerNotReached, match="'body' was drawn but did not run"):
        model(x)
    model.deep = True
    x, y = mixup(*batch())
    assert F.cross_entropy(model(x), y).isfinite()


def test_with_a_layer_per_example_all_of_s_has_to_run():
    model = Net(lambda m, x: m.head(m.body(x) if m.deep else x), body=nn.Linear(6, 6), head=nn.Linear(6, 3))
    model.deep = True
    mixup = ManifoldMixup(model, layers=["input", "body"], per="example", seed=0)
    x, _ = mixup(*batch())
    model.deep = False
    with pytest.raises(errors.LayerNotReached, match="1 of the 2 layers"):
        model(x)


def test_an_older_target_still_knows_whether_it_was_mixed():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    x1, y1 = mixup(*batch())
    out1 = model(x1)
    _, y2 = mixup(*batch())
    assert F.cross_entropy(out1, y1).isfinite()
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(out1, y2)
    x3, y3 = mixup(*batch())
    model(x3)
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(out1, y2)
    assert F.cross_entropy(out1, y3).isfinite()


def test_sizes_that_disagree_are_refused():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["input", "2"], seed=0)
    with pytest.raises(errors.BatchMismatch, match="8 rows.*7"):
        mixup(torch.randn(8, 6), torch.zeros(7, dtype=torch.long))
    with pytest.raises(errors.BatchMismatch, match="no tensor"):
        mixup(torch.randn(8, 6), [1, 2])
    with pytest.raises(errors.BatchMismatch, match="no tensor"):
        mixup(3, torch.zeros(7))
    mixup(*batch(8))
    with pytest.raises(errors.BatchMismatch, match="8 rows.*paused"):
        model(torch.randn(5, 6))
    fold = ManifoldMixup(mlp(), pairing="two-batches")
    with pytest.raises(errors.BatchMismatch, match="7 rows"):
        fold(*batch(7))


def test_a_hidden_state_of_another_batch_size_is_refused():
    model = Net(lambda m, x: m.head(m.body(x[:5] if m.training else x)), body=nn.Linear(6, 6), head=nn.Linear(6, 3))
    mixup = ManifoldMixup(model, layers=["body"], seed=0)
    x, _ = mixup(*batch())
    with pytest.raises(errors.BatchMismatch, match=r"after 'body' has shape \(5, 6\), but .* has 8 rows"):
        model(x)


def test_a_second_call_of_a_module_is_mixed_at_that_call_only():
    model = Net(lambda m, x: m.head(m.body(m.body(x))), body=nn.Linear(6, 6), head=nn.Linear(6, 3)).double()
    for layer in ("body", "body#2"):
        mixup = ManifoldMixup(model, layers=[layer], seed=0)
        twin = inert(model)
        x = torch.randn(8, 6).double()
        mixup(x, torch.zeros(8, dtype=torch.long))
        _, lam, partner = mixup.last
        h = twin.body(x)
        if layer == "body":
            expected = twin.head(twin.body(lam * h + (1 - lam) * h[partner]))
        else:
            h = twin.body(h)
            expected = twin.head(lam * h + (1 - lam) * h[partner])
        torch.testing.assert_close(model(x), expected)
        mixup.remove()


def test_without_the_check_the_users_word_counts_and_exactly_once_still_holds():
    model = Net(
        lambda m, x: m.head(torch.from_numpy(m.body(x).detach().numpy() * 1)),
        body=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    checked = ManifoldMixup(model, layers=["body"])
    with pytest.raises(errors.DataFlowLost, match="check=False"):
        checked(*batch())
    checked.remove()
    mixup = ManifoldMixup(model, layers=["body"], check=False, seed=0)
    x, y = mixup(*batch())
    _, lam, partner = mixup.last
    h = inert(model).body(x)
    torch.testing.assert_close(model(x), inert(model).head(lam * h + (1 - lam) * h[partner]))
    model._forward = lambda m, x: m.head(x)
    with pytest.raises(errors.LayerNotReached):
        model(x)
    model._forward = lambda m, x: m.head(m.body(x[:3]))
    with pytest.raises(errors.BatchMismatch, match="'body' returned no floating tensor with the batch's 8 rows"):
        model(x)
    assert y.mixed


def test_an_auxiliary_head_that_only_training_has_is_noticed():
    def forward(m, x):
        h = m.body(x)
        out = m.head(m.more(h))
        return (out, m.aux(h)) if m.training else out

    layers = {name: nn.Linear(6, 6) for name in ("body", "more", "head", "aux")}
    model = Net(forward, **layers)
    mixup = ManifoldMixup(model, layers=["more"], seed=0)
    x, _ = mixup(*batch())
    with pytest.raises(errors.NotACutPoint, match="auxiliary head"):
        model(x)


# ------------------------------------------------------------------ models that are refused


def test_two_mixers_are_refused_on_the_model_its_parts_and_its_wholes():
    model = mlp()
    first = ManifoldMixup(model)
    for other in (model, model[0], nn.Sequential(model)):
        with pytest.raises(errors.AlreadyAttached, match="remove"):
            ManifoldMixup(other)
    first.remove()
    ManifoldMixup(model[0]).remove()
    second = ManifoldMixup(model)
    assert second(*batch())[1].mixed


def test_a_mixer_that_nobody_holds_any_more_is_detached():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["input", "0"], seed=0)
    x, y = mixup(*batch())
    del mixup
    assert torch.equal(model(x), inert(model)(x))
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(model(x), y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert ManifoldMixup(model, seed=0)(*batch())[1].mixed


def test_data_parallel_is_refused_before_and_after_attaching():
    model = mlp()
    with pytest.raises(errors.UnsupportedModel, match="DistributedDataParallel"):
        ManifoldMixup(nn.DataParallel(model))
    mixup = ManifoldMixup(model)
    mixup(*batch())
    with pytest.raises(errors.UnsupportedModel, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()(torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_and_private_training_are_refused():
    with pytest.raises(errors.UnsupportedModel, match="torch.compile"):
        ManifoldMixup(torch.jit.trace(mlp(), torch.randn(2, 6)))
    wrapper = type("GradSampleModule", (nn.Sequential,), {})
    with pytest.raises(errors.UnsupportedModel, match="per example"):
        ManifoldMixup(wrapper(mlp()))
    with pytest.raises(TypeError, match="nn.Module"):
        ManifoldMixup(lambda x: x)


def test_a_layer_with_too_few_features_gets_a_warning_that_cites_the_theorem():
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 10))
    mixup = ManifoldMixup(model, layers=["input", "0"], seed=0)
    with pytest.warns(UserWarning, match=r"'0' has 3 features for 10 classes.*Theorem 1"):
        mixup(torch.randn(8, 6), torch.arange(8))
    enough = ManifoldMixup(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 10)), layers=["0"], seed=0)
    assert enough(torch.randn(8, 6), torch.arange(8))[1].mixed


# ------------------------------------------------------------------ modes, copies, traces


def test_evaluation_mixes_nothing_and_targets_stay_plain():
    model = mlp().eval()
    mixup = ManifoldMixup(model, seed=0)
    x, y = batch()
    inputs, target = mixup(x, y)
    assert inputs is x
    assert not target.mixed
    assert torch.equal(F.cross_entropy(model(inputs), target), F.cross_entropy(inert(model)(x), y))
    assert mixup.last is None


def test_evaluation_between_draws_does_not_use_the_old_draw():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    mixup(*batch())
    model.eval()
    x, y = batch()
    mixup(x, y)
    model.train()
    assert torch.equal(model(x), inert(model)(x))


def test_a_deep_copy_and_a_pickled_copy_never_mix():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["input", "0"], seed=0)
    x, _ = mixup(*batch())
    plain = nn.Sequential(*(copy.deepcopy(m) for m in mlp()))
    plain.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), plain(x))
        assert not torch.equal(twin(x), model(x))


def test_a_copied_mixer_is_detached():
    model = mlp()
    both = copy.deepcopy({"model": model, "mixup": ManifoldMixup(model, seed=0)})
    with pytest.raises(errors.MixerRemoved, match="copy"):
        both["mixup"](*batch())
    both["mixup"].remove()
    assert torch.equal(both["model"](torch.ones(2, 6)), model(torch.ones(2, 6)))


def test_remove_leaves_no_trace():
    model = PreActResNet()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    forward = model.forward
    mixup = ManifoldMixup(model, layers=["input", "stem", "layer1"], seed=0)
    x, y = mixup(torch.randn(4, 2, 5, 5), torch.arange(4) % 3)
    assert list(model.state_dict()) == keys
    F.cross_entropy(model(x), y).backward()
    mixup.remove()
    mixup.remove()
    for name, module in model.named_modules():
        after = vars(module)
        assert set(after) == set(before[name])
        assert not any(after[kind] for kind in after if "hook" in kind and isinstance(after[kind], dict))
    assert model.forward == forward
    with pytest.raises(errors.MixerRemoved):
        mixup(torch.randn(4, 2, 5, 5), torch.arange(4))
    with pytest.raises(errors.MixerRemoved):
        mixup.discover(torch.randn(4, 2, 5, 5))


def test_paused_forwards_do_not_mix_and_do_not_count():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    x, y = mixup(*batch())
    other = torch.randn(5, 6)
    with pytest.raises(KeyError), mixup.paused():
        assert torch.equal(model(other), inert(model)(other))
        raise KeyError
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(torch.randn(8, 3), y)
    assert not torch.equal(model(x), inert(model)(x))


def test_an_exception_inside_the_forward_leaves_the_mixer_usable():
    model = Net(lambda m, x: m.head(m.after(m.body(x))), body=nn.Linear(6, 6), after=nn.ReLU(), head=nn.Linear(6, 3))
    mixup = ManifoldMixup(model, layers=["body"], seed=0)
    x, y = mixup(*batch())
    handle = model.after.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    with pytest.raises(errors.LayerNotReached):
        F.cross_entropy(torch.randn(8, 3), y)
    for _ in range(2):
        x, y = mixup(*batch())
        _, lam, partner = mixup.last
        h = inert(model).body(x)
        torch.testing.assert_close(model(x), inert(model).head((lam * h + (1 - lam) * h[partner]).relu()))
        assert F.cross_entropy(model(x), y).isfinite()


def test_several_forwards_of_one_draw_mix_alike():
    model = mlp()
    mixup = ManifoldMixup(model, seed=0)
    x, y = mixup(*batch())
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, inert(model)(x))
    assert torch.equal(F.cross_entropy(first, y), F.cross_entropy(second, y))


def test_the_callers_batch_is_never_written_to():
    for pairing in ("random", "halves", "two-batches"):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))
        x, y = torch.randn(8, 6).abs(), torch.randint(3, (8,))
        before = x.clone(), y.clone()
        mixup = ManifoldMixup(model, layers=["input", "0"], pairing=pairing, seed=0)
        for _ in range(6):
            inputs, target = mixup(x, y)
            F.cross_entropy(model(inputs), target).backward()
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


def test_frozen_layers_can_be_mixed():
    model = mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    mixup = ManifoldMixup(model, layers=["0"], seed=0)
    x, y = mixup(*batch())
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.abs().sum() > 0


# ------------------------------------------------------------------ structured data


Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Output:
    hidden: Tensor
    note: str
    mask: Tensor


STRUCTURES = {
    "tuple": (lambda h, m: (h, [m]), lambda o: (o[0], o[1][0])),
    "named tuple": (Pair, lambda o: (o.left, o.right)),
    "dict": (lambda h, m: {"h": h, "m": m}, lambda o: (o["h"], o["m"])),
    "ordered dict": (lambda h, m: OrderedDict(h=h, m=m), lambda o: (o["h"], o["m"])),
    "dataclass": (lambda h, m: Output(h, "text", m), lambda o: (o.hidden, o.mask)),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_outputs_are_mixed_tensor_by_tensor(kind):
    pack, unpack = STRUCTURES[kind]
    body = Net(lambda m, x: pack(m.a(x), m.b(x)), a=nn.Linear(6, 4), b=nn.Linear(6, 4))

    def forward(m, x):
        h, other = unpack(m.body(x))
        return m.head(h * other)

    model = Net(forward, body=body, head=nn.Linear(4, 3)).double()
    mixup = ManifoldMixup(model, layers=["body"], seed=0)
    x = torch.randn(8, 6).double()
    mixup(x, torch.zeros(8, dtype=torch.long))
    _, lam, partner = mixup.last
    twin = inert(model)
    h, other = ((lam * t + (1 - lam) * t[partner]) for t in unpack(twin.body(x)))
    torch.testing.assert_close(model(x), twin.head(h * other))


def test_integers_in_a_cut_are_refused():
    body = Net(lambda m, x: (m.a(x), x.argmax(1)), a=nn.Linear(6, 6))
    model = Net(lambda m, x: (lambda o: m.head(o[0] + o[1][:, None]))(m.body(x)), body=body, head=nn.Linear(6, 3))
    with pytest.raises(errors.NotACutPoint, match="integers"):
        ManifoldMixup(model, layers=["body"])(*batch())


def test_inputs_may_be_tuples_and_dicts():
    model = Net(lambda m, a, b: m.head(a + b), head=nn.Linear(6, 3))
    twin = inert(model)
    a, b, y = torch.randn(8, 6), torch.randn(8, 6), torch.randint(3, (8,))
    for x, call in (((a, b), lambda x: model(*x)), ({"a": a, "b": b}, lambda x: model(**x))):
        mixup = ManifoldMixup(model, layers=["input"], seed=0)
        inputs, target = mixup(x, y)
        _, lam, partner = mixup.last
        mixed = [lam * t + (1 - lam) * t[partner] for t in (a, b)]
        torch.testing.assert_close(call(inputs), twin(*mixed))
        assert F.cross_entropy(call(inputs), target).isfinite()
        mixup.remove()


def test_targets_may_be_tuples_and_dicts():
    mixup = ManifoldMixup(mlp(), layers=["input"], seed=0)
    x, y = batch()
    _, target = mixup(x, {"class": y, "box": torch.randn(8, 4)})
    assert torch.equal(target.y_partner["class"], y[mixup.last.partner])


@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("per", ["batch", "example"])
@pytest.mark.parametrize("pairing", ["random", "halves"])
def test_odd_and_one_example_batches_train(n, per, pairing):
    model = mlp()
    mixup = ManifoldMixup(model, per=per, pairing=pairing, seed=0)
    x, y = mixup(*batch(n))
    loss = F.cross_entropy(model(x), y, reduction="none").mean()
    loss.backward()
    assert loss.isfinite()


def test_a_model_that_computes_its_own_loss_from_labels():
    def forward(m, x, labels=None):
        logits = m.head(m.body(x))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Net(forward, body=nn.Linear(6, 6), head=nn.Linear(6, 3))
    mixup = ManifoldMixup(model, layers=["body"], seed=0)
    x, y = batch()
    inputs, target = mixup(x, y)
    _, lam, partner = mixup.last
    twin = inert(model)
    h = twin.body(x)
    logits = twin.head(lam * h + (1 - lam) * h[partner])
    expected = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partner])
    torch.testing.assert_close(model(inputs, labels=target)["loss"], expected)
    model._forward = lambda m, x, labels: F.cross_entropy(x[:, :3], labels) + m.head(m.body(x)).sum()
    with pytest.raises(errors.LayerNotReached):  # this loss reads features from before the mixing
        model(mixup(x, y)[0], labels=mixup(x, y)[1])


# ------------------------------------------------------------------ randomness


def test_layers_are_uniform_and_the_rate_is_the_probability():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["input", "0", "2"], probability=0.7, seed=0)
    x, y = batch(2)
    counts = dict.fromkeys([None, "input", "0", "2"], 0)
    for _ in range(10_000):
        mixup(x, y)
        counts[mixup.last.layer] += 1
    assert abs(counts.pop(None) / 10_000 - 0.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_layers_of_pairs_are_uniform_and_lam_is_shared_by_a_pair():
    mixup = ManifoldMixup(mlp(), layers=["input", "0", "2"], per="example", seed=0)
    counts = dict.fromkeys(["input", "0", "2"], 0)
    for _ in range(400):
        mixup(*batch(16))
        layers, lam, partner = mixup.last
        assert torch.equal(lam, lam[partner])
        assert [layers[i] for i in partner] == layers
        for layer, i, j in zip(layers, range(16), partner.tolist(), strict=True):
            counts[layer] += i < j
    assert sum(counts.values()) == 400 * 8
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_the_mixers_lam_has_the_moments_of_beta(alpha):
    mixup = ManifoldMixup(mlp(), alpha=alpha, layers=["input"], seed=0)
    x, y = batch(2)
    drawn = []
    for _ in range(10_000):
        mixup(x, y)
        drawn.append(mixup.last.lam)
    lam = torch.tensor(drawn, dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    kurtosis = scipy.stats.beta(alpha, alpha).stats("k").item() + 3
    assert abs(lam.mean().item() - 0.5) < 4 * (variance / 10_000) ** 0.5
    assert abs(lam.var().item() - variance) < 4 * variance * ((kurtosis - 1) / 10_000) ** 0.5


def draws(mixup: ManifoldMixup, count: int = 10) -> list[tuple]:
    found = []
    for _ in range(count):
        mixup(torch.zeros(6, 6), torch.zeros(6, dtype=torch.long))
        found.append((mixup.last.layer, mixup.last.lam, tuple(mixup.last.partner.tolist())))
    return found


def test_seeds_reproduce_and_differ():
    assert draws(ManifoldMixup(mlp(), seed=1)) == draws(ManifoldMixup(mlp(), seed=1))
    assert draws(ManifoldMixup(mlp(), seed=1)) != draws(ManifoldMixup(mlp(), seed=2))
    assert draws(ManifoldMixup(mlp())) != draws(ManifoldMixup(mlp()))


def test_nothing_global_is_read_or_advanced():
    first = ManifoldMixup(mlp(), seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = draws(first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert draws(ManifoldMixup(mlp(), seed=1)) == a


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_the_data_does_not_matter_to_the_draws(workers):
    data = TensorDataset(torch.randn(24, 6), torch.randint(3, (24,)))
    found = []
    for shuffle in (False, True):
        mixup = ManifoldMixup(mlp(), seed=0)
        lams = []
        for x, y in DataLoader(data, batch_size=8, shuffle=shuffle, num_workers=workers):
            mixup(x, y)
            lams.append((mixup.last.lam, mixup.last.layer))
        found.append(lams)
    assert found[0] == found[1]


def test_state_dict_resumes_the_draws():
    mixup = ManifoldMixup(mlp(), seed=1)
    draws(mixup, 5)
    state = copy.deepcopy(mixup.state_dict())
    rest = draws(mixup)
    other = ManifoldMixup(mlp(), seed=99)
    other.load_state_dict(state)
    assert draws(other) == rest
    assert other.layers == mixup.layers
    with pytest.raises(ValueError, match="S ="):
        ManifoldMixup(mlp(), layers=[]).load_state_dict(state)
    with pytest.raises(ValueError, match="generator"):
        other.load_state_dict({"seed": 1})


def test_ranks_of_a_process_group_draw_differently(monkeypatch):
    found = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found.append(draws(ManifoldMixup(mlp(), seed=1)))
    monkeypatch.undo()
    assert found[0] != found[1]
    assert found[0] == draws(ManifoldMixup(mlp(), seed=1))


# ------------------------------------------------------------------ ways of running a network


class Checkpointed(nn.Module):
    """Three blocks, each recomputed in backward; ``reentrant`` None runs them plainly."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.head.weight.sum()  # reentrant checkpointing wants an input with a gradient
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def checkpointed_pair(reentrant: bool) -> list[nn.Module]:
    plain = Checkpointed(None).double()
    recomputed = copy.deepcopy(plain)
    recomputed.reentrant = reentrant
    return [plain, recomputed]


SITES = ["input", "blocks.0", "blocks.1.0", "blocks.2.1", "blocks.2"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_activation_checkpointing_gives_the_gradients_of_the_plain_network(reentrant, per):
    found = []
    models = checkpointed_pair(reentrant)
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    for model in models:
        mixup = ManifoldMixup(model, layers=SITES, per=per, seed=0)
        trace = []
        for _ in range(8):
            model.zero_grad()
            inputs, target = mixup(x, y)
            F.cross_entropy(model(inputs), target, reduction="none").mean().backward()
            trace += grads(model)
        found.append(trace)
        mixup.remove()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_draws_made_before_the_backward_are_recomputed_each_with_its_own(reentrant):
    found = []
    models = checkpointed_pair(reentrant)
    x, y = torch.randn(3, 8, 6).double(), torch.randint(3, (3, 8))
    for model in models:
        mixup = ManifoldMixup(model, layers=SITES[1:], seed=2)
        losses, seen = [], set()
        for i in range(3):
            inputs, target = mixup(x[i], y[i])
            seen.add(mixup.last.layer)
            losses.append(F.cross_entropy(model(inputs), target))
        assert len(seen) > 1
        model.eval()
        mixup(x[0], y[0])  # evaluation in between does not matter either
        model.train()
        sum(losses).backward()
        found.append(grads(model))
        mixup.remove()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_unmixed_forward_is_recomputed_unmixed():
    """The gradient of an evaluation (an attack on the input, say) through a checkpointed network."""
    found = []
    for model in checkpointed_pair(False):
        mixup = ManifoldMixup(model, layers=["blocks.1.0", "blocks.2.1"], seed=0)
        torch.manual_seed(0)
        x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
        mixup(x, y)
        model(x)
        model.eval()
        attacked = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)
        model.train()
        found.append(slope)
        mixup.remove()
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_a_whole_model_recomputed_in_evaluation_stays_unmixed():
    model = Checkpointed(None).double()
    mixup = ManifoldMixup(model, layers=SITES, seed=0)
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    model(mixup(x, y)[0])
    model.eval()
    slopes = []
    for run in (inert(model), lambda t: checkpoint(model, t, use_reentrant=True)):
        attacked = x.clone().requires_grad_()
        F.cross_entropy(run(attacked), y).backward()
        slopes.append(attacked.grad)
    torch.testing.assert_close(*slopes)


def test_a_whole_model_recomputed_after_other_draws_is_refused_only_where_it_cannot_be_told():
    plain, model = Checkpointed(None).double(), Checkpointed(None).double()
    model.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    found = []
    for net, run in ((plain, plain), (model, lambda t: checkpoint(model, t, use_reentrant=True))):
        mixup = ManifoldMixup(net, layers=SITES, seed=0)
        for _ in range(6):
            for way in (net, run):  # what the plain forward noted must not be taken for the recomputed one's draw
                inputs, target = mixup(x.clone().requires_grad_(), y)
                F.cross_entropy(way(inputs), target).backward()
        found.append(grads(net))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    losses = []
    for _ in range(2):
        inputs, target = mixup(x.clone().requires_grad_(), y)
        losses.append(F.cross_entropy(run(inputs), target))
    with pytest.raises(errors.RecomputeAmbiguous, match="use_reentrant=False"):
        sum(losses).backward()


@pytest.mark.parametrize("alpha", [2.0, 0.0])
def test_a_draw_between_a_blind_forward_and_its_backward_is_an_error(alpha):
    """Reentrant checkpointing of the whole model leaves nothing in the graph that says which draw to repeat."""
    model = Checkpointed(None).double()
    mixup = ManifoldMixup(model, layers=["blocks.0"], seed=0)
    x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
    inputs, target = mixup(x.clone().requires_grad_(), y)
    loss = F.cross_entropy(checkpoint(model, inputs, use_reentrant=True), target)
    mixup.alpha = alpha  # the next draw is another mixed one, or an unmixed one
    mixup(x, y)
    with pytest.raises(errors.RecomputeAmbiguous, match="use_reentrant=False"):
        loss.backward()


def test_a_recomputed_module_with_several_calls_is_refused():
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, checkpoint(m.body, x, use_reentrant=False), use_reentrant=False)),
        body=nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        head=nn.Linear(6, 3),
    )
    mixup = ManifoldMixup(model, layers=["body.0#2"], seed=0)
    x, y = mixup(*batch())
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(errors.RecomputeAmbiguous, match="2 times"):
        loss.backward()


def test_accumulation_equals_the_sum_of_the_micro_batches():
    model = mlp().double()
    mixup = ManifoldMixup(model, seed=0)
    total = [torch.zeros_like(p) for p in model.parameters()]
    twin = inert(model)
    own = ManifoldMixup(twin, seed=0)
    for _ in range(3):
        x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
        inputs, target = mixup(x, y)
        F.cross_entropy(model(inputs), target).backward()
        inputs, target = own(x, y)
        for t, g in zip(
            total, torch.autograd.grad(F.cross_entropy(twin(inputs), target), list(twin.parameters())), strict=True
        ):
            t += g
    for parameter, expected in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("before", [True, False])
def test_wrapping_before_or_after_attaching_is_the_same(before, tmp_path):
    model = mlp().double()
    twin = inert(model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if before:
            run = nn.parallel.DistributedDataParallel(model)
            mixup = ManifoldMixup(run, layers=["input", "0", "2"], seed=0)
        else:
            mixup = ManifoldMixup(model, layers=["input", "0", "2"], seed=0)
            run = nn.parallel.DistributedDataParallel(model)
        reference = ManifoldMixup(twin, layers=["input", "0", "2"], seed=0)
        for _ in range(6):
            x, y = torch.randn(8, 6).double(), torch.randint(3, (8,))
            inputs, target = mixup(x, y)
            loss = F.cross_entropy(run(inputs), target)
            inputs, target = reference(x, y)
            torch.testing.assert_close(loss, F.cross_entropy(twin(inputs), target))
        assert mixup.layers == ["input", "0", "2"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_called_inside_its_own_forward_is_refused():
    """The outer call would mix its input a second time, and hide from checkpointing what the inner one mixed."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, step: bool = False) -> Tensor:
            return self(x) if step else self.net(x)

    model = Routed()
    mixup = ManifoldMixup(model, layers=["input", "net.1"])
    x, y = batch()
    mixup(x, y)
    with pytest.raises(errors.UnsupportedModel, match="called inside its own forward.*ManifoldMixupCallback"):
        model(x, step=True)
    _, target = mixup(x, y)
    F.cross_entropy(model(x), target)


def test_a_state_of_other_layers_is_refused_before_the_first_batch_too():
    model = mlp()
    mixup = ManifoldMixup(model, layers=["0", "1"])
    mixup(*batch())
    state = mixup.state_dict()
    mixup.remove()
    with pytest.raises(ValueError, match=r"had S = \['0', '1'\], this one has \['1'\]"):
        ManifoldMixup(model, layers=["1"]).load_state_dict(state)


def test_a_cuda_graph_captured_by_hand_is_refused(monkeypatch):
    """Its replays would know nothing of new draws, and no hook would run to notice."""
    model = mlp()
    mixup = ManifoldMixup(model, layers=["1"])
    x, y = batch()
    mixup(x, y)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(errors.UnsupportedModel, match='mode="reduce-overhead"'):
        model(x)
    with mixup.paused():
        model(x)
