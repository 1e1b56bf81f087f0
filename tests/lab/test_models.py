from functools import partial

import pytest
import torch
from torch import nn

from manifold_mixup import cut_points
from manifold_mixup.lab.errors import UnknownName, UsageError
from manifold_mixup.lab.models import MODELS, build_model, get_model, hidden_layers

SHAPES = {"spiral_net": (2,), "mlp": (1, 8, 8), "preact_resnet8": (1, 8, 8)}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_hidden_layers(name):
    model = build_model(name, {}, SHAPES[name], 5)
    assert model(torch.randn(3, *SHAPES[name])).shape == (3, 5)
    assert set(hidden_layers(name, {})) <= dict(model.named_modules()).keys()


@pytest.mark.parametrize("name", MODELS)
def test_every_hidden_layer_can_be_mixed(name):
    model = build_model(name, {}, SHAPES[name], 5)
    found = {point.name for point in cut_points(model, torch.randn(4, *SHAPES[name]))}
    assert set(hidden_layers(name, {})) <= found


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


def keep(outputs, name, module, args, output):
    outputs[name] = output


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


def test_a_network_for_vectors_refuses_images_and_the_other_way_round():
    with pytest.raises(UsageError, match="reads vectors"):
        build_model("spiral_net", {}, (1, 8, 8), 10)
    with pytest.raises(UsageError, match="reads images"):
        build_model("preact_resnet8", {}, (2,), 2)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown model 'mpl': did you mean 'mlp'"):
        get_model("mpl")
