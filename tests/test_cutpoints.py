"""Discovery: what is a cut point and what is not, on networks made to fool it; and the automatic choice of S."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manifold_mixup import ManifoldMixup, cut_points
from manifold_mixup.eligible import auto_layers
from manifold_mixup.errors import BatchMismatch, DataFlowLost, DiscoveryFailed, LayerNotReached, NotACutPoint
from networks import NETWORKS, Net, PreActResNet


def names(model: nn.Module, *inputs, **kwargs) -> set[str]:
    return {p.name for p in cut_points(model, *inputs, **kwargs)}


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


X = torch.randn(6, 4)


def refused(model: nn.Module, name: str, *inputs) -> NotACutPoint:
    with pytest.raises(NotACutPoint) as caught:
        ManifoldMixup(model, layers=[name]).discover(*(inputs or (X,)))
    return caught.value


def test_a_chain_is_cut_by_every_module():
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    assert names(model, X) == {"input", "0", "1", "2"}


def test_shapes_features_and_compute():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    first, relu, last = cut_points(model, X)[1:]
    assert (first.shape, first.features, first.stage_end) == ((8,), 8, True)
    assert first.compute == pytest.approx(32 / 48)
    assert first.own_compute == pytest.approx(32 / 48)
    assert relu.own_compute == 0.0
    assert (last.compute, last.shape) == (1.0, (2,))


def test_a_conv_inside_a_residual_block_is_refused_even_where_the_branch_is_silent():
    model = PreActResNet()
    for block in (model.layer1, model.layer2):
        nn.init.zeros_(block.conv2.weight)
    assert names(model, torch.randn(4, 2, 5, 5)) == {"input", "stem", "layer1", "layer2", "head"}
    error = refused(model, "layer2.conv1", torch.randn(4, 2, 5, 5))
    assert error.bypass == "layer1"
    assert "what 'layer1' computes reaches 'layer2' (add)" in str(error)


def test_a_zero_initialised_last_batch_norm_does_not_hide_the_skip():
    block = Net(lambda m, x: torch.relu(m.bn(m.conv(x)) + x), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    nn.init.zeros_(block.bn.weight)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(4, 2))
    error = refused(model, "0.conv", torch.randn(4, 4, 1, 1))
    assert "the input reaches '0' (add)" in str(error)


def test_an_identity_on_a_shortcut_is_refused_and_the_main_branch_named():
    model = Net(lambda m, x: m.act(m.body(x) + m.skip(x)), body=linear(), skip=nn.Identity(), act=nn.ReLU())
    error = refused(model, "skip")
    assert error.bypass == "body"
    assert "what 'body' computes reaches the model's own forward (add)" in str(error)
    assert names(model, X) == {"input", "act"}


def test_an_identity_in_the_chain_is_a_cut_point():
    model = nn.Sequential(linear(), nn.Identity(), linear())
    assert "1" in names(model, X)


def test_an_identity_whose_input_is_read_again_is_not():
    model = Net(lambda m, x: m.same(h := m.a(x)) * h, a=linear(), same=nn.Identity())
    assert names(model, X) == {"input", "a"}


def test_in_place_activations():
    chain = nn.Sequential(linear(), nn.ReLU(inplace=True), linear())
    assert names(chain, X) == {"input", "0", "1", "2"}

    # What relu_ returns is what the shortcut holds as well: replacing the return value does not replace the shortcut.
    def shortcut(m, x):
        h = m.a(x)
        return m.act(h) + h

    model = Net(shortcut, a=linear(), act=nn.ReLU(inplace=True))
    assert names(model, X) == {"input", "a"}


def test_in_place_addition_of_a_skip_is_followed():
    def forward(m, x):
        h = m.a(x)
        out = m.b(h)
        out += h
        return m.c(out)

    model = Net(forward, a=linear(), b=linear(), c=linear())
    assert names(model, X) == {"input", "a", "c"}


def test_writes_into_a_buffer_through_views_are_followed():
    def forward(m, x):
        out = torch.empty(x.shape[0], 8)
        out[:, :4] = m.a(x)
        out[:, 4:] = m.b(x)
        return m.c(out)

    model = Net(forward, a=linear(), b=linear(), c=nn.Linear(8, 2))
    assert names(model, X) == {"input", "c"}


def test_a_skip_that_passes_through_a_view_made_before_an_in_place_write():
    def forward(m, x):
        h = m.a(x)
        view = h[:, :2]
        h = m.b(h)
        return m.c(torch.cat([h, view], 1))

    model = Net(forward, a=linear(), b=linear(), c=nn.Linear(6, 2))
    assert names(model, X) == {"input", "a", "c"}


def test_detach_and_data_do_not_hide_a_path():
    model = Net(lambda m, x: m.c(m.b(h := m.a(x)) + h.detach()), a=linear(), b=linear(), c=linear())
    assert names(model, X) == {"input", "a", "c"}
    model = Net(lambda m, x: m.c(m.b(h := m.a(x)) + h.data), a=linear(), b=linear(), c=linear())
    assert names(model, X) == {"input", "a", "c"}


def test_dense_unet_and_two_towers():
    dense = Net(lambda m, x: m.c(torch.cat([x, m.a(x)], 1)), a=linear(), c=nn.Linear(8, 2))
    assert names(dense, X) == {"input", "c"}

    def unet(m, x):
        down = m.down(x)
        return m.out(m.up(m.middle(down)) + down)

    model = Net(unet, down=linear(), middle=linear(), up=linear(), out=linear())
    assert names(model, X) == {"input", "down", "out"}
    towers = Net(lambda m, x: m.head(m.left(x) * m.right(x)), left=linear(), right=linear(), head=linear())
    assert names(towers, X) == {"input", "head"}
    assert "left" in str(refused(towers, "left"))


def test_several_tensors_returned_together_form_one_cut():
    split = Net(lambda m, x: (m.l(x), [m.r(x)]), l=linear(), r=linear())
    model = Net(lambda m, x: m.head(torch.cat([(h := m.split(x))[0], h[1][0]], 1)), split=split, head=nn.Linear(8, 2))
    points = {p.name: p for p in cut_points(model, X)}
    assert set(points) == {"input", "split", "head"}
    assert points["split"].shape == ((4,), (4,))
    assert points["split"].features == 8


def test_lstm_outputs_are_a_cut_only_without_the_final_state():
    x = torch.randn(6, 3, 4)
    by_output = Net(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(4, 5, batch_first=True), head=nn.Linear(5, 2)
    )
    assert "lstm" in names(by_output, x)
    by_state = Net(lambda m, x: m.head(m.lstm(x)[1][0][-1]), lstm=nn.LSTM(4, 5, batch_first=True), head=nn.Linear(5, 2))
    assert "lstm" not in names(by_state, x)
    # Two layers and a batch of two rows: the state's first dimension only looks like the batch.
    deep = Net(lambda m, x: m.head(m.lstm(x)[1][0][-1]), lstm=nn.LSTM(4, 5, 2, batch_first=True), head=nn.Linear(5, 2))
    assert "one row per example" in str(refused(deep, "lstm", x[:2]))


def test_dimension_zero_has_to_be_the_batch():
    window = Net(lambda m, x: x.reshape(-1, 4))
    model = Net(lambda m, x: m.b(m.window(m.a(x))).reshape(len(x), -1), a=linear(), window=window, b=linear())
    assert names(model, torch.randn(5, 2, 4)) == {"input", "a"}
    sequence_first = Net(lambda m, x: m.b(m.a(x).transpose(0, 1)).mean(0), a=linear(), b=linear())
    assert names(sequence_first, torch.randn(3, 3, 4)) == {"input", "a"}


def test_an_auxiliary_input_that_bypasses_is_reported():
    model = Net(lambda m, x, mask: m.b(m.a(x) * mask), a=linear(), b=linear())
    assert names(model, X, mask=torch.ones(6, 1)) == {"input", "b"}
    with pytest.raises(NotACutPoint, match="the input 'mask' reaches"):
        ManifoldMixup(model, layers=["a"]).discover(X, mask=torch.ones(6, 1))
    # One for the whole batch is the same for every example: nothing to mix.
    assert "a" in names(model, X, mask=torch.ones(1, 4))


def test_a_module_called_twice_is_two_sites():
    model = Net(lambda m, x: m.b(m.a(m.a(x))), a=linear(), b=linear())
    assert names(model, X) == {"input", "a", "a#2", "b"}
    around = Net(lambda m, x: m.a(h := m.a(x)) + h, a=linear())
    assert names(around, X) == {"input", "a"}
    with pytest.raises(LayerNotReached, match="called 2 times"):
        ManifoldMixup(around, layers=["a#3"]).discover(X)


def test_a_module_that_never_runs_is_not_reached():
    model = Net(lambda m, x: m.a(x), a=linear(), b=linear())
    with pytest.raises(LayerNotReached, match="'b' is never called"):
        ManifoldMixup(model, layers=["b"]).discover(X)


def test_the_fused_transformer_layer_of_eval_mode_does_not_hide_its_parts():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    points = names(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.randn(4, 3, 4))
    assert {"0.layers.0", "0.layers.1", "0.layers.0.norm2"} <= points
    assert "0.layers.0.self_attn" not in points


@pytest.mark.parametrize("way_out", [lambda h: torch.from_numpy(h.numpy() * 1.0), lambda h: torch.tensor(h.tolist())])
def test_a_detour_outside_of_torch_is_noticed(way_out):
    whole = Net(lambda m, x: m.b(way_out(m.a(x))), a=linear(), b=linear())
    with pytest.raises(DataFlowLost, match="check=False"):
        cut_points(whole, X)
    branch = Net(lambda m, x: m.c(m.b(h := m.a(x)) + way_out(h)), a=linear(), b=linear(), c=linear())
    assert names(branch, X) == {"input", "a"}


def test_a_scripted_part_is_followed_as_one_module(recwarn):
    scripted = torch.jit.script(nn.Sequential(linear(), nn.ReLU()))
    recwarn.clear()  # torch deprecates scripting; users still have scripted parts
    model = nn.Sequential(linear(), scripted, linear())
    assert {"input", "0", "2"} <= names(model, X)


test_a_scripted_part_is_followed_as_one_module = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script:DeprecationWarning"
)(test_a_scripted_part_is_followed_as_one_module)


def test_integer_inputs_leave_the_input_out():
    model = nn.Sequential(nn.Embedding(10, 4), linear(), nn.ReLU(), linear())
    tokens = torch.randint(10, (6,))
    assert "input" not in names(model, tokens)
    assert "input" not in auto_layers(cut_points(model, tokens))
    assert "integers" in str(refused(model, "input", tokens))


class Noisy(nn.Module):
    """Touches everything that a forward can touch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = linear(), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = x.mean(0)
        noise = torch.randn_like(x) + random.random() + float(np.random.rand())
        return self.drop(self.bn(self.a(x + noise)))


def test_discovery_leaves_no_trace():
    model = nn.Sequential(Noisy(), linear())
    model[0].bn.eval()  # a frozen part stays as it is
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model)
    buffers = {name: (id(b), b._version) for name, b in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert names(model, X) >= {"input", "0", "1"}
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert {name: id(b) for name, b in model.named_buffers()} == {name: i for name, (i, _) in buffers.items()}
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_discovery_restores_everything_when_the_forward_raises():
    def forward(m, x):
        torch.rand(3)
        raise KeyError("broken")

    model = Net(forward, a=linear()).train()
    state = torch.get_rng_state()
    with pytest.raises(DiscoveryFailed, match="broken") as caught:
        cut_points(model, X)
    assert isinstance(caught.value.__cause__, KeyError)
    assert model.training
    assert model.a.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks for m in model.modules())


def test_no_rows_and_no_tensors_are_refused():
    with pytest.raises(BatchMismatch, match="no rows"):
        cut_points(linear(), torch.randn(0, 4))
    with pytest.raises(BatchMismatch, match="no tensor"):
        cut_points(linear(), 3)


def test_one_row_is_enough():
    assert names(nn.Sequential(linear(), nn.BatchNorm1d(4)), torch.randn(1, 4)) == {"input", "0", "1"}


def randomised(model: nn.Module) -> nn.Module:
    """No branch is silent."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand_like(tensor) * 0.4 + 0.1)
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_swapping_at_a_cut_point_swaps_the_output_and_elsewhere_does_not(network):
    """The definition, tried on every module: exchange two rows of what it returns, and see the output's exchanged."""
    model = randomised(network().double()).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    x = network.batch(4).double()
    swap = torch.tensor([2, 3, 0, 1])
    points = names(model, x)
    plain = model(x).detach()

    def exchange(module, args, output):
        if isinstance(output, tuple):
            return tuple(exchange(module, args, o) for o in output)
        return output[swap] if isinstance(output, Tensor) and output.shape[0] == 4 else output

    tried = 0
    for name, module in model.named_modules():
        calls: list[int] = []
        handle = module.register_forward_hook(lambda m, a, o, calls=calls: (calls.append(1), exchange(m, a, o))[1])
        exchanged = model(x).detach()
        handle.remove()
        if name and len(calls) == 1:
            tried += 1
            assert torch.allclose(exchanged, plain[swap]) == (name in points), name
    torch.backends.mha.set_fastpath_enabled(True)
    assert tried >= 3


EXPECTED = {
    "resnet18": ["layer1", "layer2"],
    "resnet50": ["layer1", "layer2"],
    "densenet121": ["features.denseblock1", "features.denseblock2"],
    "vit_tiny_patch16_224": ["blocks.2", "blocks.5"],
    "convnext_atto": ["stages.0", "stages.1"],
    "mobilenetv3_small_100": ["blocks.1", "blocks.2"],
    "crossvit_tiny_240": ["blocks.0", "blocks.1"],
    "hrnet_w18_small": ["stage2", "stage4"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_automatic_layers_of_well_known_networks(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10)
    size = {"vit_tiny_patch16_224": 224, "crossvit_tiny_240": 240}.get(name, 64)
    points = cut_points(model, torch.randn(2, 3, size, size))
    assert auto_layers(points) == ["input", *EXPECTED[name]]


def test_automatic_layers_of_one_stage_lie_near_a_quarter_and_a_half():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    assert auto_layers(cut_points(model, torch.randn(4, 8))) == ["input", "2", "5"]


def test_automatic_layers_do_work_of_their_own_and_leave_some_to_do():
    blocks = [m for _ in range(6) for m in (nn.Linear(8, 8), nn.LayerNorm(8), nn.Identity())]
    assert auto_layers(cut_points(nn.Sequential(*blocks), torch.randn(4, 8))) == ["input", "3", "6"]
    shallow = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert auto_layers(cut_points(shallow, torch.randn(4, 8))) == ["input", "0"]


def test_a_callable_chooses_from_the_cut_points():
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    mixup = ManifoldMixup(model, layers=lambda points: [p.name for p in points if p.stage_end][:1])
    assert mixup.discover(X) == [next(p.name for p in cut_points(model, X) if p.stage_end)]


def test_a_network_without_any_cut_point_says_so():
    model = Net(lambda m, a, b: m.l(a) + b.float().sum(1, keepdim=True), l=linear())
    with pytest.raises(NotACutPoint, match="neither the input nor any module"):
        ManifoldMixup(model).discover(X, torch.randint(3, (6, 2)))
