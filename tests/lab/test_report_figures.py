"""Curves, reliability diagrams and accuracy against strength."""

import json
import math
import re
import statistics

import numpy as np
import plotly.graph_objects as go
import pytest

from lab.report_runs import details, experiment_of, going, log_lines, write_log, write_run
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.report.figures.curves import curve_plots
from manifold_mixup.lab.report.figures.kept import band, class_names, log_axis, names_axis, spread, thinned
from manifold_mixup.lab.report.figures.reliability import reliability_plots
from manifold_mixup.lab.report.figures.strength import FAMILIES, strength_plots
from manifold_mixup.lab.report.figures.style import colour_of, dash_of

EVIL = "<script>alert(1)</script>"
OWN_TAGS = re.compile(r"</?(?:br|extra)>")


def coloured(value, key=""):
    """Style-sheet colours replaced as the page's script does, which looks at keys that end in "color" only."""
    if isinstance(value, dict):
        return {name: coloured(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [coloured(item) for item in value]
    named = key.endswith("color") and isinstance(value, str) and value.startswith("var(")
    return "#123456" if named else value


def check_plots(plots):
    """Valid for plotly, no number that JSON lacks, no markup but our own, and a method's colour in all its traces."""
    assert len({plot.key for plot in plots}) == len(plots)
    for plot in plots:
        source = json.dumps(coloured(plot.figure), allow_nan=False)
        assert "var(" not in source
        assert len(go.Figure(json.loads(source)).data) == len(plot.figure["data"])
        assert "<" not in OWN_TAGS.sub("", source)
        assert re.fullmatch(r"[A-Za-z0-9-]+", plot.key)
        assert plot.alt.endswith(".")
        assert 280 <= plot.figure["layout"]["height"] <= 340
        assert "nan" not in (plot.alt + plot.note).lower().split()
        for trace in plot.figure["data"]:
            if "legendgroup" in trace and trace["type"] != "heatmap":
                index = int(trace["legendgroup"].removeprefix("method-"))
                assert {trace[key]["color"] for key in ("line", "marker") if key in trace} == {colour_of(index)}
                assert trace.get("line", {}).get("dash", dash_of(index)) in (dash_of(index), "dot")
        groups = [trace["legendgroup"] for trace in plot.figure["data"] if trace.get("showlegend")]
        assert len(groups) == len(set(groups))
    return plots


def traces_of(plot, index, **keys):
    """The traces of a method that have these values."""
    chosen = [trace for trace in plot.figure["data"] if trace.get("legendgroup") == f"method-{index}"]
    return [trace for trace in chosen if all(trace.get(key) == value for key, value in keys.items())]


def line_of(plot, index=0):
    return traces_of(plot, index, showlegend=True)[0]


# ---------------------------------------------------------------- shared


def test_spread_is_that_of_the_standard_library_over_what_is_finite():
    rows = np.array([[1.0, math.nan, 2.0], [4.0, 3.0, math.inf], [2.5, 7.0, math.nan], [0.5, 1.0, math.nan]])
    mean, sd, count = spread(rows)
    for column in range(3):
        finite = [value for value in rows[:, column].tolist() if math.isfinite(value)]
        assert count[column] == len(finite)
        assert mean[column] == pytest.approx(statistics.fmean(finite))
        wanted = statistics.stdev(finite) if len(finite) > 1 else math.nan
        assert sd[column] == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(("count", "most", "keep"), [(5, 10, 0), (1000, 400, 0), (5000, 400, 20), (401, 400, 20)])
def test_thinning_keeps_both_ends_and_the_first_places(count, most, keep):
    places = thinned(count, most, keep).tolist()
    assert len(places) <= most
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, count - 1)
    assert places[:keep] == list(range(min(keep, count)))


def test_a_band_with_a_gap_is_two_closed_polygons(tmp_path):
    method = experiment_of([write_run(tmp_path)]).methods[0]
    nan = math.nan
    x, low = np.arange(6.0), np.array([1.0, 2.0, nan, 3.0, nan, 4.0])
    strip = band(method, x, low, np.array([5.0, 6.0, 7.0, nan, 8.0, 9.0]))
    assert strip["x"] == [0, 1, 1, 0]
    assert strip["y"] == [5, 6, 2, 1]
    strip = band(method, x, np.array([1.0, 1, nan, 2, 3, 4]), np.full(6, 9.0))
    assert strip["x"] == [0, 1, 1, 0, None, 3, 4, 5, 5, 4, 3]
    assert strip["y"] == [9, 9, 1, 1, None, 9, 9, 9, 4, 3, 2]
    assert band(method, x, np.full(6, nan), x) is None


def test_class_names_come_from_the_data_are_short_and_differ(tmp_path):
    names = ["a" * 30 + "x", "a" * 30 + "y", EVIL]
    found = class_names(experiment_of([write_run(tmp_path, classes=names)]), [0, 2])
    assert [name.name for name in found] == [names[0], EVIL]
    assert [name.tick for name in found] == ["a" * 12 + "…", "&lt;script&gt;aler…"]
    found = class_names(experiment_of([write_run(tmp_path, seed=1, classes=names)]), [0, 1])
    assert [name.tick for name in found] == ["0: " + "a" * 12 + "…", "1: " + "a" * 12 + "…"]
    assert [name.name for name in class_names(experiment_of([write_run(tmp_path, seed=2)]), [0, 7])] == ["0", "7"]
    damaged = write_run(tmp_path, seed=3, classes=names)
    (damaged.record.folder / "data.json").write_text("{")
    assert class_names(experiment_of([damaged]), [1])[0].name == "1"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.15, 3.0, "0.2 0.5 1 2"),
        (0.01, 5.0, "0.01 0.1 1"),
        (1e-9, 10.0, "1e-08 1e-06 0.0001 0.01 1"),
        (3, 4, "3 3.5 4"),
    ],
)
def test_logarithmic_ticks_are_written_out(low, high, ticks):
    axis = log_axis(low, high)
    assert axis["ticktext"] == ticks.split()
    assert axis["tickvals"] == pytest.approx([float(tick) for tick in ticks.split()])
    assert axis["range"] == pytest.approx([math.log10(low), math.log10(high)])


def test_names_without_room_side_by_side_stand_upright():
    assert names_axis(["&lt;b&gt;", "input", "layer1<br>.0"])["tickangle"] == 0
    assert names_axis([str(place) for place in range(20)])["tickangle"] == 0
    assert names_axis(["automobile"] * 5)["tickangle"] == 90


# ---------------------------------------------------------------- curves


def test_a_curve_is_the_mean_over_the_seeds_with_a_band_of_one_deviation(tmp_path):
    errors = {0: [9.0, 5.0, 4.0], 1: [8.0, 6.0, 3.0], 2: [7.0, 5.5, 2.0]}
    results = [write_run(tmp_path, EVIL, seed, log=log_lines(values)) for seed, values in errors.items()]
    plots = check_plots(curve_plots(experiment_of(results)))
    assert [plot.key for plot in plots] == ["training-loss", "validation-error", "validation-nll"]
    for plot, scale in zip(plots, (50, 1, 25), strict=True):
        columns = [[value / scale for value in column] for column in zip(*errors.values(), strict=True)]
        means, sds = [statistics.fmean(c) for c in columns], [statistics.stdev(c) for c in columns]
        line = line_of(plot)
        assert line["x"] == [1, 2, 3]
        assert line["y"] == pytest.approx(means)
        (strip,) = traces_of(plot, 0, fill="toself")
        assert strip["x"] == [1, 2, 3, 3, 2, 1]
        upper = [mean + sd for mean, sd in zip(means, sds, strict=True)]
        lower = [mean - sd for mean, sd in zip(means, sds, strict=True)]
        assert strip["y"] == pytest.approx(upper + lower[::-1])
        assert strip["fillcolor"] == colour_of(0)
        assert plot.figure["layout"]["yaxis"].get("type") is None
    assert plots[1].alt == f"Last values, mean over seeds: {EVIL} 3 ± 1 %."
    assert plots[1].note == "Mean over the seeds; the band is one standard deviation to either side."
    assert line_of(plots[1])["text"][2] == " ± 1, mean of 3 seeds"


def test_one_seed_is_a_line_alone(tmp_path):
    plots = check_plots(curve_plots(experiment_of([write_run(tmp_path, log=log_lines([3.0, 2.0]))])))
    assert [len(plot.figure["data"]) for plot in plots] == [1, 1, 1]
    assert line_of(plots[1])["y"] == [3, 2]
    assert plots[1].note == ""
    assert plots[1].alt == "Last values, mean over seeds: none 2 %."


def test_seeds_of_unequal_length_are_averaged_while_two_have_got_as_far(tmp_path):
    results = [write_run(tmp_path, log=log_lines([9.0, 7.0, 5.0, 3.0]))]
    experiment = experiment_of(results, [going(seed=1, values=[7.0, 5.0, 3.0]), going(seed=2, values=[8.0])])
    plot = check_plots(curve_plots(experiment))[1]
    assert line_of(plot)["y"] == [8, 6, 4]  # of the last step only one seed knows
    assert "2 runs that are not finished take part." in plot.note
    assert "Where not all seeds have got as far, the mean is over those that have, at least two." in plot.note


def test_a_step_that_a_seed_has_not_looked_at_is_left_out(tmp_path):
    results = [write_run(tmp_path, log=log_lines([9.0, 7.0, 5.0, 3.0]))]
    results.append(write_run(tmp_path, seed=1, log=log_lines([5.0, 1.0], every=20)))
    plot = check_plots(curve_plots(experiment_of(results)))[1]
    assert line_of(plot)["x"] == [2, 4]
    assert line_of(plot)["y"] == [6, 2]


def test_a_method_of_which_nothing_is_finished_has_its_curve(tmp_path):
    results = [write_run(tmp_path, log=log_lines([9.0, 7.0]))]
    plot = check_plots(curve_plots(experiment_of(results, [going("other", 0, [4.0])])))[1]
    assert line_of(plot, 1)["y"] == [4]
    assert line_of(plot, 1)["mode"] == "lines+markers"
    assert plot.note == "1 run that is not finished takes part."


def test_lines_without_a_finite_number_are_gaps(tmp_path):
    results = [write_run(tmp_path, log=log_lines([9.0, None, 5.0, 4.0]))]
    results.append(write_run(tmp_path, seed=1, log=log_lines([9.0, 8.0, 7.0, math.inf])))
    plot = check_plots(curve_plots(experiment_of(results)))[1]
    assert line_of(plot)["y"] == [9, None, 6, None]
    write_log(results[0].record.folder, [{"step": None, "epoch": "x", "train_loss": {}}])
    assert len(check_plots(curve_plots(experiment_of(results[:1])))) == 0


def test_runs_below_one_epoch_are_drawn_against_steps(tmp_path):
    results = [write_run(tmp_path, log=log_lines([9.0, 7.0], per_epoch=100))]
    plot = curve_plots(experiment_of(results))[0]
    assert line_of(plot)["x"] == [10, 20]
    assert plot.figure["layout"]["xaxis"]["title"]["text"] == "steps"


def test_a_wide_loss_has_a_logarithmic_axis_that_cuts_its_band(tmp_path):
    results = [write_run(tmp_path, seed=0, log=log_lines([50.0, 0.5])), write_run(tmp_path, seed=1)]
    results[1] = write_run(tmp_path / "b", seed=1, log=log_lines([50.0, 3.5]))
    loss, error, nll = check_plots(curve_plots(experiment_of(results)))
    assert error.figure["layout"]["yaxis"].get("type") is None
    for plot, scale in ((loss, 50), (nll, 25)):
        axis = plot.figure["layout"]["yaxis"]
        assert axis["type"] == "log"
        floor = 2 / scale / 2
        assert axis["range"][0] == pytest.approx(math.log10(floor))
        (strip,) = traces_of(plot, 0, fill="toself")
        assert min(strip["y"]) == pytest.approx(floor)  # mean 2, deviation 2.12: below 0
        assert "cut off" in plot.note


def test_long_logs_are_thinned(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, 3000).tolist()
    plot = curve_plots(experiment_of([write_run(tmp_path, log=log_lines(values))]))[1]
    line = line_of(plot)
    assert len(line["x"]) == 400
    assert (line["x"][0], line["x"][-1]) == (1, 3000)
    assert all(values[round(x) - 1] == y for x, y in zip(line["x"], line["y"], strict=True))


def test_without_logs_there_are_no_curves(tmp_path):
    assert curve_plots(experiment_of([write_run(tmp_path)])) == []


# ---------------------------------------------------------------- reliability


def predictions(seed, n=200, classes=3):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.4), n)
    y = np.array([rng.choice(classes, p=row) for row in probabilities**0.5 / (probabilities**0.5).sum(1)[:, None]])
    return probabilities, y


def pooled_bins(parts):
    """Mean confidence and accuracy in % of the non-empty of 15 bins, and the ECE, from the examples themselves."""
    bins = {}
    for probabilities, y in parts:
        for row, true in zip(probabilities, y, strict=True):
            bins.setdefault(math.ceil(row.max() * 15), []).append((row.max(), row.argmax() == true))
    n = sum(map(len, bins.values()))
    points = [tuple(100 * statistics.fmean(part) for part in zip(*bins[b], strict=True)) for b in sorted(bins)]
    sizes = [len(bins[b]) for b in sorted(bins)]
    return points, sizes, sum(size / n * abs(c - a) for (c, a), size in zip(points, sizes, strict=True))


def test_reliability_pools_the_examples_of_all_seeds(tmp_path):
    parts = [predictions(seed) for seed in range(3)]
    results = [write_run(tmp_path, EVIL, s, arrays={"details": details(*part)}) for s, part in enumerate(parts)]
    before, after = check_plots(reliability_plots(experiment_of(results)))
    scaled = [(p**0.5 / (p**0.5).sum(axis=1, keepdims=True), y) for p, y in parts]
    for plot, own in ((before, parts), (after, scaled)):
        points, sizes, ece = pooled_bins(own)
        line = line_of(plot)
        assert line["x"] == pytest.approx([confidence for confidence, _ in points])
        assert line["y"] == pytest.approx([accuracy for _, accuracy in points])
        assert [int(text.split()[0]) for text in line["text"]] == sizes
        assert f"ECE of all seeds together: {ece:.2f} %" in line["hovertemplate"]
        assert f"ECE of all seeds together: {EVIL} {ece:.2f} %" in plot.alt
        order = np.argsort(sizes, kind="stable")
        assert (np.diff(np.array(line["marker"]["size"])[order]) >= 0).all()
        diagonal = plot.figure["data"][0]
        assert (diagonal["x"], diagonal["y"]) == ([0, 100], [0, 100])
        assert "legendgroup" not in diagonal
    assert "too sure" in before.alt
    assert f"Temperatures, chosen on the validation split: {EVIL} 2 ± 0." in after.note


def test_methods_without_scaled_probabilities_are_in_the_first_diagram_only(tmp_path):
    plain = details(*predictions(0))
    del plain["reliability_scaled"], plain["temperature"]
    results = [write_run(tmp_path, "plain", arrays={"details": plain}), write_run(tmp_path, "none")]
    assert [plot.key for plot in check_plots(reliability_plots(experiment_of(results)))] == ["reliability"]
    scaled = {**details(*predictions(1)), "temperature": np.array(math.nan)}
    results.append(write_run(tmp_path, "scaled", arrays={"details": scaled}))
    before, after = check_plots(reliability_plots(experiment_of(results)))
    assert [trace["name"] for trace in before.figure["data"][1:]] == ["plain", "scaled"]
    assert [trace["name"] for trace in after.figure["data"][1:]] == ["scaled"]
    assert "Temperatures" not in after.note


def test_empty_damaged_and_other_arrays_are_left_out_of_the_diagram(tmp_path):
    good = details(*predictions(0))
    lost = {**good, "reliability": np.full((15, 3), np.nan), "reliability_scaled": np.zeros((15, 3))}
    other = {**good, "reliability": np.zeros((10, 3))}
    results = [write_run(tmp_path, "lost", arrays={"details": lost})]
    assert reliability_plots(experiment_of(results)) == []
    results += [write_run(tmp_path, "good", seed, arrays={"details": a}) for seed, a in enumerate((good, other, good))]
    (results[-1].record.folder / "details.safetensors").write_bytes(b"nonsense")
    before, _ = check_plots(reliability_plots(experiment_of(results)))
    assert [trace["name"] for trace in before.figure["data"][1:]] == ["good"]
    assert sum(int(text.split()[0]) for text in line_of(before, 1)["text"]) == 200
    assert "Seed 1 of good is left out: its details are of another shape." in before.note
    assert "Seed 2 of good is left out: " in before.note


# ---------------------------------------------------------------- strength


def test_the_patterns_are_those_that_the_measures_register():
    for family in FAMILIES:
        assert family.pattern in MEASURES[family.measure].metrics
    with_number = {
        pattern
        for measure in MEASURES.values()
        for pattern in measure.metrics
        if "(" in pattern and pattern.endswith("_accuracy")
    }
    missing = with_number - {family.pattern for family in FAMILIES}
    assert not {pattern for pattern in missing if not pattern.startswith("knn")}


def test_accuracy_against_strength_starts_at_the_clean_accuracy(tmp_path):
    results = [
        write_run(
            tmp_path,
            EVIL,
            seed,
            metrics={"test_error": 4.0 + seed},
            measured={f"rotation_{s}_accuracy": 90.0 - s - 3 * seed for s in (5, 20, 2.5)} if seed < 3 else None,
        )
        for seed in range(4)
    ]
    (plot,) = check_plots(strength_plots(experiment_of(results)))
    assert (plot.key, plot.title) == ("rotation", "Rotated test images")
    line = line_of(plot)
    assert line["x"] == [0, 2.5, 5, 20]
    assert line["y"] == pytest.approx([95, 84.5, 82, 67])  # the clean one of the three seeds that were rotated
    assert line["error_y"]["array"] == pytest.approx([1, 3, 3, 3])
    assert line["marker"]["symbol"] == ["circle"] * 4
    assert plot.alt == f"Mean accuracy in % by largest angle, °. {EVIL}: 95.0 at 0, 84.5 at 2.5, 82.0 at 5, 67.0 at 20."
    assert plot.note == "Mean over the seeds; the bars are one standard deviation to either side."


def test_every_family_and_every_number_of_steps_has_its_figure(tmp_path):
    names = "shear_57.3 zoom_80 zoom_120 noise_0.1 noise_1e-05 fgsm_4 fgsm_normalised_0.03 pgd7_8 pgd20_8 pgd20_4"
    measured = {f"{name}_accuracy": 50.0 for name in names.split()} | {"noise_0.1_nll": 1.0, "fgsm_1.2.3_accuracy": 1.0}
    plots = check_plots(strength_plots(experiment_of([write_run(tmp_path, measured=measured)])))
    assert {plot.key: line_of(plot)["x"] for plot in plots} == {
        "shear": [0, 57.3],
        "zoom": [80, 100, 120],
        "noise": [0, 1e-05, 0.1],
        "fgsm": [0, 4],
        "fgsm-normalised": [0, 0.03],
        "pgd7": [0, 8],
        "pgd20": [0, 4, 8],
    }
    assert all("error_y" not in line_of(plot) for plot in plots)
    assert all(plot.note == "" for plot in plots)


def test_a_clean_accuracy_on_other_examples_is_an_open_marker(tmp_path):
    measured, measures = {"fgsm_4_accuracy": 50.0}, {"fgsm": {"examples": 1000}}
    results = [write_run(tmp_path, "some", measured=measured, measures=measures)]
    results.append(write_run(tmp_path, "all", measured=measured, measures={"fgsm": {"examples": None}}))
    (plot,) = check_plots(strength_plots(experiment_of(results)))
    assert line_of(plot, 0)["marker"]["symbol"] == ["circle-open", "circle"]
    assert line_of(plot, 1)["marker"]["symbol"] == ["circle", "circle"]
    assert "measured on its first 1000 examples" in plot.note


def test_strengths_without_a_number_are_left_out(tmp_path):
    only = {"metrics": {"test_nll": 1.0}}
    one = experiment_of([write_run(tmp_path, "one", measured={"noise_0.1_accuracy": 9.0}, **only)])
    assert strength_plots(one) == []  # one strength, and no clean accuracy
    lost = [write_run(tmp_path, "lost", measured={"noise_0.1_accuracy": None, "noise_0.2_accuracy": 8.0})]
    lost.append(write_run(tmp_path, "never"))
    (plot,) = check_plots(strength_plots(experiment_of(lost)))
    assert line_of(plot)["y"] == [97, None, 8]
    assert [trace["name"] for trace in plot.figure["data"]] == ["lost"]
    own = [write_run(tmp_path, "own", measured={"rotation_0_accuracy": 91.0, "rotation_9_accuracy": 80.0})]
    assert line_of(strength_plots(experiment_of(own))[0])["y"] == [91, 80]
