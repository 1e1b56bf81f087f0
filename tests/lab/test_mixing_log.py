"""The log of draws against a second mixer with the same seed, and against the Beta distribution."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import beta, chisquare

from lab.small import DIGITS, one_run, train
from manifold_mixup.lab import storage
from manifold_mixup.lab.config import slug
from manifold_mixup.lab.errors import Interrupted
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.mixing_log import MixingLog
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute
from manifold_mixup.lab.training import Hooks
from manifold_mixup.mixup import Draw, ManifoldMixup
from manifold_mixup.pairing import draw_lam

LAYERS = ["input", "hidden.1", "hidden.2"]
LOGGING = ["manifold_mixup", "input_mixup", "last_layer_mixup", "blocked_gradient", "noisy_feature_mixup", "cutmix"]
SILENT = ["adamixup", "none", "label_smoothing", "hidden_noise"]


def network():
    torch.manual_seed(0)
    return build_model("mlp", {"width": 6, "depth": 2}, (1, 4, 4), 3)


def batch(n=9):
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, 1, 4, 4, generator=generator), torch.arange(n) % 3


def attached(name, seed=5, **options):
    method, model = make_method(name, options), network().train()
    return method, model, method.attach(model, ["hidden.1", "hidden.2"], seed)


def logged(name, batches=40, n=9, **options):
    """What a record would say after so many batches."""
    method, _, transform = attached(name, **options)
    for _ in range(batches):
        transform(*batch(n))
    method.detach()
    return method.facts()["mixing"]


def draws(batches=40, n=9, seed=5, **options):
    """What a mixer of its own draws with this seed."""
    mixer = ManifoldMixup(network().train(), seed=seed, **options)
    found = []
    for _ in range(batches):
        mixer(*batch(n))
        found.append(mixer.last)
    mixer.remove()
    return found


def histogram(lam):
    return np.histogram(np.asarray(lam, dtype=float), bins=50, range=(0, 1))[0].tolist()


@pytest.mark.parametrize("probability", [1.0, 0.6])
@pytest.mark.parametrize("pairing", ["random", "halves", "two-batches"])
@pytest.mark.parametrize("name", ["manifold_mixup", "blocked_gradient", "noisy_feature_mixup"])
def test_batches_are_counted_by_layer_with_their_lambda(name, pairing, probability):
    options = {"layers": LAYERS, "alpha": 0.7, "probability": probability, "pairing": pairing}
    expected = draws(n=8, **options)
    mixed = [draw for draw in expected if draw.layer is not None]
    assert logged(name, n=8, **options) == {
        "unit": "batches",
        "layers": {layer: sum(draw.layer == layer for draw in mixed) for layer in LAYERS},
        "unmixed": 40 - len(mixed),
        "lam": histogram([draw.lam for draw in mixed]),
        "alpha": 0.7,
    }
    assert (len(mixed) < 40) == (probability < 1)


@pytest.mark.parametrize("pairing", ["random", "halves"])
@pytest.mark.parametrize("n", [8, 9])
def test_with_draws_for_every_pair_examples_are_counted(n, pairing):
    options = {"layers": LAYERS, "alpha": 0.7, "per": "example", "pairing": pairing}
    expected = draws(n=n, **options)
    names = Counter(name for draw in expected for name in draw.layer)
    lam = [
        value
        for draw in expected
        for i, (value, partner) in enumerate(zip(draw.lam.tolist(), draw.partner.tolist(), strict=True))
        if partner != i
    ]
    found = logged("manifold_mixup", n=n, **options)
    assert found["unit"] == "examples"
    assert found["layers"] == {layer: names[layer] for layer in LAYERS}
    assert found["lam"] == histogram(lam)
    assert found["unmixed"] == names[None] == 40 * (n % 2)  # who is left alone
    assert sum(found["lam"]) + found["unmixed"] == 40 * n


@pytest.mark.parametrize(("name", "layer"), [("input_mixup", "input"), ("last_layer_mixup", "head")])
def test_methods_of_one_layer_name_it(name, layer):
    found = logged(name)
    assert found["layers"] == {layer: 40}
    assert (sum(found["lam"]), found["unmixed"], found["alpha"]) == (40, 0, 1.0)


@pytest.mark.parametrize("per", ["batch", "example"])
def test_cutmix_counts_the_share_that_was_drawn_and_not_the_one_that_boxes_leave(per):
    found = logged("cutmix", batches=60, alpha=0.4, probability=0.5, per=per)
    generator, count = torch.Generator().manual_seed(5), 1 if per == "batch" else 9
    mixed, lam = 0, []
    for _ in range(60):  # the draws of one batch, in their order
        mixes = torch.rand((), dtype=torch.float64, generator=generator) < 0.5
        torch.randperm(9, generator=generator)
        drawn = draw_lam(0.4, generator, count)
        torch.randint(4, (count,), generator=generator), torch.randint(4, (count,), generator=generator)
        mixed += count * int(mixes)
        lam += drawn.tolist() if mixes else []
    assert 0 < mixed < 60 * count
    unit = "batches" if per == "batch" else "examples"
    assert (found["unit"], found["layers"], found["unmixed"]) == (unit, {"input": mixed}, 60 * count - mixed)
    assert (found["lam"], found["alpha"]) == (histogram(lam), 0.4)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_the_histogram_is_that_of_the_beta_distribution(alpha):
    found = logged("input_mixup", batches=100, n=60, alpha=alpha, per="example")
    pairs = np.array(found["lam"]) / 2  # both of a pair have one draw
    expected = np.diff(beta.cdf(np.linspace(0, 1, 51), alpha, alpha)) * pairs.sum()
    assert pairs.sum() == 3000
    assert chisquare(pairs, expected).pvalue > 1e-3


@pytest.mark.parametrize("per", ["batch", "example"])
def test_a_lambda_that_rounds_to_one_leaves_a_batch_unmixed_and_is_counted_all_the_same(per):
    found = logged("manifold_mixup", batches=300, n=3, alpha=0.01, layers=LAYERS, per=per)
    ones = 300 if per == "batch" else 600  # of three examples one is left alone
    assert found["lam"][-1] > 0.2 * ones < found["lam"][0]
    assert sum(found["lam"]) == ones
    assert sum(found["layers"].values()) + found["unmixed"] == (300 if per == "batch" else 900)
    assert found["unmixed"] > 0.2 * ones


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"probability": 0.0}, {"layers": []}])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_a_method_that_is_switched_off_counts_unmixed_batches_and_no_lambda(options, per):
    found = logged("manifold_mixup", batches=5, **{"layers": ["input"], "per": per, **options})
    assert found["unmixed"] == (5 if per == "batch" else 45)
    assert sum(found["lam"]) == sum(found["layers"].values()) == 0


def test_bins_are_closed_at_zero_and_one():
    log = MixingLog("batches")
    for lam in (0.0, 0.5, 1.0, float(np.nextafter(0.02, 0)), 0.02):
        log.note_batch("a", lam)
    assert {i: count for i, count in enumerate(log.lam) if count} == {0: 2, 1: 1, 25: 1, 49: 1}
    rows = MixingLog("examples")
    rows.note_rows(["a", None, "b"], torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    assert {i: count for i, count in enumerate(rows.lam) if count} == {0: 1, 25: 1, 49: 1}
    assert (rows.layers, rows.unmixed) == ({"a": 1, "b": 1}, 1)
    rows.note(Draw(None, 1.0, None), 7, certain=True)
    assert (rows.lam[-1], rows.unmixed) == (7, 8)


def test_evaluation_counts_nothing():
    method, model, transform = attached("manifold_mixup", layers=LAYERS)
    transform(*batch())
    before = method.facts()
    model.eval()
    transform(*batch())
    assert method.facts() == before
    assert sum(before["mixing"]["layers"].values()) == 1


@pytest.mark.parametrize("name", LOGGING)
@pytest.mark.parametrize("rest", [0, 4])
def test_a_restored_method_ends_with_the_same_facts(name, rest):
    straight, _, transform = attached(name)
    for _ in range(6):
        transform(*batch())
    tensors = {}
    packed = storage.pack(straight.state_dict(), tensors)
    packed = json.loads(json.dumps(packed))  # what a checkpoint does
    restored, _, other = attached(name, seed=99)
    restored.load_state_dict(storage.unpack(packed, tensors))
    for _ in range(rest):
        transform(*batch())
        other(*batch())
    assert restored.facts() == straight.facts()
    assert list(restored.facts()["mixing"]["layers"]) == list(straight.facts()["mixing"]["layers"])
    counts = restored.facts()["mixing"]
    assert sum(counts["layers"].values()) + counts["unmixed"] == 6 + rest


@pytest.mark.parametrize("name", LOGGING)
def test_checkpoints_from_before_the_log_still_load(name):
    method, _, transform = attached(name)
    transform(*batch())
    state = method.state_dict()
    for part in (state, state.get("mixer", {})):
        part.pop("mixing", None)
    restored, _, other = attached(name, seed=99)
    restored.load_state_dict(state)
    other(*batch())
    counts = restored.facts()["mixing"]
    assert sum(counts["layers"].values()) + counts["unmixed"] == 1


@pytest.mark.parametrize("name", SILENT)
def test_methods_without_one_lambda_keep_no_log(name):
    method, model, transform = attached(name)
    x, _ = transform(*batch())
    model(x)
    assert "mixing" not in method.facts()
    assert "mixing" not in method.state_dict()


def test_the_log_is_in_the_record_and_the_same_after_an_interruption_at_any_step(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "manifold_mixup", "options": {"per": "example"}}])
    straight = execute(RunFolder(tmp_path / "a", run)).train
    assert straight["mixing"]["alpha"] == 2.0
    assert list(straight["mixing"]["layers"]) == straight["layers"]
    assert sum(straight["mixing"]["layers"].values()) + straight["mixing"]["unmixed"] == 12 * 10
    for step in (1, 7):
        asked = iter([False] * step + [True])
        folder = RunFolder(tmp_path / slug(str(step)), run)
        with pytest.raises(Interrupted):
            execute(folder, Hooks(stop=lambda asked=asked: next(asked)))
        record = execute(folder)
        assert record.train["mixing"] == straight["mixing"]
        assert folder.read().train["layers"] == straight["layers"]


def test_a_run_that_goes_on_from_its_last_step_has_the_layers_and_the_log(tmp_path):
    run = one_run(DIGITS, methods=[{"name": "manifold_mixup"}])
    first = train(run, tmp_path)[1].facts
    again = train(run, tmp_path)[1].facts  # from the checkpoint of the last step
    assert again["layers"] == first["layers"]
    assert again["mixing"] == first["mixing"]


def test_the_log_changes_no_draw():
    _, _, transform = attached("manifold_mixup", layers=LAYERS)
    model = network().train()
    mixer = ManifoldMixup(model, alpha=2.0, layers=LAYERS, seed=5)
    for _ in range(5):
        (x, target), (other, expected) = transform(*batch()), mixer(*batch())
        assert torch.equal(x, other)
        assert target.lam == expected.lam
        assert torch.equal(target.y_partner, expected.y_partner)
