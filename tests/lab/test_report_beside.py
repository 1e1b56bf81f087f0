"""Published numbers beside ours, the claims that runs can decide, and what to cite."""

import pytest

from lab.report_runs import experiment_of
from lab.reporting import EVIL, page, run, runs
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.published import find_published
from manifold_mixup.lab.report.beside import bibtex, claims, published_grids, published_twins
from manifold_mixup.lab.side_by_side import printed

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
    assert found == expected
    assert {label for label, _ in found} == set(ROWS)
    entry = find_published({**TABLE, "method": "none", "metric": "test_error"})
    assert float(found["none", "test_error"].split(" ± ")[0]) == entry.value


@pytest.mark.parametrize("model", ["preact_resnet34", "resnet18", "preact_resnet18_quarter", ""])
def test_another_network_has_no_twins(model):
    assert published_twins(desk(model=model)) == {}


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
    found = page(tmp_path, desk_results := runs("none", [5.0], experiment="cifar10_desk", model="preact_resnet18"))
    text = printed(find_published({**TABLE, "method": "none", "metric": "test_error"}))
    assert f"published {text}" in found.words
    assert "Published numbers" in found.words
    assert "Verma et al. 2019 (arXiv 1806.05236v7), Table 1" in found.words
    assert [attrs for _, attrs in found.tags if attrs.get("href") == "#experiment-1-published"]
    assert len(desk_results) == 1


# ---------------------------------------------------------------- claims


def test_claims_about_methods_that_were_not_run_are_left_out(tmp_path):
    assert claims(desk()) == []
    two = [("none", [5.0, 5.2, 5.1]), ("manifold mixup", [3.0, 3.3, 3.1])]
    found = claims(desk(two))
    assert [verdict.outcome for verdict in found] == ["holds"]
    assert found[0].claim.endswith("manifold mixup is lower than none")
    assert [v.outcome for v in claims(desk([("none", [3.0, 3.3, 3.1]), ("manifold mixup", [5.0, 5.2, 5.1])]))] == [
        "does not hold"
    ]
    three = claims(desk([*two, ("input mixup", [3.0, 3.2, 3.3])]))
    assert len({verdict.claim for verdict in three}) == len(three) == 3
    assert [verdict.outcome for verdict in three] == ["holds", "holds", "undecided"]


def test_the_page_says_the_claims_in_a_table_and_in_numbers(tmp_path):
    keys = {"experiment": "cifar10_desk", "model": "preact_resnet18"}
    found = page(tmp_path, runs("none", [5.0, 5.2, 5.1], **keys) + runs("manifold mixup", [3.0, 3.3, 3.1], **keys))
    assert "Of 1 claims 1 hold, 0 do not hold, 0 our runs cannot decide." in found.words
    cells = [" ".join(cell.split()) for cell in found.cells]
    assert cells[cells.index("holds") - 1].endswith("manifold mixup is lower than none")
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
        rest, depth = rest.strip(), 0
        assert rest[0] == "{"
        for end, character in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                break
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


@pytest.mark.parametrize("evil", ["}", "{", "}{", "{}}{", "}}{{", "{a}", "\\}", "}, year = {1}", "@misc{x,", "\n\n@x{", EVIL])
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
