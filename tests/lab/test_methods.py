import pytest
import torch
from torch import nn

from lab.small import DIGITS, SPIRAL, equal, one_run, train
from manifold_mixup.lab.errors import UnknownName
from manifold_mixup.lab.methods import METHODS, get_method, make_method
from manifold_mixup.lab.models import build_model, hidden_layers
from manifold_mixup.lab.options import Options

OFF = [
    ("none", {}),
    ("input_mixup", {"alpha": 0.0}),
    ("input_mixup", {"probability": 0.0}),
    ("manifold_mixup", {"alpha": 0.0}),
    ("manifold_mixup", {"probability": 0.0}),
    ("manifold_mixup", {"layers": []}),
    ("hidden_noise", {"sd": 0.0}),
    ("hidden_noise", {"layers": []}),
    ("input_noise", {"sd": 0.0}),
    ("dropout", {"p": 0.0}),
    ("weight_decay", {"strength": 0.0}),
    ("batch_norm", {"enabled": False}),
]
ON = [
    ("input_mixup", {}),
    ("input_mixup", {"alpha": 0.2}),
    ("manifold_mixup", {}),
    ("manifold_mixup", {"layers": ["bottleneck"]}),
    ("manifold_mixup", {"layers": ["bottleneck"], "per": "example"}),
    ("manifold_mixup", {"layers": ["bottleneck"], "pairing": "halves"}),
    ("manifold_mixup", {"layers": ["bottleneck"], "pairing": "two-batches"}),
    ("manifold_mixup", {"layers": ["bottleneck"], "probability": 0.5}),
    ("hidden_noise", {}),
    ("hidden_noise", {"layers": ["bottleneck"]}),
    ("hidden_noise", {"sd": 0.1}),
    ("input_noise", {}),
    ("input_noise", {"sd": 0.1}),
    ("dropout", {}),
    ("dropout", {"p": 0.2}),
    ("weight_decay", {}),
    ("weight_decay", {"strength": 0.1}),
    ("batch_norm", {}),
]


def weights(name, options, folder, base=SPIRAL):
    method = {"name": name, "options": options, "label": "x"}
    return train(one_run(base, methods=[method]), folder)[0]


def test_the_tables_cover_every_method():
    assert {name for name, _ in OFF} == METHODS.keys()
    assert {name for name, _ in ON} == METHODS.keys() - {"none"}


@pytest.mark.parametrize(("name", "options"), OFF)
@pytest.mark.parametrize("base", [SPIRAL, DIGITS], ids=["spiral", "digits"])
def test_switched_off_it_is_plain_training_bit_for_bit(name, options, base, tmp_path):
    assert equal(weights(name, options, tmp_path / "a", base), weights("none", {}, tmp_path / "b", base))


def test_switched_on_every_setting_is_another_training(tmp_path):
    seen = {"none": weights("none", {}, tmp_path / "none")}
    for i, (name, options) in enumerate(ON):
        trained = weights(name, options, tmp_path / str(i))
        same = [other for other, before in seen.items() if equal(trained, before)]
        assert same == [], f"{name} {options} trained the network like {same}"
        seen[f"{name} {options}"] = trained


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_reproduces_and_another_differs(name, tmp_path):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        run = one_run(methods=[{"name": name}], seeds=[seed])
        runs.append(train(run, tmp_path / str(i))[0])
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dropout"])
def test_nothing_global_is_read_or_advanced(name):
    model = build_model("spiral_net", {"width": 8}, (2,), 2)
    method = make_method(name, {})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    transform = method.attach(model, hidden_layers("spiral_net", {}), seed=3)
    x, _ = transform(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
    model(x)
    method.detach()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_detach_leaves_no_trace(name):
    model = build_model("spiral_net", {"width": 8}, (2,), 2)
    x, y = torch.randn(8, 2), torch.arange(8) % 2
    expected = model(x)
    method = make_method(name, {})
    transform = method.attach(model, hidden_layers("spiral_net", {}), seed=3)
    model(transform(x, y)[0])
    method.detach()
    assert torch.equal(model(x), expected)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize("name", ["hidden_noise", "input_noise", "input_mixup", "manifold_mixup"])
def test_state_goes_on_where_it_was(name):
    def outputs(method, transform, model, n):
        x, y = torch.linspace(-1, 1, 16).reshape(8, 2), torch.arange(8) % 2
        return [model(transform(x, y)[0]) for _ in range(n)]

    model = build_model("spiral_net", {"width": 8}, (2,), 2)
    hidden = hidden_layers("spiral_net", {})
    method = make_method(name, {})
    transform = method.attach(model, hidden, seed=3)
    outputs(method, transform, model, 3)
    state = method.state_dict()
    expected = outputs(method, transform, model, 3)
    method.detach()
    other = make_method(name, {})
    transform = other.attach(model, hidden, seed=4)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, transform, model, 3), expected, strict=True))


def test_hidden_noise_has_the_stated_strength_and_is_silent_in_evaluation():
    model = nn.Sequential(nn.Identity())
    method = make_method("hidden_noise", {"sd": 0.3, "layers": ["0"]})
    method.attach(model, [], seed=0)
    noise = model(torch.zeros(20_000))
    # standard error of the mean 0.002, of the standard deviation 0.0015
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 0.3) < 0.01
    assert torch.equal(model.eval()(torch.zeros(5)), torch.zeros(5))


def test_input_noise_has_the_stated_strength_and_leaves_the_batch_alone():
    method = make_method("input_noise", {"sd": 0.3})
    x, y = torch.zeros(20_000, 1), torch.zeros(20_000)
    noisy, labels = method.attach(nn.Identity(), [], seed=0)(x, y)
    assert abs(noisy.std().item() - 0.3) < 0.01
    assert labels is y
    assert not x.any()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_cites_its_source(name):
    method = METHODS[name]
    assert method.source
    assert method.title
    assert issubclass(method.Options, Options)
    assert all(field.description for field in method.Options.model_fields.values())


def test_defaults_are_the_papers():
    assert make_method("input_mixup", {}).options.alpha == 1.0
    assert make_method("manifold_mixup", {}).options.alpha == 2.0
    assert make_method("dropout", {}).options.p == 0.5


def test_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown method 'manifold_mix': did you mean 'manifold_mixup'"):
        get_method("manifold_mix")


def test_facts_name_the_layers_that_were_mixed(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "manifold_mixup", "options": {"layers": ["input", "hidden.1"]}}])
    assert train(run, tmp_path)[1].facts["layers"] == ["input", "hidden.1"]
    automatic = one_run(DIGITS, methods=[{"name": "manifold_mixup"}])
    assert train(automatic, tmp_path / "auto")[1].facts["layers"][0] == "input"
