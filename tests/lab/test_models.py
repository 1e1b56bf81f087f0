import dataclasses
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from manifold_mixup import ManifoldMixup, cut_points
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.models import MODELS, build_model, get_model, hidden_layers
from manifold_mixup.lab.models.wide_resnet import WideResNet
from manifold_mixup.lab.networks import build_network, own, survey

IMAGE = (3, 8, 8)
SMALL = {  # options that make a network small, and the shape of an example
    "spiral_net": ({}, (2,)),
    "mlp": ({}, (1, 8, 8)),
    "mnist_bottleneck": ({"width": 0.02}, (1, 8, 8)),
    "preact_resnet8": ({}, (1, 8, 8)),
    **{f"preact_resnet{depth}": ({"width": 1 / 32}, IMAGE) for depth in (18, 34, 50, 101, 152)},
    "wrn_28_10": ({"width": 1 / 40}, IMAGE),
    "wrn_28_2": ({"width": 1 / 8}, IMAGE),
}
PREACT = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def test_every_network_is_tried_here_or_comes_from_a_library():
    known = {name for name, entry in MODELS.items() if entry.positional is None}
    assert SMALL.keys() == known - {name for name in known if get_model(name).graph}  # those have a file of their own


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_hidden_layers(name):
    options, shape = SMALL[name]
    model = build_model(name, options, shape, 5)
    assert model(torch.randn(3, *shape)).shape == (3, 5)
    assert set(hidden_layers(name, options)) <= dict(model.named_modules()).keys()


@pytest.mark.parametrize("name", SMALL)
def test_every_hidden_layer_can_be_mixed_and_they_are_in_the_order_of_the_forward(name):
    options, shape = SMALL[name]
    with torch.device("meta"):
        found = [point.name for point in cut_points(build_model(name, options, shape, 5), torch.randn(4, *shape))]
    known = hidden_layers(name, options)
    assert [point for point in found if point in known] == known


# ------------------------------------------------------------------ fully connected networks


def test_the_spirals_network_has_nine_layers_and_a_plane_in_the_middle():
    model = build_model("spiral_net", {"width": 16}, (2,), 2)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 9
    assert [layer.out_features for layer in linear] == [16] * 4 + [2] + [16] * 3 + [2]
    codes = []
    model.get_submodule("bottleneck").register_forward_hook(lambda module, args, output: codes.append(output))
    model(torch.randn(6, 2))
    assert codes[0].shape == (6, 2)


def test_dropout_is_in_all_layers_of_the_spirals_network_but_the_bottleneck():
    model = build_model("spiral_net", {"dropout": 0.3}, (2,), 2)
    where = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert len(where) == 7
    assert not any(name.startswith("bottleneck") for name in where)
    assert all(model.get_submodule(name).p == 0.3 for name in where)


def test_batch_norm_is_in_all_layers_of_the_spirals_network():
    model = build_model("spiral_net", {"batch_norm": True}, (2,), 2)
    assert sum(isinstance(module, nn.BatchNorm1d) for module in model.modules()) == 8
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.get_submodule("bottleneck").modules())


def test_input_scale_is_a_fixed_factor():
    torch.manual_seed(0)
    plain = build_model("spiral_net", {}, (2,), 2)
    torch.manual_seed(0)
    scaled = build_model("spiral_net", {"input_scale": 0.5}, (2,), 2)
    x = torch.randn(4, 2)
    assert torch.equal(scaled(x), plain(x * 0.5))


@pytest.mark.parametrize(("options", "parts"), [({"dropout": 0.4}, nn.Dropout), ({"batch_norm": True}, nn.BatchNorm1d)])
def test_mlp_options(options, parts):
    model = build_model("mlp", {"width": 12, "depth": 4, **options}, (1, 8, 8), 10)
    assert sum(isinstance(module, parts) for module in model.modules()) == 4
    assert hidden_layers("mlp", {"depth": 4}) == ["hidden.1", "hidden.2", "hidden.3", "hidden.4"]
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [12] * 4 + [10]


FIGURES = {  # of the paper: options, and the sizes of all layers
    "5": ({"bottleneck": 2, "before": 2, "after": 2}, [784, 1024, 1024, 2, 1024, 1024, 10]),
    "9": ({}, [784, 1024, 1024, 1024, 12, 1024, 1024, 1024, 1024, 10]),
    "10": ({"bottleneck": 30}, [784, 1024, 1024, 1024, 30, 1024, 1024, 1024, 1024, 10]),
    "11": ({"bottleneck": 30, "before": 1, "after": 0}, [784, 1024, 30, 10]),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_the_mnist_networks_are_those_of_the_papers_figures(figure):
    options, sizes = FIGURES[figure]
    with torch.device("meta"):
        model = build_model("mnist_bottleneck", options, (1, 28, 28), 10)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == sizes
    assert sum(p.numel() for p in model.parameters()) == sum((a + 1) * b for a, b in pairwise(sizes))
    before = options.get("before", 3)
    names = [f"encoder.{i}" for i in range(1, before + 1)] + ["bottleneck"]
    names += [f"decoder.{i}" for i in range(before + 2, len(sizes) - 1)]
    assert hidden_layers("mnist_bottleneck", options) == names
    assert {"input", *names} <= {point.name for point in cut_points(model, torch.randn(4, 1, 28, 28, device="meta"))}


@pytest.mark.parametrize("options", [{}, {"before": 1, "after": 0}, {"batch_norm": True}, {"dropout": 0.25}])
@pytest.mark.parametrize("training", [True, False])
def test_the_mnist_network_computes_what_a_loop_over_its_layers_does(options, training):
    sizes = {"bottleneck": 3, "before": 2, "after": 2, "units": 20, "width": 0.5, **options}
    model = build_model("mnist_bottleneck", sizes, (1, 4, 4), 5).double().train(training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(7, 1, 4, 4).double()
    torch.manual_seed(1)
    outputs = {}
    model.bottleneck.register_forward_hook(partial(keep, outputs, "bottleneck"))
    output = model(x)
    torch.manual_seed(1)
    h = x.reshape(7, 16)
    for name in hidden_layers("mnist_bottleneck", sizes):
        h = h @ state[f"{name}.linear.weight"].T + state[f"{name}.linear.bias"]
        if "batch_norm" in options:
            h = norm(state, f"{name}.norm", h, training)
        if name == "bottleneck":
            assert torch.allclose(outputs[name], h, rtol=1e-12, atol=1e-12)
            assert (h < 0).any()
            continue
        h = torch.where(h > 0, h, 0.01 * h)
        h = F.dropout(h, options.get("dropout", 0.0), training)
    assert torch.allclose(output, h @ state["head.weight"].T + state["head.bias"], rtol=1e-10, atol=1e-12)


def keep(outputs, name, module, args, output):
    outputs[name] = output


def norm(state, name, h, training, momentum=0.1):
    """Batch norm in plain arithmetic; it brings the running statistics in ``state`` up to date, as torch does."""
    dims = [d for d in range(h.dim()) if d != 1]
    view = (1, -1, *[1] * (h.dim() - 2))
    mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
    if training:
        mean, var = h.mean(dims), h.var(dims, correction=0)
        n = h.numel() / h.shape[1]
        state[f"{name}.num_batches_tracked"] += 1
        state[f"{name}.running_mean"].lerp_(mean, momentum)
        state[f"{name}.running_var"].lerp_(var * n / (n - 1), momentum)
    h = (h - mean.view(view)) / (var.view(view) + 1e-5).sqrt()
    return h * state[f"{name}.weight"].view(view) + state[f"{name}.bias"].view(view)


# ------------------------------------------------------------------ residual networks


def test_the_small_residual_net_draws_its_weights_stem_first_and_the_head_last():
    torch.manual_seed(3)
    model = build_model("preact_resnet8", {"width": 4}, (1, 8, 8), 10)
    torch.manual_seed(3)
    drawn = [nn.Conv2d(1, 4, 3, bias=False).weight]
    for inputs, outputs in ((4, 4), (4, 8), (8, 16)):
        drawn += [nn.Conv2d(n, outputs, 3, bias=False).weight for n in (inputs, outputs)]
        drawn += [nn.Conv2d(inputs, outputs, 1, bias=False).weight] if inputs != outputs else []
    head = nn.Linear(16, 10)
    drawn += [head.weight, head.bias]
    norms = [parameter for name, parameter in model.named_parameters() if ".norm" in name]
    rest = [parameter for name, parameter in model.named_parameters() if ".norm" not in name]
    assert len(rest) == len(drawn)
    assert all(torch.equal(a, b) for a, b in zip(rest, drawn, strict=True))
    assert len(norms) == 12
    assert get_model("preact_resnet8").options().model_dump() == {"width": 16, "blocks": 1}  # a record holds these


def test_the_residual_nets_stages_return_raw_sums():
    model = build_model("preact_resnet8", {"width": 4, "blocks": 2}, (1, 8, 8), 10).eval()
    outputs = {}
    for name in ("stage1", "stage2", "stage3"):
        model.get_submodule(name).register_forward_hook(partial(keep, outputs, name))
    model(torch.randn(2, 1, 8, 8))
    shapes = {name: tuple(output.shape) for name, output in outputs.items()}
    assert shapes == {"stage1": (2, 4, 8, 8), "stage2": (2, 8, 4, 4), "stage3": (2, 16, 2, 2)}
    assert all((output < 0).any() for output in outputs.values())  # no ReLU after the sum
    assert sum(isinstance(m, nn.Conv2d) for m in model.stage1.modules()) == 4


def preact_parameters(depth, classes, channels=3, width=64, final_norm=False):
    """Numbers of parameters, layer by layer."""
    total, inputs = channels * width * 9, width
    for stage, blocks in enumerate(PREACT[depth]):
        planes = width * 2**stage
        outputs = planes if depth < 50 else 4 * planes
        for block in range(blocks):
            if depth < 50:
                total += 2 * inputs + 9 * inputs * planes + 2 * planes + 9 * planes * planes
            else:
                total += 2 * inputs + inputs * planes + 2 * planes + 9 * planes * planes + 2 * planes + planes * outputs
            if block == 0 and (stage > 0 or inputs != outputs):
                total += inputs * outputs
            inputs = outputs
    return total + (2 * inputs if final_norm else 0) + inputs * classes + classes


def wrn_parameters(depth, widen, classes, biases, channels=3):
    """Numbers of parameters, layer by layer."""

    def convolution(inputs, outputs, side):
        return side * side * inputs * outputs + (outputs if biases else 0)

    total, inputs = convolution(channels, 16, 3), 16
    for stage in range(3):
        outputs = 16 * widen * 2**stage
        for block in range((depth - 4) // 6):
            total += 2 * inputs + convolution(inputs, outputs, 3) + 2 * outputs + convolution(outputs, outputs, 3)
            total += convolution(inputs, outputs, 1) if block == 0 else 0
            inputs = outputs
    return total + 2 * inputs + inputs * classes + classes


def count(name, options, shape, classes):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, options, shape, classes).parameters())


PUBLISHED = {  # millions, with 10 classes
    "preact_resnet18": 11.17,
    "preact_resnet34": 21.28,
    "preact_resnet50": 23.51,
    "wrn_28_10": 36.5,
    "wrn_28_2": 1.5,
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("depth", PREACT)
def test_pre_activation_networks_have_the_published_numbers_of_parameters(depth, classes):
    name = f"preact_resnet{depth}"
    assert count(name, {}, (3, 32, 32), classes) == preact_parameters(depth, classes)
    assert count(name, {"final_norm": True}, (1, 28, 28), classes) == preact_parameters(depth, classes, 1, 64, True)
    assert count(name, {"width": 0.3}, (3, 32, 32), classes) == preact_parameters(depth, classes, width=19)
    if name in PUBLISHED and classes == 10:
        assert round(preact_parameters(depth, 10) / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("widen", [10, 2])
@pytest.mark.parametrize("variant", ["code", "standard"])
def test_wide_networks_have_the_published_numbers_of_parameters_in_both_variants(variant, widen, classes):
    name, expected = f"wrn_28_{widen}", wrn_parameters(28, widen, classes, variant == "code")
    assert count(name, {"variant": variant}, (3, 32, 32), classes) == expected
    if classes == 10:
        assert round(expected / 1e6, 1) == PUBLISHED[name]
    if (widen, classes) == (10, 10):
        assert expected == {"code": 36_489_290, "standard": 36_479_194}[variant]


def test_the_authors_variant_is_the_default_of_wide_networks():
    assert get_model("wrn_28_10").options().variant == "code"
    model = build_model("wrn_28_2", {"width": 0.1}, IMAGE, 10)
    assert model.norm.momentum == 0.9
    assert model.stage1[0].conv1.bias is not None


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50", "wrn_28_10", "wrn_28_2", "mnist_bottleneck"])
def test_a_greater_width_factor_makes_a_larger_network_and_none_is_too_small(name):
    counts = [count(name, {"width": width}, (3, 32, 32), 10) for width in (1e-9, 0.1, 0.25, 0.5, 1.0, 1.5)]
    assert counts == sorted(set(counts))
    assert count(name, {"width": 1.0}, (3, 32, 32), 10) == count(name, {}, (3, 32, 32), 10)
    with pytest.raises(ValidationError):
        count(name, {"width": 0.0}, (3, 32, 32), 10)


def run_preact(state, x, depth, training, stride=1, final_norm=False, dropout=0.0):
    """A pre-activation network written out with the functions of torch, on the weights of ``state``."""
    h = F.conv2d(x, state["stem.weight"], stride=stride, padding=1)
    for stage, blocks in enumerate(PREACT[depth], 1):
        for block in range(blocks):
            at = f"stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            active = norm(state, f"{at}.norm1", h, training).clamp(min=0)
            skip = F.conv2d(active, w, stride=stride) if (w := state.get(f"{at}.shortcut.weight")) is not None else h
            sides = [(3, stride), (3, 1)] if depth < 50 else [(1, 1), (3, stride), (1, 1)]
            h = active
            for i, (side, step) in enumerate(sides, 1):
                h = norm(state, f"{at}.norm{i}", h, training).clamp(min=0) if i > 1 else h
                h = F.dropout(h, dropout, training) if i == len(sides) else h
                h = F.conv2d(h, state[f"{at}.conv{i}.weight"], stride=step, padding=side // 2)
            h = h + skip
    if final_norm:
        h = norm(state, "norm", h, training).clamp(min=0)
    return F.adaptive_avg_pool2d(h, 1).flatten(1) @ state["head.weight"].T + state["head.bias"]


def run_wrn(state, x, training, variant, stride=1, dropout=0.0, slope=0.0):
    """WRN-28 written out with the functions of torch, on the weights of ``state``."""
    code = variant == "code"

    def act(h):
        return h.clamp(min=0) + slope * h.clamp(max=0)

    def convolution(name, h, **settings):
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"] if code else None, **settings)

    h = convolution("stem", x, stride=stride, padding=1)
    for stage in (1, 2, 3):
        for block in range(4):
            at, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            active = act(norm(state, f"{at}.norm1", h, training))
            skip = convolution(f"{at}.shortcut", h if code else active, stride=stride) if block == 0 else h
            h = convolution(f"{at}.conv1", active, stride=1 if code else stride, padding=1)
            h = F.dropout(act(norm(state, f"{at}.norm2", h, training)), dropout, training)
            h = convolution(f"{at}.conv2", h, stride=stride if code else 1, padding=1) + skip
    h = act(norm(state, "norm", h, training, momentum=0.9 if code else 0.1))
    return F.adaptive_avg_pool2d(h, 1).flatten(1) @ state["head.weight"].T + state["head.bias"]


TWINS = {
    "18": ("preact_resnet18", {}, partial(run_preact, depth=18)),
    "34": ("preact_resnet34", {}, partial(run_preact, depth=34)),
    "50": ("preact_resnet50", {}, partial(run_preact, depth=50)),
    "18, norm": ("preact_resnet18", {"final_norm": True}, partial(run_preact, depth=18, final_norm=True)),
    "50, stride": ("preact_resnet50", {"stem_stride": 2}, partial(run_preact, depth=50, stride=2)),
    "18, dropout": ("preact_resnet18", {"dropout": 0.3}, partial(run_preact, depth=18, dropout=0.3)),
    "50, dropout": ("preact_resnet50", {"dropout": 0.3}, partial(run_preact, depth=50, dropout=0.3)),
    "wrn, code": ("wrn_28_2", {"variant": "code"}, partial(run_wrn, variant="code")),
    "wrn, standard": ("wrn_28_2", {"variant": "standard"}, partial(run_wrn, variant="standard")),
    "wrn, dropout": ("wrn_28_10", {"dropout": 0.3}, partial(run_wrn, variant="code", dropout=0.3)),
    "wrn, leaky": ("wrn_28_2", {"negative_slope": 0.3}, partial(run_wrn, variant="code", slope=0.3)),
    "wrn, leaky, standard": (
        "wrn_28_2",
        {"negative_slope": 0.3, "variant": "standard"},
        partial(run_wrn, variant="standard", slope=0.3),
    ),
    "wrn, stride": ("wrn_28_10", {"stem_stride": 2}, partial(run_wrn, variant="code", stride=2)),
}


def shaken(model):
    """Parameters and statistics that are nowhere 0 or 1, in double precision."""
    for name, tensor in model.double().state_dict().items():
        if "norm" in name and tensor.dtype == torch.float64:
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("twin", TWINS)
def test_residual_networks_compute_what_is_written_out_here(twin, training):
    name, options, run = TWINS[twin]
    small, shape = SMALL[name]
    model = shaken(build_model(name, {**small, **options}, shape, 5)).train(training)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(4, *shape).double()
    torch.manual_seed(5)
    expected = run(state, x, training=training)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=1e-8, atol=1e-10)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.allclose(after[key], state[key], rtol=1e-8, atol=1e-10) for key in state)


@pytest.mark.parametrize("name", ["preact_resnet18", "wrn_28_2"])
def test_images_of_64_pixels_are_halved_by_the_first_convolution_unless_told_otherwise(name):
    def sizes(shape, **options):
        with torch.device("meta"):
            points = cut_points(build_model(name, options, shape, 10), torch.randn(2, *shape))
        return [point.shape[1:] for point in points if point.name in ("stage1", "stage2")]

    assert sizes((3, 64, 64)) == [(32, 32), (16, 16)]
    assert sizes((3, 96, 64)) == [(48, 32), (24, 16)]
    assert sizes((3, 64, 48)) == [(64, 48), (32, 24)]
    assert sizes((1, 28, 28)) == [(28, 28), (14, 14)]
    assert sizes((3, 64, 64), stem_stride=1) == [(64, 64), (32, 32)]
    assert sizes((3, 32, 32), stem_stride=2) == [(16, 16), (8, 8)]
    for wrong in (0, 3, "2"):
        with pytest.raises(ValidationError):
            sizes((3, 32, 32), stem_stride=wrong)


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet50", "wrn_28_2"])
def test_the_memory_format_does_not_matter(name):
    options, shape = SMALL[name]
    model = build_model(name, options, shape, 5).double()
    x = torch.randn(4, *shape).double()
    expected = model.eval()(x)
    model.to(memory_format=torch.channels_last)
    outputs = {}
    model.stage2.register_forward_hook(partial(keep, outputs, "stage2"))
    assert torch.allclose(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-10, atol=1e-12)
    assert outputs["stage2"].is_contiguous(memory_format=torch.channels_last)


def test_standard_wide_networks_start_as_he_et_al_say_and_the_authors_as_torch_does():
    def spread(variant, slope=0.0):
        model = build_model("wrn_28_2", {"variant": variant, "negative_slope": slope}, IMAGE, 10)
        weight = model.stage3[0].conv1.weight
        assert weight.shape == (128, 64, 3, 3)
        return float(weight.detach().std()), model.head.bias

    sd, bias = spread("standard")
    assert sd == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert not bias.any()
    assert spread("standard", 0.5)[0] == pytest.approx(math.sqrt(2 / (1 + 0.5**2) / (9 * 128)), rel=0.02)
    sd, bias = spread("code")
    assert sd == pytest.approx(1 / math.sqrt(3 * 9 * 64), rel=0.02)
    assert bias.all()


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_the_depth_of_a_wide_network_is_the_number_of_its_convolutions(depth):
    model = WideResNet(depth, 3, 10, width=4)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth
    assert len(model.stage1) == len(model.stage2) == len(model.stage3) == (depth - 4) / 6


def test_a_depth_that_no_wide_network_has_is_refused():
    for depth in (4, 27, -2):
        with pytest.raises(ValueError, match="depth should be 6 n [+] 4"):
            WideResNet(depth, 3, 10, width=4)


# ------------------------------------------------------------------ where they are mixed


@pytest.mark.parametrize(
    "text",
    [
        "preact_resnet18",
        "preact_resnet34",
        "preact_resnet50",
        "wrn_28_10",
        "wrn_28_10:variant=standard",
        "wrn_28_2",
        "preact_resnet18:width=0.1",
        "preact_resnet34:width=0.1",
        "wrn_28_10:width=0.05",
    ],
)
@pytest.mark.parametrize("shape", ["3,32,32", "3,64,64", "1,28,28"])
def test_the_automatic_choice_of_layers_is_the_papers(text, shape):
    assert survey(build_network(text, [shape], meta=True)).layers == ["input", "stage1", "stage2"]


@pytest.mark.parametrize("name", ["preact_resnet18", "wrn_28_2"])
def test_a_mixer_finds_the_papers_layers_in_training(name):
    options, shape = SMALL[name]
    model = build_model(name, options, shape, 5)
    mixup = ManifoldMixup(model, alpha=2.0, seed=0)
    drawn = set()
    for _ in range(12):
        x, y = mixup(torch.randn(4, *shape), torch.randint(5, (4,)))
        F.cross_entropy(model(x), y).backward()
        drawn.add(mixup.last.layer)
    assert drawn == {"input", "stage1", "stage2"} == set(mixup.layers)


def test_a_look_at_a_network_passes_over_data_whose_shape_nobody_knows_yet(monkeypatch):
    plain = build_network("preact_resnet8:width=4")
    (first, digits) = (DATASETS["spiral"], DATASETS["digits"])
    unknown = dataclasses.replace(first, info=dataclasses.replace(first.info, shape=(), classes=()))
    monkeypatch.setattr(own, "DATASETS", {"folder": unknown, "spiral": first, "digits": digits})
    network = build_network("preact_resnet8:width=4")
    assert network.args[0].shape == plain.args[0].shape == (2, 1, 8, 8)
    assert build_network("mlp:width=3").args[0].shape == (2, 2)
    monkeypatch.setattr(own, "DATASETS", {"folder": unknown, "spiral": first})
    with pytest.raises(UsageError, match="'preact_resnet8' reads images.*give the shape of one example with --input"):
        build_network("preact_resnet8")


# ------------------------------------------------------------------ errors


def test_a_network_for_vectors_refuses_images_and_the_other_way_round():
    with pytest.raises(UsageError, match="reads vectors"):
        build_model("spiral_net", {}, (1, 8, 8), 10)
    for name in ("preact_resnet8", "preact_resnet18", "wrn_28_10"):
        with pytest.raises(UsageError, match=f"model '{name}' reads images"):
            build_model(name, {}, (2,), 2)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown model 'mpl': did you mean 'mlp'"):
        get_model("mpl")
