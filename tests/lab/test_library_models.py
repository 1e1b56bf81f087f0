"""Networks of timm and torchvision as networks of recipes."""

import socket
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from lab.small import DIGITS, tree
from manifold_mixup import ManifoldMixup, cut_points
from manifold_mixup.lab.errors import MissingExtra, RecipeError, UnknownName, UsageError
from manifold_mixup.lab.models import build_model, get_model, hidden_layers
from manifold_mixup.lab.parsing import parse_config
from manifold_mixup.lab.recipe import Overrides, apply_overrides

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CIFAR, GREY = (3, 32, 32), (1, 28, 28)
VIT = {"network": "vit_tiny_patch16_224", "patch_size": 8, "depth": 2, "embed_dim": 24}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something is about to be downloaded")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def on_meta(name, options, shape, classes=10):
    with torch.device("meta"):
        return build_model(name, options, shape, classes)


def same_weights(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------ what is built


def test_a_network_of_timm_is_create_model_with_the_datas_classes_and_channels():
    torch.manual_seed(1)
    model = build_model("timm", {"network": "test_resnet"}, GREY, 7)
    torch.manual_seed(1)
    other = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    assert same_weights(model, other)
    assert all(module.training for module in model.modules())
    x = torch.randn(3, *GREY)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert model(x).shape == (3, 7)


def test_a_network_of_torchvision_is_get_model_with_the_datas_classes():
    torch.manual_seed(1)
    model = build_model("torchvision", {"network": "squeezenet1_1"}, CIFAR, 7)
    torch.manual_seed(1)
    other = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=7)
    assert same_weights(model, other)
    assert all(module.training for module in model.modules())
    assert model(torch.randn(3, *CIFAR)).shape == (3, 7)


def test_further_options_are_keyword_arguments_of_the_library():
    model = build_model("timm", VIT, CIFAR, 10)
    assert (len(model.blocks), model.embed_dim, tuple(model.patch_embed.grid_size)) == (2, 24, (4, 4))
    model = on_meta("torchvision", {"network": "mobilenet_v3_small", "dropout": 0.4}, CIFAR)
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.4]
    resolved = get_model("timm").options.model_validate(VIT).model_dump()
    assert resolved == VIT  # what a record holds


@pytest.mark.parametrize("text", ["timm:test_resnet,drop_rate=0.1", "timm:network=test_resnet,drop_rate=0.1"])
def test_a_name_on_the_command_line_becomes_the_option(text):
    raw = tree(DIGITS)
    apply_overrides(raw, Overrides(model=text))
    model = parse_config(raw, "test").model
    assert (model.name, model.options) == ("timm", {"network": "test_resnet", "drop_rate": 0.1})
    apply_overrides(raw, Overrides(model=text.replace("resnet", "resnt")))
    with pytest.raises(RecipeError, match="model: unknown timm network 'test_resnt': did you mean .*'test_resnet'"):
        parse_config(raw, "test")


NETWORKS = [
    ("timm", "resnet18"),
    ("timm", "resnet18.a1_in1k"),
    ("timm", "vit_tiny_patch16_224"),
    ("timm", "swin_tiny_patch4_window7_224"),
    ("timm", "mixer_s16_224"),
    ("timm", "convnext_atto"),
    ("timm", "mobilenetv3_small_100"),
    ("timm", "densenet121"),
    ("torchvision", "resnet18"),
    ("torchvision", "regnet_y_400mf"),  # its constructor needs values of tensors, so it has none on meta
    ("torchvision", "vit_b_16"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "densenet121"),
]


@pytest.mark.parametrize(("library", "network"), NETWORKS)
def test_networks_made_for_large_images_read_small_ones_and_their_hidden_layers_are_cut_points(library, network):
    options = {"network": network}
    before = torch.get_rng_state()
    hidden = hidden_layers(library, options)
    assert torch.equal(torch.get_rng_state(), before)
    model = on_meta(library, options, CIFAR)
    points = [point.name for point in cut_points(model, torch.randn(4, *CIFAR, device="meta"))]
    assert len(hidden) >= 2
    assert [name for name in points if name in hidden] == hidden
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert model.get_submodule(last).out_features == 10
    assert last not in hidden


@pytest.mark.parametrize("network", ["squeezenet1_1", "resnet18", "shufflenet_v2_x0_5"])
def test_a_grey_image_is_read_as_three_equal_channels(network):
    x = torch.randn(3, 1, 32, 32)

    def outputs(channels):
        torch.manual_seed(1)
        model = build_model("torchvision", {"network": network}, (channels, 32, 32), 4)
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        torch.manual_seed(2)
        return model, model(x.expand(3, channels, 32, 32))  # in training, where batch norms keep images apart

    (grey, actual), (colour, expected) = outputs(1), outputs(3)
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2, atol=1e-3)
    first = next(m for m in colour.modules() if isinstance(m, nn.Conv2d))
    fewer = first.weight.numel() * 2 // 3
    assert sum(p.numel() for p in grey.parameters()) == sum(p.numel() for p in colour.parameters()) - fewer


def test_hidden_layers_are_timms_own_features_or_else_the_parts_before_the_head():
    assert hidden_layers("timm", {"network": "resnet18"}) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert hidden_layers("timm", VIT) == ["blocks.0", "blocks.1"]
    stages = [f"body.layer{i}" for i in range(1, 5)]
    assert hidden_layers("timm", {"network": "tresnet_m"}) == stages  # timm lists a part without a name before them
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert hidden_layers("torchvision", {"network": "resnet18"}) == parts
    layers = [f"features.{i}" for i in (0, 3, 6, 8, 10)]
    assert hidden_layers("torchvision", {"network": "alexnet"}) == layers


def test_the_seed_decides_about_the_weights_and_the_check_draws_nothing():
    def drawn():
        torch.manual_seed(4)
        model = build_model("timm", {**VIT, "drop_rate": 0.2, "drop_path_rate": 0.5}, CIFAR, 3)
        return model, torch.get_rng_state()

    (model, state), (again, _) = drawn(), drawn()
    assert same_weights(model, again)
    torch.manual_seed(4)
    timm.create_model(VIT["network"], num_classes=3, img_size=32, patch_size=8, depth=2, embed_dim=24)
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_that_draws_in_its_forward_leaves_the_random_state_alone_while_it_is_checked(monkeypatch):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3)) + torch.rand(3))

    monkeypatch.setattr(timm, "create_model", lambda *args, **keywords: Drawing())
    torch.manual_seed(4)
    nn.Linear(3, 2)
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    build_model("timm", {"network": "resnet18"}, CIFAR, 2)
    assert torch.equal(torch.get_rng_state(), expected)


def test_statistics_are_untouched_by_the_check():
    model = build_model("timm", {"network": "test_resnet"}, CIFAR, 3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(int(m.num_batches_tracked) == 0 and not m.running_mean.any() for m in norms)


@pytest.mark.parametrize(("library", "options"), [("timm", VIT), ("torchvision", {"network": "squeezenet1_1"})])
def test_a_mixer_trains_them(library, options):
    model = build_model(library, options, CIFAR, 3)
    mixup = ManifoldMixup(model, alpha=2.0, seed=0)
    for _ in range(3):
        x, y = mixup(torch.randn(4, *CIFAR), torch.randint(3, (4,)))
        F.cross_entropy(model(x), y).backward()
    assert len(mixup.layers) == 3
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("library", "option", "reason"),
    [
        ("timm", "pretrained", "draws its weights from its seed and never downloads any"),
        ("timm", "checkpoint_path", "draws its weights from its seed and never downloads any"),
        ("timm", "num_classes", "the data set says it"),
        ("timm", "in_chans", "the data set says it"),
        ("timm", "img_size", "the data set says it"),
        ("timm", "features_only", "one logit for each class"),
        ("torchvision", "weights", "draws its weights from its seed and never downloads any"),
        ("torchvision", "image_size", "the data set says it"),
    ],
)
def test_what_the_data_or_the_seed_decide_is_no_option(library, option, reason):
    options = {"network": "resnet18", option: True}
    for ask in (lambda: build_model(library, options, CIFAR, 10), lambda: hidden_layers(library, options)):
        with pytest.raises(UsageError, match=f"{library}:resnet18: leave out the option '{option}': .*{reason}"):
            ask()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_networks_name_the_nearest(library):
    for ask in (lambda o: build_model(library, o, CIFAR, 10), lambda o: hidden_layers(library, o)):
        with pytest.raises(UnknownName, match=f"unknown {library} network 'resnt18': did you mean .*'resnet18'"):
            ask({"network": "resnt18"})
        with pytest.raises(UsageError, match=f"unknown {library} network '123456'.*list_models.* lists them"):
            ask({"network": "123456"})
        with pytest.raises(UsageError, match=f"model '{library}' needs the name of a network: {library}:resnet18"):
            ask({})


def test_torchvisions_networks_for_other_tasks_are_unknown_here():
    with pytest.raises(UnknownName, match="unknown torchvision network 'fcn_resnet50'"):
        build_model("torchvision", {"network": "fcn_resnet50"}, CIFAR, 10)


@pytest.mark.parametrize(
    ("library", "options", "shape", "pattern"),
    [
        ("timm", {"network": "resnet18"}, (2,), "model 'timm:resnet18' reads images, not examples of shape"),
        ("timm", {"network": "resnet18", "depht": 2}, CIFAR, "'timm:resnet18' cannot be built: TypeError: .*depht"),
        ("timm", {"network": "resnet18", "label": "x"}, CIFAR, "'timm:resnet18' cannot be built: TypeError: .*label"),
        ("timm", {"network": "inception_v3"}, CIFAR, "'timm:inception_v3' cannot read images of shape .3, 32, 32"),
        (
            "timm",
            {**VIT, "global_pool": ""},
            CIFAR,
            "is no classifier: for one image it returns .17, 10., not 10 logits",
        ),
        ("torchvision", {"network": "resnet18"}, (2,), "model 'torchvision:resnet18' reads images"),
        ("torchvision", {"network": "resnet18"}, (2, 8, 8), "reads images of 1 or 3 channels, not 2; timm's"),
        ("torchvision", {"network": "alexnet"}, CIFAR, "'torchvision:alexnet' cannot read images of shape"),
        ("torchvision", {"network": "vit_b_16"}, (3, 32, 48), "'torchvision:vit_b_16' cannot read images of shape"),
        ("torchvision", {"network": "maxvit_t"}, CIFAR, "cannot be built: ValueError: .*not divisible by partition"),
        ("torchvision", {"network": "googlenet", "init_weights": False}, CIFAR, "add the option aux_logits=false"),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_line(library, options, shape, pattern):
    with pytest.raises(UsageError, match=pattern):
        on_meta(library, options, shape)


def test_a_network_with_further_logits_can_leave_them_out():
    options = {"network": "googlenet", "init_weights": False, "aux_logits": False}
    assert on_meta("torchvision", options, CIFAR).fc.out_features == 10


def test_options_are_plain_finite_values():
    for wrong in (
        {"network": 3},
        {"network": "resnet18", "drop_rate": float("nan")},
        {**VIT, "norm_layer": nn.Identity},
    ):
        with pytest.raises(ValidationError):
            build_model("timm", wrong, CIFAR, 10)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"needs the package '{library}': pip install 'manifold-mixup\[vision\]'"):
        build_model(library, {"network": "resnet18"}, CIFAR, 10)


def test_the_registry_says_which_option_a_name_with_a_colon_sets():
    assert {get_model(name).positional for name in ("timm", "torchvision")} == {"network"}
    assert get_model("mlp").positional is None
