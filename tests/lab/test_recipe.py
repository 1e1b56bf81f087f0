import dataclasses
import re
from pathlib import Path

import pytest

from manifold_mixup.lab import parsing
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.errors import RecipeError, StorageError, UnknownName, UsageError
from manifold_mixup.lab.options import Options
from manifold_mixup.lab.recipe import (
    RECIPES,
    Overrides,
    load_recipe,
    parse_component,
    parse_data,
    parse_seeds,
    parse_value,
    recipe_files,
    without_recipe,
)

FILES = sorted(RECIPES.glob("*.toml"))  # those of the paper's tables lie in folders: test_paper_recipes.py


def test_there_are_the_recipes_that_we_know_of():
    assert [path.stem for path in FILES] == ["digits", "digits_resnet", "spiral"]
    assert recipe_files().keys() == {path.stem for path in RECIPES.rglob("*.toml")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(path):
    config = load_recipe(path.stem)
    assert config == load_recipe(str(path)).model_copy(update={"name": config.name})
    assert config.name == path.stem
    assert config.seeds == [0, 1, 2, 3, 4]
    assert config.methods[0].name == "none"
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    assert f"manifold-mixup compare --recipe {path.stem}" in header
    assert "Cost:" in header
    assert "published" in header.lower() or "Figures" in header


def test_the_spiral_recipe_compares_the_methods_of_the_papers_figures():
    names = [method.name for method in load_recipe("spiral").methods]
    assert names[:5] == ["none", "input_mixup", "manifold_mixup", "hidden_noise", "input_noise"]
    assert names[5:] == ["dropout", "weight_decay", "batch_norm"]
    assert load_recipe("spiral").methods[2].options["layers"] == ["bottleneck"]


def test_the_digits_recipes_are_measured_and_the_spiral_is_not():
    for name in ("digits", "digits_resnet"):
        measures = [parse_component(text, "measures") for text in load_recipe(name).measures]
        assert [part["name"] for part in measures] == ["spectra", "fgsm", "deformations"]
        assert "layer" not in measures[0]["options"]  # the first hidden layer
    assert load_recipe("spiral").measures == []


def test_the_digits_recipe_has_both_choices_of_layers_side_by_side():
    layers = [m.options["layers"] for m in load_recipe("digits").methods if m.name == "manifold_mixup"]
    assert layers == ["auto", ["hidden.1", "hidden.2"]]


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown recipe 'spirals': did you mean 'spiral'"):
        load_recipe("spirals")


def test_a_recipe_that_is_no_toml(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("name = \n")
    with pytest.raises(RecipeError, match="it is no TOML"):
        load_recipe(str(path))
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="it is no TOML"):
        load_recipe(str(path))


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match="cannot read the recipe"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(StorageError, match="cannot read the recipe"):
        load_recipe(str(tmp_path / "folder.toml"))


def test_a_recipe_file_with_three_mistakes_names_all_three(tmp_path):
    path = tmp_path / "three.toml"
    text = Path(RECIPES / "digits.toml").read_text()
    path.write_text(
        text.replace("steps = 2000", "stepz = 2000").replace("p = 0.5", "p = 1.5").replace('"mlp"', '"mpl"')
    )
    with pytest.raises(
        RecipeError, match=r"3 mistakes: \(1\) train.stepz.*\(2\) model.name.*\(3\) methods.1.options.p"
    ):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", {"name": "none", "options": {}}),
        ("a:x=2", {"name": "a", "options": {"x": 2}}),
        ("a:x=2,y=1e-3,z=true", {"name": "a", "options": {"x": 2, "y": 1e-3, "z": True}}),
        ("a:layers=hidden.1+hidden.3", {"name": "a", "options": {"layers": "hidden.1+hidden.3"}}),
        ("a:alpha=2,label=hidden only", {"name": "a", "options": {"alpha": 2}, "label": "hidden only"}),
        ('a:label="with, comma",x=1', {"name": "a", "options": {"x": 1}, "label": "with, comma"}),
        ("a:label=1", {"name": "a", "options": {}, "label": "1"}),
        ("a:label=#1", {"name": "a", "options": {}, "label": "#1"}),
        ("a:layers=block#2", {"name": "a", "options": {"layers": "block#2"}}),
    ],
)
def test_components_on_the_command_line(text, expected):
    assert parse_component(text, "--method") == expected


@pytest.mark.parametrize("text", ["", ":x=1", "a:", "a:x", "a:=1", "a:x=1,x=2", 'a:label="open'])
def test_components_that_do_not_read_like_one(text):
    with pytest.raises(UsageError, match="--method"):
        parse_component(text, "--method")


def test_a_label_belongs_to_methods_only():
    assert parse_component("digits:label=x", "--data")["options"] == {"label": "x"}


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("1", [0]),
        ("5", [0, 1, 2, 3, 4]),
        ("3,4", [3, 4]),
        ("7,", [7]),
        ("0,", [0]),
        ("100-102", [100, 101, 102]),
        ("0,5-6", [0, 5, 6]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1,,2", "3-", "5-4", "0,5-4", "1.5"])
def test_seeds_that_do_not_read_like_some(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("[1, 2]", [1, 2]), ('"3"', "3"), ("full", "full"), ("a+b", "a+b")],
)
def test_values(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_every_override_changes_the_recipe():
    config = load_recipe(
        "digits",
        Overrides(
            data="digits:train_examples=50",
            model="mlp:depth=2",
            methods=["none", "manifold_mixup:alpha=1,layers=hidden.2,label=deep"],
            seeds="3,4",
            steps=7,
            settings=["train.lr=0.5", "description=mine", "methods.1.options.per=example"],
        ),
    )
    assert config.data.options == {"train_examples": 50}
    assert config.model.options["depth"] == 2
    assert config.model.options["width"] == 256
    assert [method.label for method in config.methods] == ["none", "deep"]
    assert config.methods[1].options["alpha"] == 1
    assert config.methods[1].options["layers"] == ["hidden.2"]
    assert config.methods[1].options["per"] == "example"
    assert config.seeds == [3, 4]
    assert config.train.steps == 7
    assert config.train.lr == 0.5
    assert config.description == "mine"


def test_another_data_set_or_model_does_not_inherit_options():
    config = load_recipe("digits", Overrides(model="preact_resnet8", methods=["none"]))
    assert config.model.options == {"width": 16, "blocks": 1}


def test_measures_replace_the_recipes_and_stay_with_its_data_set():
    def listed(**changes):
        return load_recipe("digits", Overrides(**changes)).measures

    recipes = listed()
    assert listed(measures=["knn:k=1", "noise"]) == ["knn:k=1", "noise"]
    assert listed(measures=["none"]) == []
    assert listed(settings=['measures=["knn"]']) == ["knn"]
    assert listed(data="digits:train_examples=50") == listed(model="preact_resnet8", methods=["none"]) == recipes
    spiral = {"data": "spiral", "model": "spiral_net", "methods": ["none"]}
    assert listed(**spiral) == []
    assert listed(**spiral, measures=["knn"]) == ["knn"]
    with pytest.raises(RecipeError, match=r"measures\.1: measure 'fgsm' needs images, and data 'spiral' are none"):
        listed(**spiral, measures=["knn", "fgsm"])
    assert without_recipe(Overrides(measures=["fgsm"])).measures == ["fgsm"]


def test_measures_are_no_part_of_a_run():
    plain, measured = load_recipe("digits", Overrides(measures=["none"])), load_recipe("digits")
    assert plain != measured
    assert [run.config for run in plain.runs()] == [run.config for run in measured.runs()]


def test_keep_selects_by_name_or_label():
    config = load_recipe("digits", Overrides(keep=["none", "manifold mixup, hidden layers only"]))
    assert [method.label for method in config.methods] == ["none", "manifold mixup, hidden layers only"]


@pytest.mark.parametrize(
    "setting", ["lr", "=3", "train.=3", "name.x=3", "methods.9.label=x", "methods.x.label=y", "methods.0=x"]
)
def test_settings_that_do_not_read_like_one(setting):
    with pytest.raises(UsageError, match="--set"):
        load_recipe("digits", Overrides(settings=[setting]))


def test_an_unknown_setting_is_refused():
    with pytest.raises(RecipeError, match=r"train.learning_rate: unknown key"):
        load_recipe("digits", Overrides(settings=["train.learning_rate=3"]))


def test_without_a_recipe():
    config = without_recipe(Overrides(methods=["none"], seeds="2,"), name="train")
    assert (config.name, config.seeds, config.methods[0].name) == ("train", [2], "none")
    assert (config.data.name, config.model.name, config.train.steps) == ("digits", "mlp", 2000)


def test_without_a_recipe_three_methods_at_three_seeds_are_compared():
    config = without_recipe(Overrides(data="spiral", model="spiral_net:width=8"))
    assert config.name == "spiral-spiral_net"
    assert [method.name for method in config.methods] == ["none", "input_mixup", "manifold_mixup"]
    assert config.seeds == [0, 1, 2]


def test_lengths_replace_each_other():
    assert without_recipe(Overrides(epochs=3)).train.steps is None
    assert load_recipe("digits", Overrides(epochs=3)).train.epochs == 3
    again = load_recipe("digits", Overrides(steps=7)).train
    assert (again.steps, again.epochs) == (7, None)
    with pytest.raises(RecipeError, match="give one of them"):
        load_recipe("digits", Overrides(steps=7, epochs=3))


def test_shorthands_set_options_of_data_network_and_training():
    config = load_recipe("digits", Overrides(train_examples=100, width=64, threads=2))
    assert config.data.options["train_examples"] == 100
    assert config.model.options["width"] == 64
    assert config.train.threads == 2


def test_a_name_may_take_a_value():
    part = parse_component("net:some/file,key=3", "--model", {"net": "path"}.get)
    assert part == {"name": "net", "options": {"path": "some/file", "key": 3}}
    by_name = parse_component("net:path=some/file,key=3", "--model", {"net": "path"}.get)
    assert by_name == part
    with pytest.raises(UsageError, match="should read key=value"):
        parse_component("other:some/file", "--model", {"net": "path"}.get)


def test_a_path_that_exists_is_kept_in_full(tmp_path, monkeypatch):
    entry = dataclasses.replace(DATASETS["digits"], positional="path")
    monkeypatch.setitem(DATASETS, "net", entry)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert parse_data("net:./a=b")["options"] == {"path": str(tmp_path / "a=b")}
    assert parse_data("net:elsewhere")["options"] == {"path": "elsewhere"}


def test_an_option_that_is_missing_is_said_once():
    class Needs(Options):
        path: str
        size: int = 3

    rest, problems = parsing._validate_options(Needs, {"size": "x"})
    assert rest == {}
    assert len(problems) == 2
    assert parsing._validate_options(Needs, {}) == ({}, ["path: field required"])
