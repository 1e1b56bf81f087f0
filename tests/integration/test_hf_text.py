"""Hugging Face text networks: which layers may be mixed, and that mixing is exact, without and with padding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration import hf
from integration.exactness import (
    LAM,
    assert_equal,
    by_hand,
    by_hand_with_masks,
    call,
    check,
    check_layers,
    check_masked_layers,
    differ,
    mixed_output,
    mixture,
    order_of,
    parameter_gradients,
    prepared,
    set_lam,
    spread,
    united,
    united_ids,
)
from manifold_mixup import ManifoldMixup, cut_points, errors

N, LENGTH = 5, 9

LAYERS = {
    "bert": "bert.encoder.layer.{}",
    "bert, eager attention": "bert.encoder.layer.{}",
    "bert, mean of tokens": "encoder.encoder.layer.{}",
    "roberta": "roberta.encoder.layer.{}",
    "distilbert": "distilbert.transformer.layer.{}",
    "albert": None,  # one layer, called three times
    "gpt2, last token": "encoder.h.{}",
    "gpt2, mean of tokens": "encoder.h.{}",
    "t5 encoder": "encoder.encoder.block.{}",
}
ALBERT = [
    "albert.encoder.albert_layer_groups.0.albert_layers.0",
    "albert.encoder.albert_layer_groups.0.albert_layers.0#2",
    "albert.encoder.albert_layer_groups.0.albert_layers.0#3",
]


FIRST_TOKEN = {"bert", "bert, eager attention", "roberta", "distilbert", "albert"}  # the head reads position 0
PADDED = [(name, side) for name in hf.TEXT for side in ("right", "left") if side == "right" or name not in FIRST_TOKEN]


def layers_of(network: str) -> list[str]:
    pattern = LAYERS[network]
    return ALBERT if pattern is None else [pattern.format(i) for i in range(3)]


def padded(side: str = "right", dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
    ids, mask = hf.padded_tokens(N, LENGTH, side)
    return {"input_ids": ids, "attention_mask": mask.to(dtype)}


def after_cut(x: dict[str, Tensor]):
    return lambda lam, partner: {**x, "attention_mask": united(x["attention_mask"], lam, partner)}


def twin(model: nn.Module, x: dict[str, Tensor], layer: str, lam: float = LAM) -> object:
    partner, model = order_of(N), copy.deepcopy(model)  # copies never mix
    return by_hand_with_masks(model, x, layer, lam, partner, after_cut(x)(lam, partner), x["attention_mask"] != 0)


@pytest.fixture
def lam(monkeypatch):
    set_lam(monkeypatch, LAM)


# ---------------------------------------------------------------- without a mask


@pytest.mark.parametrize("network", hf.TEXT)
def test_without_a_mask_layers_are_cut_points_and_exact(network, monkeypatch):
    model = prepared(hf.TEXT[network]())
    x = {"input_ids": padded()["input_ids"]}
    chosen = check(model, x, N, monkeypatch)
    assert len(chosen) == 2
    assert "input" not in chosen
    assert set(layers_of(network)) <= {p.name for p in cut_points(model, **x)}


def test_token_type_ids_and_position_ids_are_inputs_like_the_token_ids(monkeypatch):
    model = prepared(hf.bert())
    ids = padded()["input_ids"]
    x = {
        "input_ids": ids,
        "token_type_ids": torch.arange(N * LENGTH).view(N, LENGTH) % 2,
        "position_ids": torch.arange(LENGTH).roll(1).expand(N, -1).contiguous(),
    }
    assert len(check(model, x, N, monkeypatch)) == 2


@pytest.mark.parametrize("network", ["bert", "gpt2, last token"])
def test_embeddings_as_inputs_can_be_mixed_too(network, monkeypatch):
    model = prepared(hf.TEXT[network]())
    if network != "bert":
        head, encoder = model.head, model.encoder

        class OfEmbeddings(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.head = encoder, head

            def forward(self, inputs_embeds: Tensor) -> Tensor:
                states = self.encoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
                return self.head(states, None)

        model = OfEmbeddings().eval()
        model.training = True
    assert check(model, {"inputs_embeds": torch.randn(N, LENGTH, 12).double()}, N, monkeypatch)[0] == "input"


def test_albert_is_mixed_at_one_of_its_calls_only(lam):
    model = prepared(hf.albert())
    x = {"input_ids": padded()["input_ids"]}
    outputs = [mixed_output(model, x, N, layer).logits for layer in ALBERT]
    assert all(differ(outputs[i], outputs[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("kind", ["dataclass", "tuple"])
def test_both_kinds_of_output(kind, monkeypatch):
    model = prepared(hf.bert())
    x = {"input_ids": padded()["input_ids"], "return_dict": kind == "dataclass"}
    assert len(check(model, x, N, monkeypatch, more=1, rejected=3)) == 2


def test_hidden_states_as_outputs_go_past_every_layer_and_the_error_says_so():
    model = prepared(hf.bert(output_hidden_states=True))
    x = {"input_ids": padded()["input_ids"]}
    with pytest.raises(errors.NotACutPoint, match="reaches the output") as caught:
        ManifoldMixup(model, layers=["bert.encoder.layer.1"])(x, torch.arange(N))
    assert "bert" in caught.value.bypass


def test_a_model_that_computes_its_loss_from_mixed_labels(lam):
    model = prepared(hf.bert())
    x, y = padded(), torch.arange(N) % hf.CLASSES
    mixup = ManifoldMixup(model, layers=["bert.encoder.layer.1"], pairing=lambda y, generator: order_of(N), seed=0)
    inputs, target = mixup(x, y)
    output = model(**inputs, labels=target)
    logits = twin(model, x, "bert.encoder.layer.1").logits
    expected = LAM * F.cross_entropy(logits, y) + (1 - LAM) * F.cross_entropy(logits, y[order_of(N)])
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- with a mask


@pytest.mark.parametrize(("network", "side"), PADDED)
def test_padded_batches_are_mixed_under_the_union_of_both_masks(network, side, monkeypatch):
    model = prepared(hf.TEXT[network]())
    x = padded(side)
    mixup = ManifoldMixup(model, seed=0)
    chosen = mixup.discover(**x)
    mixup.remove()
    names = [p.name for p in cut_points(model, **x)]
    assert len(chosen) == 2
    assert set(layers_of(network)) <= set(names)
    others = spread([name for name in names if name not in chosen], 4)
    check_masked_layers(
        model, x, N, [*chosen, *layers_of(network)[:2], *others], after_cut(x), x["attention_mask"] != 0, monkeypatch
    )


@pytest.mark.parametrize("network", hf.TEXT)
def test_the_choice_of_layers_does_not_depend_on_the_mask(network):
    x, choices = padded(), []
    for inputs in (x, {"input_ids": x["input_ids"]}, {**x, "attention_mask": torch.ones_like(x["attention_mask"])}):
        choices.append(ManifoldMixup(prepared(hf.TEXT[network]()), seed=0).discover(**inputs))
    assert choices[0] == choices[1] == choices[2]


@pytest.mark.parametrize(("network", "side"), PADDED)
def test_what_stands_at_padded_positions_has_no_influence(network, side, lam):
    model = prepared(hf.TEXT[network]())
    x = padded(side)
    generator = torch.Generator().manual_seed(5)
    garbage = torch.randint(2, hf.WORDS, (N, LENGTH), generator=generator)
    dirty = {**x, "input_ids": torch.where(x["attention_mask"].bool(), x["input_ids"], garbage)}
    assert not torch.equal(dirty["input_ids"], x["input_ids"])
    assert_equal(call(model, dirty), call(model, x), 1e-10)
    for layer in layers_of(network):
        assert_equal(mixed_output(model, dirty, N, layer), mixed_output(model, x, N, layer), 1e-10)


@pytest.mark.parametrize("network", ["bert", "gpt2, last token", "t5 encoder"])
def test_a_first_batch_without_padding_does_not_hide_the_mask(network, lam):
    """Attention code skips a mask of ones, so the data flow of such a batch does not show it."""
    model, layer = prepared(hf.TEXT[network]()), layers_of(network)[1]
    x = padded()
    full = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
    mixup = ManifoldMixup(model, layers=[layer], pairing=lambda y, generator: order_of(N), seed=0)
    mixup(full, torch.arange(N))
    assert_equal(model(**full), twin(model, full, layer))
    mixup(x, torch.arange(N))
    assert_equal(model(**x), twin(model, x, layer))


def test_batches_of_other_lengths_after_the_first(lam):
    model, layer = prepared(hf.bert()), "bert.encoder.layer.1"
    mixup = ManifoldMixup(model, layers=[layer], pairing=lambda y, generator: order_of(N), seed=0)
    for length in (9, 7, 12):
        ids, mask = hf.padded_tokens(N, length, "right")
        x = {"input_ids": ids, "attention_mask": mask}
        mixup(x, torch.arange(N))
        assert_equal(model(**x), twin(model, x, layer))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float64])
def test_every_kind_of_mask(dtype, monkeypatch):
    model, x = prepared(hf.bert()), padded(dtype=dtype)
    check_masked_layers(model, x, N, ["bert.encoder.layer.1"], after_cut(x), x["attention_mask"] != 0, monkeypatch)


def test_a_mask_of_pairs_of_positions(monkeypatch):
    """Shape (n, 1, positions, positions), as transformers takes it: who attends to whom, all of the padding aside."""
    model, x = prepared(hf.bert()), padded(dtype=torch.bool)
    attended = x["attention_mask"]
    pairs = attended[:, None, None, :].expand(N, 1, LENGTH, LENGTH).contiguous()
    x = {**x, "attention_mask": pairs}
    check_masked_layers(model, x, N, ["bert.encoder.layer.1"], after_cut(x), attended, monkeypatch)


def test_a_mask_that_comes_after_discovery_without_one_is_refused():
    model, x = prepared(hf.bert()), padded()
    mixup = ManifoldMixup(model, layers=["bert.encoder.layer.1"], seed=0)
    mixup({"input_ids": x["input_ids"]}, torch.arange(N))
    mixup(x, torch.arange(N))
    with pytest.raises(errors.ManifoldMixupError, match="attention_mask"):
        model(**x)


def test_a_batch_without_the_mask_that_discovery_saw_attends_to_everything(lam):
    model, x, layer = prepared(hf.bert()), padded(), "bert.encoder.layer.1"
    mixup = ManifoldMixup(model, layers=[layer], pairing=lambda y, generator: order_of(N), seed=0)
    mixup(x, torch.arange(N))
    bare = {"input_ids": x["input_ids"]}
    mixup(bare, torch.arange(N))
    assert_equal(model(**bare), by_hand(copy.deepcopy(model), bare, layer, mixture(LAM, order_of(N)), N))


def test_two_batches(lam):
    model, x, layer = prepared(hf.bert()), padded(), "bert.encoder.layer.1"
    both = {key: torch.cat([value, value[order_of(N)]]) for key, value in x.items()}
    mixup = ManifoldMixup(model, layers=[layer], pairing="two-batches", seed=0)
    inputs, target = mixup(both, torch.arange(2 * N))
    assert torch.equal(target.y_partner, torch.arange(N, 2 * N))
    assert_equal(model(**inputs), twin(model, x, layer))


@pytest.mark.parametrize("network", ["bert", "bert, mean of tokens", "gpt2, last token"])
def test_every_pair_at_a_layer_of_its_own(network):
    model, x = prepared(hf.TEXT[network]()), padded()
    names = layers_of(network)
    mixup = ManifoldMixup(model, alpha=1.0, layers=names, per="example", seed=2)
    seen = set()
    for _ in range(4):
        mixup(x, torch.arange(N))
        output = call(model, x)
        chosen, lam, partner = mixup.last
        plain = next(iter(call(inert(model, mixup), x).values())) if network == "bert" else call(inert(model, mixup), x)
        rows = output.logits if network == "bert" else output
        for i, layer in enumerate(chosen):
            if layer is None:
                expected = plain[i]
            else:
                seen.add(layer)
                weight = float(lam[i])
                after = {**x, "attention_mask": united(x["attention_mask"], weight, partner)}
                with mixup.paused():
                    reference = by_hand_with_masks(model, x, layer, weight, partner, after, x["attention_mask"] != 0)
                expected = (reference.logits if network == "bert" else reference)[i]
            torch.testing.assert_close(rows[i], expected, rtol=1e-9, atol=1e-9)
    assert len(seen) > 1


def inert(model: nn.Module, mixup: ManifoldMixup):
    """The model as it is without its mixer."""

    def run(**x: Tensor):
        with mixup.paused():
            return model(**x)

    return run


# ---------------------------------------------------------------- padding that is read off the token ids


@pytest.mark.parametrize(("side", "masked"), [("right", True), ("left", True), ("right", False)])
def test_gpt2_classifier_reads_the_last_token_of_the_union(side, masked, monkeypatch):
    """It looks for the last token that is not padding in the ids: those, too, have to be united."""
    model, x = prepared(hf.gpt2_classifier()), padded(side)
    attended = x["attention_mask"] != 0

    def after(lam: float, partner: Tensor) -> dict[str, Tensor]:
        union = {"input_ids": united_ids(x["input_ids"], lam, partner, hf.PAD)}
        return {**union, "attention_mask": united(x["attention_mask"], lam, partner)} if masked else union

    inputs = x if masked else {"input_ids": x["input_ids"]}
    layers = [f"transformer.h.{i}" for i in range(3)]
    check_masked_layers(model, inputs, N, layers, after, attended, monkeypatch)


def test_gpt2_classifier_without_a_mask_and_padding_on_the_left_is_exact(monkeypatch):
    model, x = prepared(hf.gpt2_classifier()), {"input_ids": padded("left")["input_ids"]}
    partner = order_of(N)
    set_lam(monkeypatch, 0.0)
    permuted = call(model, {"input_ids": x["input_ids"][partner]})
    for layer in (f"transformer.h.{i}" for i in range(3)):
        assert_equal(mixed_output(model, x, N, layer), permuted)


# ---------------------------------------------------------------- masks of other names, in networks of one's own


class Padded(nn.Module):
    """PyTorch's own encoder; its mask is True where a position is to be ignored."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(hf.WORDS, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.pooling = pooling
        self.head = nn.Linear(12, hf.CLASSES)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor) -> Tensor:
        states = self.encoder(self.embed(tokens), src_key_padding_mask=key_padding_mask)
        if self.pooling == "first":
            return self.head(states[:, 0])
        weights = (~key_padding_mask).to(states.dtype).unsqueeze(-1)
        return self.head((states * weights).sum(1) / weights.sum(1))


@pytest.mark.parametrize("how", ["dict", "tuple"])
@pytest.mark.parametrize("pooling", ["first", "mean in the model's own forward"])
def test_masks_that_mark_what_is_ignored(pooling, how, monkeypatch):
    model = prepared(Padded(pooling))
    ids, mask = hf.padded_tokens(N, LENGTH, "right")
    x = {"tokens": ids, "key_padding_mask": mask == 0}
    layers = ["embed", "encoder.layers.0", "encoder.layers.1"]

    def after(lam: float, partner: Tensor) -> dict[str, Tensor]:
        return {**x, "key_padding_mask": united(x["key_padding_mask"], lam, partner, ignored=True)}

    if how == "dict":
        check_masked_layers(model, x, N, layers, after, mask != 0, monkeypatch)
        return
    set_lam(monkeypatch, LAM)
    for layer in layers:
        expected = by_hand_with_masks(model, x, layer, LAM, order_of(N), after(LAM, order_of(N)), mask != 0)
        assert_equal(mixed_output(model, tuple(x.values()), N, layer), expected)


def test_nested_tensors_of_the_encoders_fast_path_do_not_mislead_discovery(monkeypatch):
    torch.manual_seed(0)
    model = Padded("first")
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
    model.encoder = nn.TransformerEncoder(layer, 3)
    model = prepared(model)
    ids, mask = hf.padded_tokens(N, LENGTH, "right")
    x = {"tokens": ids, "key_padding_mask": mask == 0}

    def after(lam: float, partner: Tensor) -> dict[str, Tensor]:
        return {**x, "key_padding_mask": united(x["key_padding_mask"], lam, partner, ignored=True)}

    check_masked_layers(model, x, N, ["encoder.layers.1"], after, mask != 0, monkeypatch)


def both_sides() -> Tensor:
    """Attended positions of which some rows have padding on the left, some on the right, and one a hole."""
    mask = hf.padded_tokens(N, LENGTH, "right")[1]
    mask[1::2] = mask[1::2].flip(1)
    mask[0, 3] = 0
    return mask


@pytest.mark.parametrize("network", ["bert", "bert, mean of tokens", "gpt2, mean of tokens", "t5 encoder"])
def test_masks_with_holes_and_padding_on_both_sides(network, monkeypatch):
    model, mask = prepared(hf.TEXT[network]()), both_sides()
    mask[:, 0] = 1  # what the head of BERT reads
    x = {"input_ids": padded()["input_ids"].clamp(min=2), "attention_mask": mask}
    check_masked_layers(model, x, N, layers_of(network), after_cut(x), mask != 0, monkeypatch)


class Counting(nn.Module):
    """Every layer is told positions that are counted with the mask: no mask, but made of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(hf.WORDS, 12)
        self.first, self.second = CountingLayer(), CountingLayer()
        self.head = hf.MeanPool(12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = attention_mask.cumsum(1) * attention_mask
        states = self.first(self.embed(input_ids), positions)
        return self.head(self.second(states, positions), attention_mask)


class CountingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place, self.linear = nn.Linear(1, 12), nn.Linear(12, 12)

    def forward(self, states: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(self.linear(states + self.place(positions.to(states.dtype).unsqueeze(-1))))


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_counted_by_the_mask_follow_the_union_where_all_padding_is_on_one_side(side, monkeypatch):
    x = {**padded(side), "input_ids": padded(side)["input_ids"].clamp(min=2)}
    check_masked_layers(prepared(Counting()), x, N, ["first"], after_cut(x), x["attention_mask"] != 0, monkeypatch)


def test_positions_counted_by_masks_of_which_neither_holds_the_other_are_refused():
    """The larger of two counts is not the count of the union."""
    x = {"input_ids": padded()["input_ids"].clamp(min=2), "attention_mask": both_sides()}
    model = prepared(Counting())
    mixup = ManifoldMixup(model, layers=["first"], seed=0)
    mixup(x, torch.zeros(N, dtype=torch.long))
    with pytest.raises(errors.BatchMismatch, match="Pad all examples on one side"):
        model(**x)


def test_bloom_whose_bias_of_positions_has_one_row_per_head_is_refused_while_layers_follow_that_read_it(monkeypatch):
    model, x = prepared(hf.bloom()), padded()

    def after(lam: float, partner: Tensor) -> dict[str, Tensor]:
        return {**after_cut(x)(lam, partner), "input_ids": united_ids(x["input_ids"], lam, partner, hf.PAD)}

    for layer in ("transformer.h.0", "transformer.h.1"):
        with pytest.raises(errors.NotACutPoint, match="other rows than the examples"):
            ManifoldMixup(model, layers=[layer])(x, torch.arange(N))
    check_masked_layers(model, x, N, ["transformer.h.2"], after, x["attention_mask"] != 0, monkeypatch)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rotary_positions(side, monkeypatch):
    model, x = prepared(hf.llama()), padded(side)

    def after(lam: float, partner: Tensor) -> dict[str, Tensor]:
        return {**after_cut(x)(lam, partner), "input_ids": united_ids(x["input_ids"], lam, partner, hf.PAD)}

    layers = [f"model.layers.{i}" for i in range(3)]
    check_masked_layers(model, x, N, layers, after, x["attention_mask"] != 0, monkeypatch)
    # Positions of one's own go past every layer, and cannot be mixed.
    positions = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with pytest.raises(errors.NotACutPoint, match="position_ids|rotary_emb"):
        ManifoldMixup(model, layers=layers[:1])({**x, "position_ids": positions}, torch.arange(N))


class Flags(nn.Module):
    """Boolean features that join in later. They are no mask, though they look like one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(9, hf.CLASSES)

    def forward(self, x: Tensor, flags: Tensor) -> Tensor:
        return self.second(torch.cat([torch.tanh(self.first(x)), flags.to(x.dtype)], 1))


def test_boolean_features_are_no_mask(monkeypatch):
    model = prepared(Flags())
    x = {"x": torch.randn(N, 4).double(), "flags": torch.rand(N, 3) > 0.5}
    with pytest.raises(errors.NotACutPoint, match="flags"):
        ManifoldMixup(model, layers=["first"])(x, torch.arange(N))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("layer", ["bert.encoder.layer.0", "bert.encoder.layer.1.attention"])
def test_activation_checkpointing_recomputes_under_the_same_masks(layer, lam):
    gradients = []
    for checkpointing in (False, True):
        model = prepared(hf.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mixup = ManifoldMixup(model, layers=[layer], pairing=lambda y, generator: order_of(N), seed=0)
        mixup(padded(), torch.arange(N))
        gradients.append(parameter_gradients(model, model(**padded())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


class LeakyMean(nn.Module):
    """Averages over padded positions as well: a fault of its own, which no mixing can mend."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = hf.bert_mean().encoder
        self.head = nn.Linear(12, hf.CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1))


def test_a_head_that_reads_padded_positions_sees_those_of_one_part_as_zeros_of_the_mixed_layer(lam):
    model, x, layer = prepared(LeakyMean()), padded(), "encoder.encoder.layer.1"
    assert_equal(mixed_output(model, x, N, layer), twin(model, x, layer))


def test_full_masks_change_nothing(monkeypatch):
    model, x = prepared(hf.bert()), padded()
    full = {**x, "attention_mask": torch.ones_like(x["attention_mask"])}
    check_layers(model, full, N, ["bert.encoder.layer.0", "bert.encoder.layer.1"], monkeypatch)
