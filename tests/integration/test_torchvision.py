"""One network of every family in torchvision: images, dense maps, video."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from integration.exactness import (
    LAM,
    assert_equal,
    by_hand,
    check,
    check_layers,
    mixed_output,
    mixture,
    order_of,
    prepared,
    set_lam,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N, CLASSES = 5, 4


def alexnet() -> nn.Module:
    model = tv.alexnet(num_classes=CLASSES)
    narrow = [nn.Dropout(), nn.Linear(256 * 36, 12), nn.ReLU(inplace=True), nn.Linear(12, CLASSES)]
    model.classifier = nn.Sequential(*narrow)
    return model


def vgg() -> nn.Module:
    model = tv.VGG(tv.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True), init_weights=False)
    model.classifier = nn.Linear(16 * 49, CLASSES)
    return model


def convnext() -> nn.Module:
    settings = [tv.convnext.CNBlockConfig(16, 32, 2), tv.convnext.CNBlockConfig(32, None, 2)]
    return tv.ConvNeXt(settings, num_classes=CLASSES)


def swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as module

    second = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    more = second if version == 2 else {}
    return tv.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **more)


def maxvit() -> nn.Module:
    return tv.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


# Small members of every family: the constructor, the side of an image.
SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg": (vgg, 32),
    "resnet": (lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 32),
    "densenet": (lambda: tv.DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES), 32),
    "squeezenet": (lambda: tv.squeezenet1_1(num_classes=CLASSES), 32),
    "mobilenet_v3": (lambda: tv.mobilenet_v3_small(num_classes=CLASSES, width_mult=0.5), 32),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=CLASSES), 32),
    "convnext": (convnext, 32),
    "vit": (lambda: tv.VisionTransformer(32, 8, 4, 2, 24, 48, num_classes=CLASSES), 32),
    "swin": (lambda: swin(1), 32),
    "swin v2": (lambda: swin(2), 32),
    "maxvit": (maxvit, 32),
}
LARGE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (alexnet, 64),
    "resnet18": (lambda: tv.resnet18(num_classes=CLASSES), 32),
    "densenet121": (lambda: tv.densenet121(num_classes=CLASSES), 32),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(num_classes=CLASSES), 32),
    "mnasnet": (lambda: tv.mnasnet0_5(num_classes=CLASSES), 32),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=CLASSES), 32),
    "regnet": (lambda: tv.regnet_y_400mf(num_classes=CLASSES), 32),
    "googlenet": (lambda: tv.googlenet(num_classes=CLASSES, aux_logits=False, init_weights=False), 32),
    "inception": (lambda: tv.inception_v3(num_classes=CLASSES, aux_logits=False, init_weights=False), 75),
}


def images(side: int, n: int = N) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64)


def trains(model: nn.Module, x: Tensor) -> None:
    """Real training steps, batch statistics and stochastic depth on, one at every layer of S."""
    model = copy.deepcopy(model).train()
    mixup = ManifoldMixup(model, seed=0)
    layers = mixup.discover(x)
    for layer in layers:
        mixup.remove()
        mixup = ManifoldMixup(model, layers=[layer], seed=1)
        inputs, y = mixup(x, torch.arange(len(x)) % CLASSES)
        model.zero_grad()
        F.cross_entropy(model(inputs), y).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_small_members_of_every_family(name, monkeypatch):
    build, side = SMALL[name]
    model, x = prepared(build()), images(side)
    layers = check(model, x, N, monkeypatch, more=2, rejected=6)
    assert len(layers) == 3
    assert layers[0] == "input"
    trains(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_members_of_every_family(name, monkeypatch):
    build, side = LARGE[name]
    model, x = prepared(build()), images(side)
    layers = check(model, x, N, monkeypatch, more=3, rejected=10)
    assert len(layers) == 3
    assert layers[0] == "input"
    trains(model, x)


def test_the_layers_chosen():
    vit = tv.VisionTransformer(32, 4, 8, 2, 24, 48, num_classes=CLASSES)
    assert ManifoldMixup(vit, seed=0).discover(images(32).float()) == [
        "input",
        "encoder.layers.encoder_layer_1",
        "encoder.layers.encoder_layer_3",
    ]
    assert ManifoldMixup(tv.resnet18(), seed=0).discover(images(32).float()) == ["input", "layer1", "layer2"]


@pytest.mark.slow
def test_video(monkeypatch):
    model = prepared(tv.video.r3d_18(num_classes=CLASSES))
    x = torch.randn(N, 3, 4, 16, 16, dtype=torch.float64)
    assert len(check(model, x, N, monkeypatch, more=1, rejected=4)) == 3


# ---------------------------------------------------------------- auxiliary heads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception"])
def test_auxiliary_heads_are_refused_and_the_error_says_what_to_do(name, monkeypatch):
    """Eval mode, in which cut points are found, does not run them."""
    build, side = (tv.googlenet, 32) if name == "googlenet" else (tv.inception_v3, 75)
    layer, behind = ("inception3b", "inception5a") if name == "googlenet" else ("Mixed_5d", "Mixed_7a")
    model, x = prepared(build(num_classes=CLASSES, aux_logits=True, init_weights=False)), images(side)
    set_lam(monkeypatch, LAM)
    if name == "inception":  # its auxiliary head wants 17 x 17 positions
        model.AuxLogits.forward = lambda h: model.AuxLogits.fc(h.mean((2, 3))[:, :1].expand(-1, 768))
    for chosen in (layer, behind):
        mixup = ManifoldMixup(model, layers=[chosen], seed=0)
        mixup(x, torch.arange(N))
        with pytest.raises(errors.NotACutPoint, match="auxiliary head.*check=False"):
            model(x)
        mixup.remove()
    output = mixed_output(model, x, N, layer, check=False)
    assert len(output) == (3 if name == "googlenet" else 2)
    assert_equal(tuple(output), tuple(by_hand(model, x, layer, mixture(LAM, order_of(N)), N)))


# ---------------------------------------------------------------- dense maps


def backbone(**layers: str) -> tuple[nn.Module, list[int]]:
    """A trunk that returns a dictionary, and how many channels its entries have."""
    trunk = tv.mobilenet_v3_small(width_mult=0.5).features
    body = IntermediateLayerGetter(trunk, {layer: label for label, layer in layers.items()})
    return body, [h.shape[1] for h in body.eval()(torch.zeros(1, 3, 32, 32)).values()]


def fcn() -> nn.Module:
    body, (width,) = backbone(out="12")
    return FCN(body, FCNHead(width, CLASSES))


def fcn_with_auxiliary_map() -> nn.Module:
    body, (early, width) = backbone(aux="8", out="12")
    return FCN(body, FCNHead(width, CLASSES), FCNHead(early, CLASSES))


def deeplab() -> nn.Module:
    body, (width,) = backbone(out="12")
    return DeepLabV3(body, DeepLabHead(width, CLASSES, (1, 2)))


def lraspp() -> nn.Module:
    body, (low, high) = backbone(low="3", high="12")
    return LRASPP(body, low, high, CLASSES, inter_channels=8)


SEGMENTATION = {"fcn": fcn, "deeplab": deeplab}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_dictionaries_of_dense_maps(name, monkeypatch):
    model, x = prepared(SEGMENTATION[name]()), images(32)
    assert check(model, x, N, monkeypatch, more=1, rejected=4)[0] == "input"


def test_the_loss_of_dense_targets(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x = prepared(fcn()), images(32)
    y = torch.randint(CLASSES, (N, 32, 32))
    y[:, :3] = 255
    mixup = ManifoldMixup(model, layers=["backbone.4"], pairing=lambda y, generator: order_of(N), seed=0)
    inputs, target = mixup(x, y)
    loss = F.cross_entropy(model(inputs)["out"], target, ignore_index=255)
    mixup.remove()
    maps = by_hand(model, x, "backbone.4", mixture(LAM, order_of(N)), N)["out"]
    expected = LAM * F.cross_entropy(maps, y, ignore_index=255)
    expected += (1 - LAM) * F.cross_entropy(maps, y[order_of(N)], ignore_index=255)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_a_second_map_from_an_earlier_stage_rules_out_what_lies_behind_it(monkeypatch):
    model, x = prepared(fcn_with_auxiliary_map()), images(32)
    names = {p.name for p in cut_points(model, x)}
    assert {"input", *(f"backbone.{i}" for i in range(9))} <= names
    assert not {*(f"backbone.{i}" for i in range(9, 13)), "classifier", "aux_classifier"} & names
    check_layers(model, x, N, ["backbone.4", "backbone.8"], monkeypatch)
    with pytest.raises(errors.NotACutPoint, match=r"what 'backbone\.8' computes reaches 'aux_classifier") as caught:
        ManifoldMixup(model, layers=["backbone.10"])(x, torch.zeros(N, 32, 32).long())
    assert caught.value.bypass == "backbone.8"


def test_lraspp_keeps_fine_features_on_a_way_of_their_own(monkeypatch):
    model, x = prepared(lraspp()), images(32)
    assert check(model, x, N, monkeypatch, more=1, rejected=4)[0] == "input"
    names = {p.name for p in cut_points(model, x)}
    assert "backbone.3" in names
    assert "backbone.4" not in names
    with pytest.raises(errors.NotACutPoint, match=r"what 'backbone\.3' computes reaches 'classifier"):
        ManifoldMixup(model, layers=["backbone.8"])(x, torch.zeros(N, 32, 32).long())
