"""Published numbers beside ours, the claims that runs can decide, and what to cite."""

import pytest

from lab.report_runs import experiment_of
from lab.reporting import EVIL, page, run, runs
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.published import find_published, read_published
from manifold_mixup.lab.report.beside import bibtex, claims, published_grids, published_twins
from manifold_mixup.lab.side_by_side import printed
from manifold_mixup.lab.studies import load_study, study_files

TABLE = {"table": "table1", "dataset": "CIFAR-10", "network": "PreActResNet18"}
ROWS = {
    "none": {"method": "none"},
    "adamixup": {"method": "adamixup"},
    "input mixup": {"method": "input_mixup", "alpha": 1.0},
    "manifold mixup": {"method": "manifold_mixup", "alpha": 2.0},
}


def desk(results=None, model="preact_resnet18"):
    """An experiment by the name of the recipe that repeats Table 1."""
    results = results or [("none", [5.0, 5.2, 5.1])]
    return experiment_of([r for label, v in results for r in runs(label, v, experiment="cifar10_desk", model=model)])


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize("model", ["preact_resnet18", "PreActResNet18", "preact-resnet-18"])
def test_the_twins_are_the_numbers_of_the_published_table(model):
    expected = {}
    for label, keys in ROWS.items():
        for metric in ("test_error", "test_nll"):
            if (entry := find_published({**TABLE, **keys, "metric": metric})) is not None:
                expected[label, metric] = printed(entry)
    found = published_twins(desk(model=model))
    assert found.items() >= expected.items()
    assert {label for label, _ in expected} == set(ROWS)
    others = {key: value for key, value in found.items() if key not in expected}
    for (_, metric), text in others.items():  # of the other tables that this recipe repeats
        assert metric in ("fgsm_8_accuracy", "knn_error", "test_error")
        value = float(text.split(" ± ")[0])
        assert any(e.value == value and e.network == "PreActResNet18" for e in read_published())
    assert not any("cited" in label for label, _ in found), "a number without a network is nobody's twin"
    entry = find_published({**TABLE, "method": "none", "metric": "test_error"})
    assert float(found["none", "test_error"].split(" ± ")[0]) == entry.value


@pytest.mark.parametrize("model", ["preact_resnet34", "resnet18", "preact_resnet18_quarter", ""])
def test_another_network_has_no_twins(model):
    assert published_twins(desk(model=model)) == {}


def test_a_table_whose_rows_share_no_network_key_has_twins_as_well():
    where = {"dataset": "CIFAR-10", "network": "PreActResNet50", "method": "dropout", "metric": "test_error"}
    for model, there in (("preact_resnet50", True), ("preact_resnet18", False)):
        found = published_twins(experiment_of(runs("none", [5.0], experiment="cifar10_preact50_full", model=model)))
        assert found.get(("dropout", "test_error")) == (printed(find_published(where)) if there else None)


def test_an_experiment_that_repeats_nothing_has_nothing_beside_it():
    experiment = experiment_of(runs("none", [3.0]))
    assert (published_twins(experiment), published_grids(experiment), claims(experiment)) == ({}, [], [])


@pytest.mark.parametrize("model", ["preact_resnet18", "preact_resnet34"])
def test_the_published_table_stands_beside_ours_whatever_the_network(model):
    found = published_grids(desk(model=model))
    (grid,) = [grid for source, grid in found if "Table 1" in source and grid.rows[1][0] == "adamixup"]
    (row,) = [row for row in grid.rows if row[0] == "none"]
    entry = find_published({**TABLE, "method": "none", "metric": "test_error"})
    assert row[1:3] == [printed(entry), "5.10 ± 0.10"]
    assert row[-1] == "3"


def test_the_page_has_the_published_table_and_the_numbers_in_its_own(tmp_path):
    found = page(tmp_path, runs("none", [5.0], experiment="cifar10_desk", model="preact_resnet18"))
    text = printed(find_published({**TABLE, "method": "none", "metric": "test_error"}))
    assert f"published {text}" in found.words
    assert "Published numbers" in found.words
    assert "Verma et al. 2019 (arXiv 1806.05236v7), Table 1" in found.words
    assert [attrs for _, attrs in found.tags if attrs.get("href") == "#experiment-1-published"]


# ---------------------------------------------------------------- claims


def decidable(*labels):
    """Better and worse method of every claim on the test error, panel by panel, of which both methods were run."""
    panels = [p for name in study_files() for p in load_study(name).panels if "cifar10_desk" in p.recipes.values()]
    said = [(p.title, c.better, c.than) for p in panels for c in p.claims if "test_error" in c.metrics]
    return [claim for claim in dict.fromkeys(said) if {*claim[1:]} <= {*labels}]


def test_claims_about_methods_that_were_not_run_are_left_out():
    assert claims(desk()) == []
    low, middle, high = [3.0, 3.3, 3.1], [4.0, 4.1, 4.3], [5.0, 5.2, 5.1]
    for errors in (
        {"none": high, "manifold mixup": low},
        {"none": low, "manifold mixup": high},
        {"none": high, "input mixup": middle, "manifold mixup": low},
        {"none": high, "input mixup": low, "manifold mixup": middle},
    ):
        found = claims(desk(list(errors.items())))
        said = decidable(*errors)
        assert len(found) == len(said) >= len(errors) - 1
        for verdict, (title, better, than) in zip(found, said, strict=True):
            assert verdict.claim == f"{title}, test error: {better} is lower than {than}"
            assert verdict.outcome == ("holds" if errors[better] < errors[than] else "does not hold")


def test_a_difference_that_may_be_chance_decides_nothing():
    found = claims(desk([("none", [5.0, 5.2, 5.1]), ("manifold mixup", [5.1, 5.0, 5.2])]))
    assert {verdict.outcome for verdict in found} == {"undecided"}


def test_the_page_says_the_claims_in_a_table_and_in_numbers(tmp_path):
    keys = {"experiment": "cifar10_desk", "model": "preact_resnet18"}
    found = page(tmp_path, runs("none", [5.0, 5.2, 5.1], **keys) + runs("manifold mixup", [3.0, 3.3, 3.1], **keys))
    said = decidable("none", "manifold mixup")
    assert f"Of {len(said)} claims {len(said)} hold, 0 do not hold, 0 our runs cannot decide." in found.words
    cells = [" ".join(cell.split()) for cell in found.cells]
    for title, better, than in said:
        at = cells.index(f"{title}, test error: {better} is lower than {than}")
        assert cells[at + 1] == "holds"
    assert "Claims of the source" not in page(tmp_path, runs("none", [5.0], **keys)).words


# ---------------------------------------------------------------- what to cite


def entries(text):
    """Kind, key and fields of every entry, read as BibTeX does: a field ends where its braces close.

    Braces count whether or not a backslash stands before them, and nothing may stand between entries.
    """
    found, at = [], 0

    def braced():
        nonlocal at
        assert text[at] == "{", f"no brace at {text[at : at + 20]!r}"
        start, depth = at, 0
        while True:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
            if depth == 0:
                return text[start + 1 : at - 1]

    while text[at:].strip():
        assert text[at:].lstrip()[0] == "@", f"no entry at {text[at : at + 20]!r}"
        start = text.index("@", at)
        at = text.index("{", start)
        kind, body = text[start + 1 : at], braced()
        key, _, rest = body.partition(",")
        found.append((kind, key, fields_of(rest)))
    return found


def fields_of(rest):
    """Name to value; each value in braces, each field ended by a comma."""
    fields = {}
    while rest.strip():
        name, _, rest = rest.partition("=")
        rest, depth, end = rest.strip(), 1, 0
        assert rest[0] == "{"
        while depth:
            end += 1
            depth += {"{": 1, "}": -1}.get(rest[end], 0)
        assert rest[end + 1] == ","
        assert name.strip() not in fields
        fields[name.strip()] = rest[1:end]
        rest = rest[end + 2 :]
    return fields


def cited(*results, version="1.2.3"):
    return entries(bibtex([experiment_of(list(results))], version))


def test_the_paper_and_the_software_are_cited():
    results = [
        run("none", seed, date=f"20{25 + seed}-03-04T00:00:00+00:00", versions={"commit": commit, "torch": "2"})
        for seed, commit in ((0, "abc"), (1, "def"), (2, "abc"))
    ]
    paper, software = cited(*results)
    assert paper[:2] == ("inproceedings", "verma2019manifold")
    assert paper[2]["title"] == "Manifold Mixup: Better Representations by Interpolating Hidden States"
    assert len(paper[2]["author"].split(" and ")) == 8
    assert paper[2]["year"] == "2019"
    assert software[:2] == ("misc", "manifold-mixup-software")
    assert software[2]["note"] == "version 1.2.3, commit abc and def; experiments: digits (3 runs)"
    assert software[2]["year"] == "2027"


@pytest.mark.parametrize("date", ["", "soon", "25-01-01"])
def test_a_record_without_a_year_gives_none(date):
    assert "year" not in cited(run("none", date=date))[1][2]


def test_the_source_of_every_other_method_is_cited_once():
    results = [run(name, seed, method=name) for name in [*METHODS, "unknown method"] for seed in (0, 1)]
    found = cited(*results, run("another label", method="cutmix"))[2:]
    assert len({key for _, key, _ in found}) == len(found)
    papers = {name: m for name, m in METHODS.items() if any(c.isdigit() for c in m.source)}
    papers = {name: m for name, m in papers.items() if name not in ("none", "manifold_mixup")}
    assert "cutmix" in papers
    assert [(kind, key) for kind, key, _ in found] == [("misc", f"method-{n.replace('_', '-')}") for n in papers]
    for (_, _, fields), method in zip(found, papers.values(), strict=True):
        assert unescaped(fields["note"]) == " ".join(method.source.split())
        assert unescaped(fields["title"]) == method.title


def unescaped(value):
    for character in "&%$#_":
        value = value.replace(f"\\{character}", character)
    return value


@pytest.mark.parametrize(
    "evil", ["}", "{", "}{", "{}}{", "}}{{", "{a}", "\\}", "}, year = {1}", "@misc{x,", "\n\n@x{", EVIL]
)
def test_no_name_breaks_the_braces(evil):
    result = run("none", experiment=f"name{evil}", versions={"commit": f"commit{evil}"}, method=f"method{evil}")
    found = cited(result, version=f"1{evil}")
    assert [key for _, key, _ in found] == ["verma2019manifold", "manifold-mixup-software"]
    assert set(found[1][2]) == {"title", "year", "note"}
    assert found[1][2]["year"] == "2026"
    assert found[1][2]["note"].startswith("version 1")
    assert found[1][2]["note"].endswith("(1 runs)")


@pytest.mark.parametrize("character", "&%$#_")
def test_what_latex_reads_is_escaped_once(character):
    note = cited(run("none", experiment=f"a{character}b \\{character}"))[1][2]["note"]
    assert f"a\\{character}b \\{character}" in note


def test_the_page_carries_the_entries_for_its_buttons(tmp_path):
    results = runs("none", [3.0]) + runs("cut", [2.0], method="cutmix")
    found = page(tmp_path, results)
    assert ("pre", {"id": "bibtex", "hidden": None}) in found.tags
    for line in bibtex([experiment_of(results)], "x").splitlines():
        if line.startswith("@"):
            assert line in found.words
    assert METHODS["cutmix"].title in found.words
    assert [a for tag, a in found.tags if tag == "button" and a.get("data-copy-from") == "bibtex"]
