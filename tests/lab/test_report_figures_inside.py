"""Spectra, mixing logs, confusion matrices and mistakes."""

import base64
import io
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

from lab.report_runs import details, experiment_of, log_lines, write_run
from lab.test_report_figures import EVIL, check_plots, line_of, predictions, traces_of
from manifold_mixup.lab.data.base import Examples
from manifold_mixup.lab.measures.base import Subject
from manifold_mixup.lab.measures.classification import calibration_error
from manifold_mixup.lab.measures.details import details as kept_details
from manifold_mixup.lab.measures.spectra import spectra_arrays
from manifold_mixup.lab.report.figures.confusion import confusion_plots, mistakes
from manifold_mixup.lab.report.figures.curves import curve_plots
from manifold_mixup.lab.report.figures.mixing import expected, mixing_plots
from manifold_mixup.lab.report.figures.reliability import reliability_plots
from manifold_mixup.lab.report.figures.spectra import spectra_plots
from manifold_mixup.lab.report.figures.strength import strength_plots
from manifold_mixup.lab.report.figures.style import SERIES, colour_of, dash_of

# ---------------------------------------------------------------- spectra


def spectra(seed, classes=(0, 1, 2), width=5):
    """Arrays as a run keeps them; the last class has one value less."""
    rng = np.random.default_rng(seed)
    found = {"classes": np.array(classes)}
    for suffix in ("", "_centred"):
        values = np.sort(rng.uniform(0.5, 9, (len(classes), width)))[:, ::-1].copy()
        values[-1, -1] = np.nan
        found |= {f"by_class{suffix}": values, f"effective_rank{suffix}": rng.uniform(1, width, len(classes))}
    return found


def test_spectra_are_means_over_classes_and_seeds_between_the_smallest_and_the_largest_class(tmp_path):
    seeds = [spectra(seed) for seed in range(3)]
    results = [write_run(tmp_path, EVIL, s, arrays={"spectra": a}, classes="abc") for s, a in enumerate(seeds)]
    plots = check_plots(spectra_plots(experiment_of(results)))
    assert [p.key for p in plots] == ["spectrum", "effective-rank", "spectrum-centred", "effective-rank-centred"]
    for suffix, values, ranks in (("", *plots[:2]), ("_centred", *plots[2:])):
        by_class = [[statistics.fmean(a[f"by_class{suffix}"][c, i] for a in seeds) for i in range(5)] for c in range(3)]
        at = [[row[i] for row in by_class if math.isfinite(row[i])] for i in range(5)]
        assert line_of(values)["x"] == [1, 2, 3, 4, 5]
        assert line_of(values)["y"] == pytest.approx([statistics.fmean(column) for column in at])
        (strip,) = traces_of(values, 0, fill="toself")
        assert strip["y"] == pytest.approx([max(column) for column in at] + [min(column) for column in at][::-1])
        assert values.figure["layout"]["yaxis"]["type"] == "log"
        rank = [a[f"effective_rank{suffix}"].tolist() for a in seeds]
        means = [statistics.fmean(row) for row in rank]
        words = f"effective rank {statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"
        assert words in values.alt
        assert words in line_of(values)["hovertemplate"]
        dots = line_of(ranks)
        assert dots["y"] == pytest.approx([statistics.fmean(column) for column in zip(*rank, strict=True)])
        deviations = [statistics.stdev(column) for column in zip(*rank, strict=True)]
        assert dots["error_y"]["array"] == pytest.approx(deviations)
        assert ranks.figure["layout"]["xaxis"]["ticktext"] == ["a", "b", "c"]
    assert "Arithmetic mean" in plots[0].note


def test_seeds_without_a_class_do_not_count_for_it(tmp_path):
    seeds = [spectra(0, (0, 2)), spectra(1, (2, 7), width=3)]
    results = [write_run(tmp_path, seed=s, arrays={"spectra": a}) for s, a in enumerate(seeds)]
    ranks = check_plots(spectra_plots(experiment_of(results)))[1]
    first, second = (a["effective_rank"] for a in seeds)
    assert line_of(ranks)["y"] == pytest.approx([first[0], (first[1] + second[0]) / 2, second[1]])
    assert ranks.figure["layout"]["xaxis"]["ticktext"] == ["0", "2", "7"]
    assert [value is None for value in line_of(ranks)["error_y"]["array"]] == [True, False, True]


def test_spectra_of_different_layers_are_not_averaged(tmp_path):
    def at(layer, seed):
        return {**spectra(seed), "layer": np.frombuffer(layer.encode(), np.uint8)}

    seeds = [at("features", 0), at(EVIL, 1), at("features", 2)]
    results = [write_run(tmp_path, seed=s, arrays={"spectra": a}) for s, a in enumerate(seeds)]
    plot = check_plots(spectra_plots(experiment_of(results)))[0]
    assert line_of(plot)["y"][0] == pytest.approx((seeds[0]["by_class"] + seeds[2]["by_class"])[:, 0].mean() / 2)
    assert "Hidden states of the layer features." in plot.note
    assert f"Seed 1 of none is left out: its spectra are of the layer {EVIL}, not of features." in plot.note
    results.append(write_run(tmp_path, "other", arrays={"spectra": at("é", 3)}))
    plot = check_plots(spectra_plots(experiment_of(results)))[0]
    assert "Not all methods were measured at the same layer: features of none; é of other." in plot.note


def test_one_class_and_one_seed_have_neither_band_nor_bars(tmp_path):
    values, ranks, *_ = check_plots(
        spectra_plots(experiment_of([write_run(tmp_path, arrays={"spectra": spectra(0, (4,))})]))
    )
    assert len(values.figure["data"]) == len(ranks.figure["data"]) == 1
    assert line_of(values)["y"][-1] is None
    assert "error_y" not in line_of(ranks)
    assert ranks.note == ""


def test_zeros_rounding_and_lost_networks_do_not_stretch_the_axis(tmp_path):
    small = {**spectra(0), "by_class": np.array([[10.0, 1.0, 1e-14, 0.0]] * 3)}
    lost = {name: np.full_like(a, np.nan) if a.dtype == float else a for name, a in spectra(1).items()}
    results = [write_run(tmp_path, "small", arrays={"spectra": small})]
    results.append(write_run(tmp_path, "lost", arrays={"spectra": lost}))
    plot = check_plots(spectra_plots(experiment_of(results)))[0]
    assert plot.figure["layout"]["yaxis"]["range"] == pytest.approx([-4, math.log10(12)])
    assert line_of(plot)["y"] == pytest.approx([10, 1, 1e-14, None])
    assert {trace["name"] for trace in plot.figure["data"]} == {"small"}
    assert "mostly rounding" in plot.note
    assert spectra_plots(experiment_of(results[1:])) == []
    assert spectra_plots(experiment_of([write_run(tmp_path, "never")])) == []


def test_many_values_are_thinned_and_many_classes_are_not_named(tmp_path):
    arrays = spectra(0, range(30), width=2000)
    values, ranks, *_ = check_plots(spectra_plots(experiment_of([write_run(tmp_path, arrays={"spectra": arrays})])))
    x = line_of(values)["x"]
    assert x[:20] == list(range(1, 21))
    assert x[-1] == 2000
    assert len(x) <= 400
    assert "ticktext" not in ranks.figure["layout"]["xaxis"]


# ---------------------------------------------------------------- mixing


def mixing_log(lam, layers, *, alpha=2.0, unit="batches", unmixed=0):
    counts = np.histogram(lam, bins=50, range=(0, 1))[0].tolist()
    return {"mixing": {"unit": unit, "layers": layers, "unmixed": unmixed, "lam": counts, "alpha": alpha}}


def test_layers_are_shares_of_all_batches_of_all_seeds(tmp_path):
    first = mixing_log(np.full(90, 0.5), {"input": 60, EVIL: 30}, unmixed=10)
    second = mixing_log(np.full(50, 0.5), {"input": 20, EVIL: 30}, unmixed=50)
    other = mixing_log(np.full(40, 0.5), {"layer 3": 40})
    results = [write_run(tmp_path, "a", 0, train=first), write_run(tmp_path, "a", 1, train=second)]
    results += [write_run(tmp_path, "plain"), write_run(tmp_path, "b", train=other)]
    layers, lam = check_plots(mixing_plots(experiment_of(results)))
    assert [plot.key for plot in (layers, lam)] == ["mixed-layers", "lambda"]
    assert line_of(layers, 0)["y"] == [40, 30, 0, 30]
    assert line_of(layers, 2)["y"] == [0, 0, 100, 0]
    assert len(layers.figure["data"]) == 2
    assert layers.figure["layout"]["xaxis"]["ticktext"][2:] == ["layer 3", "not mixed"]
    assert "a, 200 batches: input 40.0 %" in layers.alt


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_the_expected_bins_are_integrals_of_the_density(alpha):
    def density(x):
        return x ** (alpha - 1) * (1 - x) ** (alpha - 1) / math.exp(2 * math.lgamma(alpha) - math.lgamma(2 * alpha))

    shares = expected(alpha, 10)
    for place in range(5):  # substitution x = t^(1/alpha) takes the pole at 0 away
        low, high = ((place + k) / 10 for k in (0, 1))
        wanted = integrate.quad(
            lambda t: density(t ** (1 / alpha)) * t ** (1 / alpha - 1) / alpha, low**alpha, high**alpha
        )[0]
        assert shares[place] == pytest.approx(wanted, rel=1e-6)
        assert shares[9 - place] == pytest.approx(shares[place])


def test_the_histogram_is_a_density_beside_the_dotted_beta(tmp_path):
    lam = np.random.default_rng(0).beta(0.2, 0.2, 4000)
    results = [write_run(tmp_path, EVIL, train=mixing_log(lam, {"input": 4000}, alpha=0.2))]
    _, plot = check_plots(mixing_plots(experiment_of(results)))
    line, (dotted,) = line_of(plot), traces_of(plot, 0, showlegend=False)
    for trace in (line, dotted):
        assert trace["line"]["shape"] == "hv"
        assert trace["x"] == pytest.approx(np.linspace(0, 1, 51))
        assert sum(trace["y"][:-1]) / 50 == pytest.approx(1)
    assert line["y"][3] == pytest.approx(sum(0.06 <= value < 0.08 for value in lam) / 4000 * 50)
    assert dotted["y"][:50] == pytest.approx(expected(0.2, 50) * 50)
    assert dotted["line"]["dash"] == "dot"
    assert dotted["line"]["color"] == line["line"]["color"] == colour_of(0)


def words_of(tmp_path, name, log):
    return mixing_plots(experiment_of([write_run(tmp_path, name, train=log)]))[1].alt


def test_the_fit_is_a_chi_square_test_worded_plainly(tmp_path):
    lam = np.random.default_rng(1).beta(1, 1, 5000)
    counts = np.histogram(lam, bins=50, range=(0, 1))[0]
    fits = words_of(tmp_path, "fits", mixing_log(lam, {"input": 5000}, alpha=1.0))
    assert f"{100 * stats.chisquare(counts).pvalue:.1f} % would be as far off or further (chi-square test)" in fits
    assert "5000 batches, \N{GREEK SMALL LETTER ALPHA} = 1" in fits
    part = words_of(tmp_path, "part", mixing_log(lam, {"input": 5000}, alpha=1.0, unmixed=3))
    assert f"{100 * stats.chisquare(counts[:-1]).pvalue:.1f} % would" in part
    pairs = words_of(tmp_path, "pairs", mixing_log(np.repeat(lam, 2), {"input": 10000}, alpha=1.0, unit="examples"))
    assert f"{100 * stats.chisquare(counts).pvalue:.1f} % would" in pairs  # each pair has one λ
    wrong = words_of(tmp_path, "wrong", mixing_log(lam, {"input": 5000}, alpha=2.0))
    assert "less than 1 in 1000 would be as far off" in wrong


def test_without_a_distribution_or_enough_draws_nothing_is_said_of_the_fit(tmp_path):
    for name, log in (
        ("unknown", mixing_log([0.5] * 100, {"input": 100}, alpha=None)),
        ("few", mixing_log([0.5] * 6, {"input": 6})),
        ("off", mixing_log([1.0] * 6, {"input": 0}, alpha=0.0, unmixed=6)),
    ):
        assert "chi-square" not in words_of(tmp_path, name, log)


def test_seeds_with_different_alpha_have_no_common_distribution(tmp_path):
    logs = [mixing_log([0.5] * 100, {"input": 100}, alpha=alpha) for alpha in (1.0, 2.0)]
    results = [write_run(tmp_path, seed=seed, train=log) for seed, log in enumerate(logs)]
    _, plot = check_plots(mixing_plots(experiment_of(results)))
    assert len(plot.figure["data"]) == 1


def test_methods_that_mix_nothing_have_no_mixing_figures(tmp_path):
    assert mixing_plots(experiment_of([write_run(tmp_path, train={"mixing": None})])) == []
    nothing = mixing_log([], {"input": 0})
    assert mixing_plots(experiment_of([write_run(tmp_path, "b", train=nothing)])) == []


# ---------------------------------------------------------------- confusion


def test_a_confusion_matrix_is_normalised_by_row_over_all_seeds(tmp_path):
    parts = [predictions(seed) for seed in range(2)]
    classes = ("cat", EVIL, "dog")
    results = [
        write_run(tmp_path, EVIL, s, arrays={"details": details(*p)}, classes=classes) for s, p in enumerate(parts)
    ]
    (plot,) = check_plots(confusion_plots(experiment_of(results)))
    counts = {(t, p): 0 for t in range(3) for p in range(3)}
    for probabilities, y in parts:
        for row, true in zip(probabilities, y, strict=True):
            counts[int(true), int(row.argmax())] += 1
    (heat,) = plot.figure["data"]
    for true in range(3):
        total = sum(counts[true, p] for p in range(3))
        for predicted in range(3):
            assert heat["customdata"][true][predicted] == counts[true, predicted]
            assert heat["z"][true][predicted] == pytest.approx(100 * counts[true, predicted] / total, abs=0.005)
            assert float(heat["text"][true][predicted]) == pytest.approx(heat["z"][true][predicted], abs=0.5)
    ticks = ["cat", "&lt;script&gt;aler…", "dog"]
    assert heat["x"] == heat["y"] == ticks
    assert plot.title == f"Confusion: {EVIL}"
    wrong = sorted(((n, t, p) for (t, p), n in counts.items() if t != p), key=lambda item: (-item[0], item[1:]))
    for n, true, predicted in wrong[:3]:
        assert f"{classes[true]} taken for {classes[predicted]}, {n} times" in plot.alt
    assert plot.alt.count("taken for") == 3


@pytest.mark.parametrize(("classes", "text", "named"), [(12, True, True), (20, False, True), (21, False, False)])
def test_numbers_and_names_are_left_out_where_there_is_no_room(tmp_path, classes, text, named):
    arrays = {"confusion": np.eye(classes, dtype=np.int64)}
    (plot,) = check_plots(confusion_plots(experiment_of([write_run(tmp_path, arrays={"details": arrays})])))
    assert ("text" in plot.figure["data"][0]) == text
    assert (plot.figure["layout"]["xaxis"].get("dtick") == 1) == named
    assert plot.alt == "100.0 % of the predictions are right. There are no confusions."


def test_classes_without_examples_are_empty_rows(tmp_path):
    arrays = {"confusion": np.array([[3, 1], [0, 0]]), "confusion_lost": np.array(7)}
    (plot,) = check_plots(confusion_plots(experiment_of([write_run(tmp_path, arrays={"details": arrays})])))
    assert plot.figure["data"][0]["z"] == [[75, 25], [None, None]]
    assert "1 of 2 classes have no examples." in plot.note
    assert "7 examples have no prediction" in plot.note
    for name, counts in (("one", [[5]]), ("nobody", [[0, 0], [0, 0]])):
        results = [write_run(tmp_path, name, arrays={"details": {"confusion": np.array(counts)}})]
        assert len(check_plots(confusion_plots(experiment_of(results)))) == (name == "one")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("channels", [1, 3])
def test_the_surest_mistakes_of_all_seeds_are_shown_with_their_images(tmp_path, channels):
    names = ["cat", EVIL, "dog"]
    results, everything = [], []
    for seed in range(2):
        probabilities, y = predictions(seed, 60)
        images = np.random.default_rng(seed).integers(0, 256, (60, channels, 5, 4), dtype=np.uint8)
        arrays = details(probabilities, y, images=images)
        results.append(write_run(tmp_path, EVIL, seed, arrays={"details": arrays}, classes=names))
        for i in range(60):
            if probabilities[i].argmax() != y[i]:
                everything.append((probabilities[i].max(), seed, i, y[i], probabilities[i].argmax(), images[i]))
    results.append(write_run(tmp_path, "never"))
    (found,) = mistakes(experiment_of(results))
    assert (found.label, found.index) == (EVIL, 0)
    assert len(found.mistakes) == 12
    everything.sort(key=lambda item: -item[0])
    for mistake, (sure, seed, index, true, predicted, image) in zip(found.mistakes, everything, strict=False):
        assert (mistake.confidence, mistake.seed, mistake.index) == (sure, seed, index)
        assert (mistake.true, mistake.predicted) == (names[true], names[predicted])
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(mistake.image))))
        assert np.array_equal(shown, image[0] if channels == 1 else np.moveaxis(image, 0, 2))


def test_examples_that_are_no_images_are_mistakes_without_one(tmp_path):
    arrays = details(*predictions(0, 30))
    arrays["mistakes_confidence"][0] = np.nan
    count = len(arrays["mistakes_index"])
    (found,) = mistakes(experiment_of([write_run(tmp_path, arrays={"details": arrays})]))
    assert len(found.mistakes) == count - 1
    assert {mistake.image for mistake in found.mistakes} == {""}
    odd = {**arrays, "mistakes_image": np.zeros((count, 2, 4, 4), np.uint8)}
    (found,) = mistakes(experiment_of([write_run(tmp_path, "odd", arrays={"details": odd})]))
    assert {mistake.image for mistake in found.mistakes} == {""}
    faultless = {name: a[:0] if name.startswith("mistakes") else a for name, a in arrays.items()}
    assert mistakes(experiment_of([write_run(tmp_path, "faultless", arrays={"details": faultless})])) == []


# ---------------------------------------------------------------- all together


def test_what_the_measures_keep_is_what_the_figures_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (60, 1, 4, 4), generator=generator, dtype=torch.uint8), torch.arange(60) % 4
    examples = Examples(x, y)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    info = SimpleNamespace(pixels=SimpleNamespace(normalise=lambda images: images.float() / 255))
    kept = kept_details(Subject(model, info, {"validation": examples, "test": examples}))
    states = spectra_arrays(x.flatten(1).float(), y)
    arrays = {"details": kept, "spectra": states}
    arrays = {kind: {name: a.numpy() for name, a in named.items()} for kind, named in arrays.items()}
    experiment = experiment_of([write_run(tmp_path, arrays=arrays)])
    plots = [plot for make in (reliability_plots, spectra_plots, confusion_plots) for plot in make(experiment)]
    assert len(check_plots(plots)) == 2 + 4 + 1
    with torch.no_grad():
        logits = model(x.float() / 255).double()
    predicted = logits.argmax(1)
    assert f"{100 * (predicted == y).double().mean():.1f} % of the predictions are right." in plots[-1].alt
    assert f"ECE of all seeds together: none {100 * calibration_error(logits, y):.2f} %" in plots[0].alt
    (found,) = mistakes(experiment)
    first = found.mistakes[0]
    shown = Image.open(io.BytesIO(base64.b64decode(first.image)))
    assert np.array_equal(np.asarray(shown), x[first.index, 0].numpy())
    assert (first.true, first.predicted) == (str(int(y[first.index])), str(int(predicted[first.index])))


def test_a_method_looks_the_same_in_all_figures(tmp_path):
    results = []
    for place in range(SERIES + 2):
        arrays = {"details": details(*predictions(place)), "spectra": spectra(place)}
        keys = {"arrays": arrays, "log": log_lines([5.0, 4.0]), "measured": {"noise_0.1_accuracy": 80.0}}
        train = mixing_log([0.5] * 20, {"input": 20})
        results.append(write_run(tmp_path, f"m{place} {EVIL}", place % 2, train=train, **keys))
    experiment = experiment_of(results)
    makers = (curve_plots, reliability_plots, strength_plots, spectra_plots, mixing_plots, confusion_plots)
    plots = check_plots([plot for make in makers for plot in make(experiment)])
    assert len(plots) == 3 + 2 + 1 + 4 + 2 + SERIES + 2
    for index in range(SERIES + 2):
        lines = [
            trace["line"] for plot in plots for trace in traces_of(plot, index, showlegend=True) if "line" in trace
        ]
        assert len(lines) == 3 + 2 + 1 + 2 + 1
        assert {line["color"] for line in lines} == {colour_of(index)}
        assert {line["dash"] for line in lines} == {dash_of(index)}
