"""Hugging Face networks for images and sound: dataclass and tuple outputs, hidden states as outputs, masks of sound."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from integration import hf
from integration.exactness import (
    LAM,
    assert_equal,
    by_hand_with_masks,
    call,
    check,
    check_layers,
    check_masked_layers,
    mixed_output,
    order_of,
    prepared,
    set_lam,
    united,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N = 5
ARGUMENT = {"wav2vec2": "input_values", "ast": "input_values", "whisper": "input_features"}
LAYERS = {
    "vit": "vit.layers.{}",
    "deit": "deit.layers.{}",
    "beit": "beit.layers.{}",
    "convnext": "convnext.encoder.stages.{}",
    "swin": "swin.encoder.layers.{}",
    "wav2vec2": "wav2vec2.encoder.layers.{}",
    "whisper": "encoder.layers.{}",
    "whisper encoder": "encoder.layers.{}",
    "ast": "audio_spectrogram_transformer.layers.{}",
}


def images(side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, side, side, dtype=torch.float64)}


def sounds(name: str) -> dict[str, Tensor]:
    argument = ARGUMENT.get(name, "input_features")
    return {argument: torch.randn(N, *hf.SOUNDS[name][1], dtype=torch.float64)}


@pytest.mark.parametrize("name", hf.IMAGES)
def test_images(name, monkeypatch):
    build, side = hf.IMAGES[name]
    model, x = prepared(build()), images(side)
    layers = check(model, x, N, monkeypatch, more=2, rejected=6)
    assert layers[0] == "input"
    assert len(layers) == 3
    assert {LAYERS[name].format(i) for i in range(2)} <= {p.name for p in cut_points(model, **x)}


@pytest.mark.parametrize("name", hf.SOUNDS)
def test_sounds(name, monkeypatch):
    model, x = prepared(hf.SOUNDS[name][0]()), sounds(name)
    layers = check(model, x, N, monkeypatch, more=2, rejected=6)
    assert layers[0] == "input"
    assert len(layers) == 3
    assert {LAYERS[name].format(i) for i in range(2)} <= {p.name for p in cut_points(model, **x)}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_implementations_of_attention(implementation, monkeypatch):
    model = prepared(hf.vit(attn_implementation=implementation))
    check(model, images(16), N, monkeypatch, more=1, rejected=3)


@pytest.mark.parametrize("return_dict", [True, False])
def test_dataclasses_and_tuples(return_dict, monkeypatch):
    """Of the model, and of the bare encoder inside it, which hands its states on as a dataclass."""
    model, x = prepared(hf.vit()), {**images(16), "return_dict": return_dict}
    assert isinstance(call(model, x), tuple) is not return_dict
    check(model, x, N, monkeypatch, more=1, rejected=3)
    assert "vit" in {p.name for p in cut_points(model, **x)}
    check_layers(model, x, N, ["vit"], monkeypatch)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_hidden_states_as_outputs_rule_out_every_layer_and_the_error_names_one(name):
    build, side = hf.IMAGES[name]
    model, x = prepared(build()), {**images(side), "output_hidden_states": True}
    assert len(call(model, x).hidden_states) > 2
    layer = LAYERS[name].format(1)
    with pytest.raises(errors.NotACutPoint, match=f"{layer!r} is not.*what '{name}.* reaches the output") as caught:
        ManifoldMixup(model, layers=[layer])(x, torch.arange(N))
    assert caught.value.bypass.startswith(name)
    assert "input" in {p.name for p in cut_points(model, **x)}


def test_attentions_as_outputs_rule_out_the_layers_after_the_first():
    model = prepared(hf.vit(attn_implementation="eager"))
    x = {**images(16), "output_attentions": True}
    with pytest.raises(errors.NotACutPoint, match="attention"):
        ManifoldMixup(model, layers=["vit.layers.1"])(x, torch.arange(N))


# ---------------------------------------------------------------- masks of sound

SAMPLES = 90


def padded_sound() -> dict[str, Tensor]:
    """Sound of several lengths, zeros behind it, and a mask of samples: True where there is sound."""
    lengths = torch.tensor([SAMPLES - 13 * (i + 1) for i in range(N)])
    mask = torch.arange(SAMPLES) < lengths.unsqueeze(1)
    return {"input_values": torch.randn(N, SAMPLES).double() * mask, "attention_mask": mask.long()}


def frames(model: nn.Module, mask: Tensor) -> Tensor:
    """Which frames are sound: the network's own account of what its convolutions make of the samples."""
    length = int(model._get_feat_extract_output_lengths(SAMPLES))
    return model._get_feature_vector_attention_mask(length, mask) != 0


def after_cut(x: dict[str, Tensor]):
    return lambda lam, partner: {**x, "attention_mask": united(x["attention_mask"], lam, partner)}


ENCODER = [f"wav2vec2.encoder.layers.{i}" for i in range(3)]


def test_padded_sound_is_mixed_under_the_union_of_both_masks(monkeypatch):
    """The mask has one value per sample, the layers one state per frame."""
    model, x = prepared(hf.wav2vec2()), padded_sound()
    layers = ManifoldMixup(model, seed=0).discover(**x)
    assert len(layers) >= 2
    inner = [layer for layer in layers if layer != "input"]
    check_masked_layers(
        model, x, N, dict.fromkeys([*ENCODER, *inner]), after_cut(x), frames(model, x["attention_mask"]), monkeypatch
    )


def test_padded_sound_as_input(monkeypatch):
    model, x = prepared(hf.wav2vec2()), padded_sound()
    check_masked_layers(model, x, N, ["input"], after_cut(x), x["attention_mask"] != 0, monkeypatch)


@pytest.mark.parametrize("layer", ENCODER[:2])
def test_noise_in_the_padding_has_no_influence(layer, monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x = prepared(hf.wav2vec2()), padded_sound()
    noise = torch.where(x["attention_mask"] != 0, x["input_values"], torch.randn(N, SAMPLES).double())
    dirty = {**x, "input_values": noise}
    assert_equal(call(model, dirty), call(model, x), 1e-10)
    assert_equal(mixed_output(model, dirty, N, layer), mixed_output(model, x, N, layer), 1e-10)


def test_a_full_mask_of_sound_changes_nothing(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x = prepared(hf.wav2vec2()), padded_sound()
    full = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
    bare = {"input_values": x["input_values"]}
    assert_equal(mixed_output(model, full, N, ENCODER[1]), mixed_output(model, bare, N, ENCODER[1]))


def test_the_mask_of_a_later_batch_counts_where_the_first_was_full(monkeypatch):
    set_lam(monkeypatch, LAM)
    model, x, partner = prepared(hf.wav2vec2()), padded_sound(), order_of(N)
    full = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
    mixup = ManifoldMixup(model, layers=[ENCODER[1]], pairing=lambda y, generator: partner, seed=0)
    mixup(full, torch.arange(N))
    model(**full)
    mixup(x, torch.arange(N))
    twin = by_hand_with_masks(
        copy.deepcopy(model),
        x,
        ENCODER[1],
        LAM,
        partner,
        after_cut(x)(LAM, partner),
        frames(model, x["attention_mask"]),
    )
    assert_equal(model(**x), twin)
