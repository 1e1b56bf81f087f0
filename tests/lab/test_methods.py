import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.small import DIGITS, SPIRAL, equal, one_run, train
from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import RecipeError, UnknownName, UsageError
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
    ("blocked_gradient", {"alpha": 0.0}),
    ("blocked_gradient", {"probability": 0.0}),
    ("blocked_gradient", {"layers": []}),
    ("hidden_noise", {"sd": 0.0}),
    ("hidden_noise", {"layers": []}),
    ("input_noise", {"sd": 0.0}),
    ("last_layer_mixup", {"alpha": 0.0}),
    ("last_layer_mixup", {"layers": []}),
    ("noisy_feature_mixup", {"alpha": 0.0}),
    ("noisy_feature_mixup", {"probability": 0.0}),
    ("adamixup", {"enabled": False}),
    ("cutmix", {"alpha": 0.0}),
    ("cutmix", {"probability": 0.0}),
    ("cutout", {"size": 0}),
    ("label_smoothing", {"epsilon": 0.0}),
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
    ("blocked_gradient", {}),
    ("blocked_gradient", {"layers": ["bottleneck"]}),
    ("blocked_gradient", {"layers": ["bottleneck"], "per": "example"}),
    ("last_layer_mixup", {}),
    ("last_layer_mixup", {"per": "example"}),
    ("last_layer_mixup", {"layers": ["decoder.7"]}),
    ("noisy_feature_mixup", {}),
    ("noisy_feature_mixup", {"layers": ["bottleneck"]}),
    ("noisy_feature_mixup", {"layers": ["bottleneck"], "additive": 0.0}),
    ("noisy_feature_mixup", {"layers": ["bottleneck"], "multiplicative": 0.0}),
    ("noisy_feature_mixup", {"layers": ["bottleneck"], "pairing": "halves"}),
    ("adamixup", {}),
    ("adamixup", {"intrusion": 0.0}),
    ("cutmix", {}),
    ("cutmix", {"alpha": 0.2}),
    ("cutmix", {"probability": 1.0}),
    ("cutmix", {"per": "example"}),
    ("cutout", {"size": 4}),
    ("cutout", {"size": 3}),
    ("label_smoothing", {}),
    ("label_smoothing", {"epsilon": 0.3}),
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

SUPERVISED = [name for name, method in METHODS.items() if "classification" in method.tasks]
IMAGES = {"cutmix", "cutout"}  # methods that read images alone
BUILT_IN = {"dropout", "batch_norm"}  # methods that need a network with such an option
SMALL = {"cutout": {"size": 3}, "cutmix": {"probability": 1.0}}  # options for images of 8x8 pixels and few batches
RESIDUAL = {**DIGITS, "model": {"name": "preact_resnet8", "options": {"width": 4}}}


def base_of(name):
    return RESIDUAL if name in IMAGES else SPIRAL


def weights(name, options, folder, base):
    method = {"name": name, "options": options, "label": "x"}
    return train(one_run(base, methods=[method]), folder)[0]


def small_network(name):
    """A network that the method can train, its hidden layers, and a batch."""
    generator = torch.Generator().manual_seed(0)
    kind, shape, options = ("preact_resnet8", (1, 8, 8), {"width": 4}) if name in IMAGES else ("spiral_net", (2,), {})
    model = build_model(kind, {"width": 8, **options}, shape, 2)
    return model, hidden_layers(kind, {}), torch.randn(8, *shape, generator=generator), torch.arange(8) % 2


def test_the_tables_cover_every_method():
    assert {name for name, _ in OFF} == set(SUPERVISED)
    assert {name for name, _ in ON} == set(SUPERVISED) - {"none"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after plain training on each of the bases."""
    bases = {"spiral": SPIRAL, "digits": DIGITS, "residual": RESIDUAL}
    return {name: weights("none", {}, tmp_path_factory.mktemp(name), base) for name, base in bases.items()}


@pytest.mark.parametrize(("name", "options"), OFF)
def test_switched_off_it_is_plain_training_bit_for_bit(name, options, plain, tmp_path):
    assert equal(weights(name, options, tmp_path / "spiral", SPIRAL), plain["spiral"])
    assert equal(weights(name, options, tmp_path / "digits", DIGITS), plain["digits"])
    if name not in BUILT_IN:
        assert equal(weights(name, options, tmp_path / "residual", RESIDUAL), plain["residual"])


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_network_without_the_option_is_refused(name, tmp_path):
    with pytest.raises(RecipeError, match=f"method '{name}' sets model.options.{name}, which model .* does not have"):
        weights(name, {}, tmp_path, RESIDUAL)


def test_switched_on_every_setting_is_another_training(plain, tmp_path):
    seen = dict(plain)
    for i, (name, options) in enumerate(ON):
        trained = weights(name, options, tmp_path / str(i), base_of(name))
        same = [other for other, before in seen.items() if equal(trained, before)]
        assert same == [], f"{name} {options} trained the network like {same}"
        seen[f"{name} {options}"] = trained


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_seed_reproduces_and_another_differs(name, tmp_path):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        method = {"name": name, "options": SMALL.get(name, {})}
        run = one_run(base_of(name), methods=[method], seeds=[seed])
        runs.append(train(run, tmp_path / str(i))[0])
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none").mean()


@pytest.mark.parametrize("name", [name for name in SUPERVISED if name != "dropout"])
def test_nothing_global_is_read_or_advanced(name):
    model, hidden, x, y = small_network(name)
    seen = []
    for seed in (1, 2):
        method = make_method(name, SMALL.get(name, {}))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        transform = method.attach(model, hidden, seed=3)
        method.companion()
        for _ in range(3):
            mixed, target = transform(x, y)
            seen.append(method.loss(cross_entropy, model(mixed), target))
        method.detach()
        assert torch.equal(torch.get_rng_state(), before)
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize("name", SUPERVISED)
def test_detach_leaves_no_trace(name):
    model, hidden, x, y = small_network(name)
    expected, names = model(x), list(model.state_dict())
    method = make_method(name, SMALL.get(name, {}))
    transform = method.attach(model, hidden, seed=3)
    model(transform(x, y)[0])
    method.detach()
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize("name", SUPERVISED)
def test_the_batch_of_the_caller_stays_as_it_is(name):
    model, hidden, x, y = small_network(name)
    before = x.clone(), y.clone()
    method = make_method(name, SMALL.get(name, {}))
    transform = method.attach(model, hidden, seed=3)
    for _ in range(3):
        model(transform(x, y)[0])
    method.detach()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize(
    "name", sorted(set(SUPERVISED) - {"none", "dropout", "batch_norm", "weight_decay", "label_smoothing"})
)
@pytest.mark.parametrize("done", [0, 3])
def test_state_goes_on_where_it_was(name, done):
    model, hidden, x, y = small_network(name)

    def losses(method, transform, n):
        result = []
        for _ in range(n):
            mixed, target = transform(x, y)
            result.append(method.loss(cross_entropy, model(mixed), target).item())
        return result

    method = make_method(name, SMALL.get(name, {}))
    transform = method.attach(model, hidden, seed=3)
    losses(method, transform, done)
    tensors = {}
    packed = storage.pack(method.state_dict(), tensors)  # what a checkpoint does
    companion = method.companion()
    expected = losses(method, transform, 3)
    method.detach()
    other = make_method(name, SMALL.get(name, {}))
    transform = other.attach(model, hidden, seed=4)
    other.load_state_dict(storage.unpack(packed, tensors))
    if companion is not None:
        other.companion().load_state_dict(companion.state_dict())
    assert losses(other, transform, 3) == expected
    assert len(set(expected)) == 3


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
    assert make_method("blocked_gradient", {}).options.alpha == 2.0
    assert make_method("dropout", {}).options.p == 0.5
    assert make_method("cutout", {}).options.size == 16
    cutmix = make_method("cutmix", {}).options
    assert (cutmix.alpha, cutmix.probability, cutmix.per) == (1.0, 0.5, "batch")
    assert make_method("label_smoothing", {}).options.epsilon == 0.1
    noisy = make_method("noisy_feature_mixup", {}).options
    assert (noisy.alpha, noisy.additive, noisy.multiplicative) == (1.0, 0.4, 0.2)


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_methods_for_images_refuse_other_data(name, tmp_path):
    with pytest.raises(UsageError, match=rf"method '{name}' reads images.*not \(10, 2\)"):
        train(one_run(SPIRAL, methods=[{"name": name}]), tmp_path)


def test_label_smoothing_takes_the_place_of_the_recipes_own(tmp_path):
    def trained(name, **changes):
        return train(one_run(methods=[{"name": name}], **changes), tmp_path / str(len(list(tmp_path.iterdir()))))[0]

    smoothed = trained("label_smoothing")
    assert equal(smoothed, trained("label_smoothing", train__label_smoothing=0.3))
    assert equal(smoothed, trained("none", train__label_smoothing=0.1))


def test_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown method 'manifold_mix': did you mean 'manifold_mixup'"):
        get_method("manifold_mix")


def test_facts_name_the_layers_that_were_mixed(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "manifold_mixup", "options": {"layers": ["input", "hidden.1"]}}])
    assert train(run, tmp_path)[1].facts["layers"] == ["input", "hidden.1"]
    automatic = one_run(DIGITS, methods=[{"name": "manifold_mixup"}])
    assert train(automatic, tmp_path / "auto")[1].facts["layers"][0] == "input"
