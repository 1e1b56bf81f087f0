"""A study of one small experiment, from its TOML to tables and verdicts; and the studies that come with the package."""

import json
import re

import pytest

from lab.test_cli import RECIPE, call  # noqa: F401  the fixture
from manifold_mixup.lab import recipe as recipes
from manifold_mixup.lab import studies
from manifold_mixup.lab.errors import RecipeError, StorageError, UnknownName, UsageError
from manifold_mixup.lab.experiment import Settings
from manifold_mixup.lab.recipe import read_recipe, recipe_files
from manifold_mixup.lab.reproduce import cost_of, gather, plan, reproduce, stand
from manifold_mixup.lab.results import by_seed, public_command, read_folder, read_lines, write_lines
from manifold_mixup.lab.side_by_side import as_markdown, panel_grid, verdicts
from manifold_mixup.lab.studies import load_study, study_files

STUDY = """
title = "Table 0"
source = "nobody"
note = '''two
lines'''
[[panels]]
title = "digits, MLP"
recipes = { desk = "small", full = "small" }
published = { table = "table1", dataset = "CIFAR-10", network = "PreActResNet18" }
measures = { desk = ["knn:k=1+3"] }
columns = [
  { metric = "test_error", published = "test_error", complement = true },
  { metric = "test_nll" },
]
rows = [
  { label = "none", published = { method = "none" } },
  { label = "hidden only", published = { method = "manifold_mixup", alpha = 2.0 } },
  { label = "cited", published = { method = "adamixup" } },
]
claims = [{ better = "hidden only", than = "none", metrics = ["test_error", "test_nll"] }]
[[panels]]
title = "another"
recipes = { full = "small" }
columns = [{ metric = "test_error" }]
rows = [{ label = "none" }]
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "small.toml").write_text("# Small.\n#\n# Cost: 4 runs of\n# nothing.\n# More.\n" + RECIPE)
    monkeypatch.setattr(recipes, "RECIPES", folder)
    others = tmp_path / "studies"
    others.mkdir()
    (others / "table0.toml").write_text(STUDY)
    monkeypatch.setattr(studies, "STUDIES", others)
    return load_study("table0")


def test_a_study_is_run_measured_shown_and_never_run_twice(study, tmp_path):
    settings = Settings(tmp_path / "runs", command="manifold-mixup reproduce table0")
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", settings)
    first, second = pieces
    assert (len(first.results), first.trouble, second.config) == (4, "", None)
    assert all(r.measured and set(r.measures) == {"knn"} for r in first.results)
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")}
    again = plan(study, "desk")
    reproduce(again, "desk", settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")} == records
    assert again[0].results == first.results


def test_a_run_that_cannot_be_measured_is_named_and_the_others_are_measured(study, tmp_path):
    reproduce(plan(study, "desk", settings=["seeds=[0]"]), "desk", Settings(tmp_path))
    folder = tmp_path / "small" / "none" / "seed-0"
    (folder / "evaluations.jsonl").unlink()
    (folder / "model.safetensors").unlink()
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    assert pieces[0].trouble.startswith("1 runs could not be measured; the first: none, seed 0: ")
    assert "holds no model.safetensors" in pieces[0].trouble
    measured = {(r.record.label, r.record.seed): set(r.measures) for r in pieces[0].results}
    assert measured.pop(("none", 0)) == set()
    assert list(measured.values()) == [{"knn"}] * 3


def test_published_and_ours_stand_side_by_side(study, tmp_path):
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    grid = panel_grid(pieces[0].panel, pieces[0].results, "desk")
    assert grid.head == [
        "method",
        "test accuracy (%), published",
        "test accuracy (%), desk",
        "test NLL (nats), desk",
        "runs",
    ]
    none = by_seed(pieces[0].results, "none", "test_error")
    mean = 100 - sum(none.values()) / 2
    assert grid.rows[0][0] == "none"
    assert grid.rows[0][1] == "4.83 ± 0.066"  # what the stand-in of this test published
    assert grid.rows[0][2].startswith(f"{mean:.2f} ± ")
    assert grid.rows[2] == ["cited", "3.52", "-", "-", "0"]
    assert as_markdown(grid).splitlines()[2].startswith("| none | 4.83 ± 0.066 | ")
    found = verdicts(pieces[0].panel, pieces[0].results)
    assert [v.claim for v in found] == [
        "digits, MLP, test error: hidden only is lower than none",
        "digits, MLP, test NLL: hidden only is lower than none",
    ]
    assert found[1].difference.n == 2


def test_a_ratio_is_taken_seed_by_seed_and_of_the_published_numbers(study, tmp_path):
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    ratio = pieces[0].panel.columns[0].model_copy(update={"relative": True, "complement": False})
    panel = pieces[0].panel.model_copy(update={"columns": [ratio]})
    grid = panel_grid(panel, pieces[0].results, "desk")
    base, other = (by_seed(pieces[0].results, label, "test_error") for label in ("none", "hidden only"))
    ratios = [other[seed] / base[seed] for seed in base]
    assert grid.rows[0][1:3] == ["1.00", "1.00 ± 0.00"]
    assert grid.rows[1][1] == f"{2.95 / 4.83:.2f}"
    assert grid.rows[1][2].startswith(f"{sum(ratios) / 2:.2f} ± ")


def test_only_and_seeds_choose(study, tmp_path):
    (piece,) = plan(study, "desk", only=["digits", "none"], seeds="4,5")
    assert [m.label for m in piece.config.methods] == ["none"]
    assert piece.config.seeds == [4, 5]
    assert piece.panel.claims == []
    assert [p.panel.title for p in plan(study, "full", only=["small"])] == ["digits, MLP", "another"]
    with pytest.raises(UsageError, match="'wrong' fits nothing in study 'table0'; there is"):
        plan(study, "desk", only=["wrong"])


def test_runs_of_another_configuration_are_not_shown(study, tmp_path):
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    other = plan(study, "desk", settings=["train.lr=0.5"])[0]
    gather(other, tmp_path)
    assert (len(pieces[0].results), other.results) == (4, [])


def test_data_that_cannot_be_had_leave_the_published_numbers_and_a_reason(study, tmp_path, monkeypatch):
    from manifold_mixup.lab import reproduce as module

    def no_data(*arguments):
        raise StorageError(tmp_path, OSError("the data are not here"), "download")

    monkeypatch.setattr(module, "prepare_data", no_data)
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    assert (pieces[0].trouble, pieces[0].results) == (f"cannot download {tmp_path}: the data are not here", [])
    assert panel_grid(pieces[0].panel, [], "desk").rows[0][1:3] == ["4.83 ± 0.066", "-"]
    assert {v.outcome for v in verdicts(pieces[0].panel, [])} == {"not run"}


def test_finished_runs_are_shown_without_their_data(study, tmp_path, monkeypatch):
    from manifold_mixup.lab import reproduce as module

    reproduce(plan(study, "desk"), "desk", Settings(tmp_path))
    monkeypatch.setattr(module, "prepare_data", lambda *arguments: pytest.fail("the data were asked for"))
    pieces = plan(study, "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    assert (len(pieces[0].results), pieces[0].trouble) == (4, "")


def test_lines_hold_what_the_folders_do_without_places(study, tmp_path):
    pieces = plan(study, "desk")
    reproduce(
        pieces, "desk", Settings(tmp_path / "runs", command=f"manifold-mixup compare --runs {tmp_path} --data-dir=/x y")
    )
    write_lines(pieces[0].results, tmp_path / "small.jsonl")
    assert str(tmp_path) not in (tmp_path / "small.jsonl").read_text()
    back = read_lines(tmp_path / "small.jsonl")
    assert [b.measured for b in back] == [dict(r.measured) for r in pieces[0].results]
    assert [b.record.metrics for b in back] == [r.record.metrics for r in pieces[0].results]
    assert {b.record.command for b in back} == {"manifold-mixup compare --runs RUNS --data-dir=DIR y"}
    shown = plan(study, "desk")[0]
    gather(shown, tmp_path)  # a folder of lines in place of a folder of runs
    assert len(shown.results) == 4
    assert len(read_folder(tmp_path / "runs", "small")) == 4


def test_how_far_a_study_has_come(study, tmp_path):
    assert cost_of("small") == "4 runs of nothing."
    assert stand(study, tmp_path) == [
        ("full", 0, 6, 0.0, "4 runs of nothing."),
        ("desk", 0, 4, 0.0, "4 runs of nothing."),
    ]
    pieces = plan(study, "desk", seeds="0,")
    reproduce(pieces, "desk", Settings(tmp_path))
    assert [(scale, done) for scale, done, *_ in stand(study, tmp_path)] == [("full", 3), ("desk", 2)]


def test_the_command_prints_and_its_json_is_lines(study, tmp_path, call):  # noqa: F811
    code, out, err = call("reproduce", "table0", "--scale", "desk", "--runs", tmp_path, "--quiet", "--jobs", 1)
    assert (code, err) == (0, "")
    assert "4.83 ± 0.066" in out
    assert re.search(r"Of 2 claims \d hold, \d do not hold, \d our runs cannot decide\.", out)
    code, out, _ = call("reproduce", "table0", "--scale", "desk", "--runs", tmp_path, "--show", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [set(line) >= {"claim", "outcome"} for line in lines] == [False] * 4 + [True] * 2
    code, out, _ = call("reproduce", "table0", "--scale", "desk", "--runs", tmp_path, "--show", "--markdown")
    assert out.startswith("# Table 0\n\ntwo lines\n\n## digits, MLP (desk: small)\n\n| method |")
    code, out, _ = call("reproduce", "--list", "--runs", tmp_path)
    assert "4 of 4 runs" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to reproduce"),
        (["table00"], "unknown study 'table00': did you mean 'table0'"),
        (["table0", "--scale", "huge"], "--scale 'huge' should be full, short, desk"),
        (["table0", "--scale", "short"], "has nothing of scale 'short'"),
        (["table0"], "scale 'full' is for a GPU, and here is none"),
        (["table0", "--gpus-per-run", "0.5"], "--gpus-per-run is read by --executor ray only"),
        (["table0", "--ray-address", "auto"], "--ray-address is read by --executor ray only"),
    ],
)
def test_bad_calls_are_named(study, tmp_path, call, arguments, message, monkeypatch):  # noqa: F811
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = call("reproduce", *arguments, "--runs", tmp_path)
    assert (code, out, list(tmp_path.glob("small"))) == (2, "", [])
    assert message in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('better = "hidden only"', 'better = "x"'), "no row is labelled 'x'"),
        (('"test_nll"] }', '"test_ece"] }'), "no column shows 'test_ece'"),
        (('method = "adamixup"', 'method = "y"'), "no published number has {'method': 'y'} of 'cited'"),
        (('title = "another"', 'titel = "another"'), "unknown key"),
        (("[[panels]]", "[[panels"), "it is no TOML"),
    ],
)
def test_mistakes_in_a_study_are_named(study, tmp_path, change, message):
    (tmp_path / "studies" / "bad.toml").write_text(STUDY.replace(*change))
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_study("bad")
    with pytest.raises(UnknownName):
        load_study("nothing")


def test_places_of_a_machine_leave_a_command():
    assert public_command("manifold-mixup demo") == "manifold-mixup demo"
    assert public_command("m --data-dir '/a b' --seeds 3") == "m --data-dir DIR --seeds 3"


# ---------------------------------------------------------------- the studies of the package


BEST = """
title = "Table 0"
source = "nobody"
[[panels]]
title = "digits, MLP"
recipes = { desk = "small" }
columns = [
  { metric = "test_error", complement = true, weights = "best" },
  { metric = "test_error", complement = true },
]
rows = [{ label = "none" }, { label = "hidden only" }]
claims = [{ better = "hidden only", than = "none", metrics = ["test_error"], weights = "best" }]
"""


def test_a_column_and_a_claim_can_be_of_the_weights_that_were_best_on_validation_data(study, tmp_path):
    (studies.STUDIES / "table0.toml").write_text(BEST)
    pieces = plan(load_study("table0"), "desk")
    reproduce(pieces, "desk", Settings(tmp_path))
    panel, results = pieces[0].panel, pieces[0].results
    grid = panel_grid(panel, results, "desk")
    assert grid.head[1:3] == ["test accuracy, best on validation (%), desk", "test accuracy (%), desk"]
    for row, label in zip(grid.rows, ("none", "hidden only"), strict=True):
        for cell, weights in zip(row[1:3], ("best", "metrics"), strict=True):
            errors = [getattr(r.record, weights)["test_error"] for r in results if r.record.label == label]
            assert cell.split(" ± ")[0] == f"{100 - sum(errors) / len(errors):.2f}"
    (verdict,) = verdicts(panel, results)
    assert verdict.claim == "digits, MLP, test error, best on validation: hidden only is lower than none"
    own = [by_seed(results, label, "test_error", "best") for label in ("hidden only", "none")]
    differences = [own[0][seed] - own[1][seed] for seed in own[0]]
    assert verdict.difference.mean == pytest.approx(sum(differences) / len(differences))


def test_a_claim_about_weights_that_no_column_shows_is_named(study):
    (studies.STUDIES / "table0.toml").write_text(
        BEST.replace('complement = true, weights = "best"', "complement = true")
    )
    with pytest.raises(RecipeError, match="no column shows 'test_error' of the best weights"):
        load_study("table0")


@pytest.mark.parametrize("name", study_files())
def test_every_study_is_whole(name):
    study = load_study(name)
    for panel in study.panels:
        for scale, recipe in panel.recipes.items():
            assert recipe in recipe_files(), f"{name}: no recipe {recipe}"
            assert recipe.endswith(f"_{scale}") or panel.recipes.get("desk", recipe) == recipe
            assert cost_of(recipe), f"{recipe} does not say its cost"
            labels = {m.get("label", m["name"]) for m in read_recipe(recipe)[0]["methods"]}
            assert len(labels & {row.label for row in panel.rows}) >= 1
        if "desk" in panel.recipes and panel.measures:
            assert set(panel.measures) >= set(panel.recipes)


def test_the_papers_tables_are_all_there():
    tables = {"table1", "table2", "table3", "table4", "table5", "table6", "table9", "fgsm"}
    others = {"regularisers", "blocked-gradient", "knn", "svd-mnist", "few-labels", "semi-supervised", "graphmix"}
    assert set(study_files()) == tables | others


def test_every_published_number_of_the_papers_tables_is_shown_by_a_study():
    from manifold_mixup.lab.published import read_published

    shown = {
        (p.source, p.table, p.dataset, p.network, p.method, p.alpha, str(p.layers), p.epochs, p.metric)
        for name in study_files()
        for panel in load_study(name).panels
        for p in panel.twins()
    }
    left_out = [
        (p.table, p.method, p.metric, p.network)
        for p in read_published()
        if p.source.startswith("Verma")
        and p.table not in {"svd_bottleneck", "appendixD", "iclr_table1", "iclr_table3"}
        and (p.source, p.table, p.dataset, p.network, p.method, p.alpha, str(p.layers), p.epochs, p.metric) not in shown
    ]
    assert left_out == []
