"""Recipes that extend others: what comes along, what does not, and mistakes that name the recipe."""

import copy

import pytest

from manifold_mixup.lab import recipe as recipes
from manifold_mixup.lab.errors import RecipeError, StorageError, UnknownName
from manifold_mixup.lab.inheritance import inherit
from manifold_mixup.lab.recipe import Overrides, load_recipe, read_recipe, recipe_files

PARENT = """
name = "parent"
description = "of the parent"
seeds = [0, 1]
[data]
name = "cifar10"
options = { validation_examples = 0, crop_padding = 2 }
[model]
name = "preact_resnet18"
options = { width = 0.5 }
[train]
epochs = 40
optimizer = "sgd"
momentum = 0.9
nesterov = true
lr = 0.1
schedule = "step"
milestones = [20, 30]
gamma = 0.2
[[methods]]
name = "none"
[[methods]]
name = "input_mixup"
options = { alpha = 0.5 }
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one recipe; writes others, which may extend it."""
    folder = tmp_path / "package"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "parent.toml").write_text(PARENT)
    monkeypatch.setattr(recipes, "RECIPES", folder)

    def write(text, name="child"):
        path = folder / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def train(package, lines):
    package(f'extends = "parent"\nname = "child"\n[train]\n{lines}\n')
    return read_recipe("child")[0]["train"]


def test_tables_are_merged_key_by_key_and_lists_replaced(package):
    package(
        """
        extends = "parent"
        name = "child"
        seeds = [5]
        data.options.crop_padding = 4
        train.lr = 0.2
        [[methods]]
        name = "cutmix"
        """
    )
    config, parent = load_recipe("child"), load_recipe("parent")
    assert (config.name, config.description, config.seeds) == ("child", "of the parent", [5])
    assert config.data.options == {**parent.data.options, "crop_padding": 4}
    assert config.data.options["validation_examples"] == 0
    assert config.train == parent.train.model_copy(update={"lr": 0.2})
    assert [method.name for method in config.methods] == ["cutmix"]
    assert config.model == parent.model


def test_a_recipe_that_changes_nothing_is_its_parent_under_another_name(package):
    package('extends = "parent"\nname = "child"\n')
    config, parent = load_recipe("child"), load_recipe("parent")
    assert config == parent.model_copy(update={"name": "child"})
    assert [run.config.hash for run in config.runs()] == [run.config.hash for run in parent.runs()]


def test_a_name_is_not_taken_over(package):
    package('extends = "parent"\n')
    with pytest.raises(RecipeError, match="recipe child: name: field required"):
        load_recipe("child")


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ('model.name = "wrn_28_2"', {}),
        ('model.name = "wrn_28_2"\nmodel.options.dropout = 0.3', {"dropout": 0.3}),
        ('model.name = "preact_resnet18"\nmodel.options.dropout = 0.3', {"width": 0.5, "dropout": 0.3}),
        ("model.options.dropout = 0.3", {"width": 0.5, "dropout": 0.3}),
    ],
)
def test_another_network_does_not_inherit_options(package, lines, options):
    package(f'extends = "parent"\nname = "child"\n{lines}\n')
    assert read_recipe("child")[0]["model"].get("options", {}) == options


def test_another_data_set_does_not_inherit_options(package):
    package('extends = "parent"\nname = "child"\ndata.name = "svhn"\n')
    assert read_recipe("child")[0]["data"] == {"name": "svhn"}
    assert load_recipe("child").data.options["validation_examples"] == 5000


@pytest.mark.parametrize(
    ("lines", "measures"),
    [
        ("", ["knn", "fgsm:epsilon=8"]),
        ('measures = ["noise"]', ["noise"]),
        ("measures = []", []),
        ("data.options.crop_padding = 4", ["knn", "fgsm:epsilon=8"]),
        ('model.name = "wrn_28_2"', ["knn", "fgsm:epsilon=8"]),
        ('data.name = "svhn"', []),
        ('measures = ["noise"]\ndata.name = "svhn"', ["noise"]),
    ],
)
def test_measures_come_along_unless_the_child_has_its_own_or_another_data_set(package, lines, measures):
    text = PARENT.replace("seeds = [0, 1]", 'seeds = [0, 1]\nmeasures = ["knn", "fgsm:epsilon=8"]')
    package(text.replace('"parent"', '"measured"'), "measured")
    package(f'extends = "measured"\nname = "child"\n{lines}\n')
    assert load_recipe("child").measures == measures


def test_the_two_ways_to_say_the_length_replace_each_other(package):
    text = 'extends = "parent"\nname = "child"\n[train]\n{}\nschedule = "cosine"\n'
    package(text.format("steps = 9"))
    assert (load_recipe("child").train.steps, load_recipe("child").train.epochs) == (9, None)
    package('extends = "child"\nname = "back"\ntrain.epochs = 3\n', "back")
    assert (load_recipe("back").train.steps, load_recipe("back").train.epochs) == (None, 3)
    package(text.format("steps = 9\nepochs = 3"))
    with pytest.raises(RecipeError, match="give one of them"):
        load_recipe("child")


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ('schedule = "cosine"', {}),
        ('schedule = "one-cycle"\nwarmup = 0.2', {"warmup": 0.2}),
        ('schedule = "step"\ngamma = 0.5', {"milestones": [20, 30], "gamma": 0.5}),
        ("milestones = [10]", {"milestones": [10], "gamma": 0.2}),
    ],
)
def test_settings_of_the_parents_schedule_go_with_it(package, lines, kept):
    found = train(package, lines)
    assert {key: found[key] for key in ("milestones", "gamma", "warmup") if key in found} == kept
    assert load_recipe("child").train.schedule == found["schedule"]


def test_settings_of_another_schedule_in_the_recipe_itself_are_refused(package):
    train(package, 'schedule = "cosine"\ngamma = 0.5')
    with pytest.raises(RecipeError, match="milestones and gamma are read by schedule 'step' only"):
        load_recipe("child")


def test_settings_of_the_parents_optimiser_go_with_it(package):
    assert {"momentum", "nesterov"} & train(package, 'optimizer = "adam"').keys() == set()
    assert load_recipe("child").train.optimizer == "adam"
    assert train(package, 'optimizer = "sgd"')["momentum"] == 0.9


def test_milestones_of_the_parent_have_to_fit_fewer_epochs(package):
    train(package, "epochs = 25")
    with pytest.raises(RecipeError, match="lie between 0 and the 25 epochs"):
        load_recipe("child")


def test_chains_and_paths_relative_to_the_recipe(package, tmp_path, monkeypatch):
    package('extends = "parent"\nname = "middle"\ntrain.lr = 0.3\ntrain.schedule = "cosine"\n', "middle")
    own = tmp_path / "own"
    own.mkdir()
    (own / "first.toml").write_text('extends = "middle"\nname = "first"\ntrain.weight_decay = 0.5\n')
    (own / "second.toml").write_text('extends = "../own/first.toml"\nname = "second"\nseeds = [7]\n')
    monkeypatch.chdir(tmp_path)
    config = load_recipe("own/second.toml", Overrides(epochs=2))
    assert (config.name, config.seeds, config.train.epochs) == ("second", [7], 2)
    assert (config.train.lr, config.train.weight_decay, config.train.schedule) == (0.3, 0.5, "cosine")
    assert (config.train.momentum, config.train.milestones) == (0.9, [])


def test_a_chain_that_comes_back_is_refused(package):
    package('extends = "b"\n', "a")
    package('extends = "c"\n', "b")
    package('extends = "a"\n', "c")
    with pytest.raises(RecipeError, match="recipe c: extends: a extends b extends c extends a, a circle"):
        read_recipe("a")
    path = package('extends = "self.toml"\n', "self")
    with pytest.raises(RecipeError, match="self extends self, a circle"):
        read_recipe(str(path))


def test_unknown_parents_are_named_with_the_recipe_that_extends_them(package):
    path = package('extends = "parents"\n')
    with pytest.raises(RecipeError, match="recipe child: extends: unknown recipe 'parents': did you mean 'parent'"):
        read_recipe("child")
    package('extends = "nowhere.toml"\n')
    with pytest.raises(StorageError, match=rf"cannot read the recipe {path.parent}/nowhere.toml"):
        read_recipe("child")
    package("extends = 3\n")
    with pytest.raises(RecipeError, match="extends: it should be a recipe's name or path, not 3"):
        read_recipe("child")
    with pytest.raises(UnknownName, match="unknown recipe 'children'"):
        read_recipe("children")


def test_a_parent_that_is_no_toml_is_named(package):
    package("name = \n", "broken")
    package('extends = "broken"\n')
    with pytest.raises(RecipeError, match="recipe broken: it is no TOML"):
        read_recipe("child")


def test_two_recipes_of_one_name_are_refused(package):
    package(PARENT, "parent")
    with pytest.raises(RecipeError, match=r"recipe parent: deep/parent.toml and parent.toml have one name"):
        recipe_files()


def test_recipes_are_found_in_folders_by_name(package):
    package(PARENT, "other")
    assert {name: path.parent.name for name, path in recipe_files().items()} == {"parent": "deep", "other": "package"}


def test_what_is_no_table_is_left_for_the_validation(package):
    package('extends = "parent"\nname = "child"\ntrain = 3\ndata = "svhn"\n')
    with pytest.raises(RecipeError, match=r"2 mistakes: .*data.*train"):
        load_recipe("child")


def test_neither_recipe_is_changed():
    parent = {"name": "a", "train": {"epochs": 3, "schedule": "step", "milestones": [1]}, "data": {"name": "svhn"}}
    child = {"train": {"schedule": "cosine", "steps": 2}, "data": {"options": {"flip": True}}, "seeds": [1]}
    before = copy.deepcopy((child, parent))
    merged = inherit(child, parent)
    assert merged == {
        "train": {"schedule": "cosine", "steps": 2},
        "data": {"name": "svhn", "options": {"flip": True}},
        "seeds": [1],
    }
    merged["data"]["options"]["flip"] = False
    merged["seeds"].append(2)
    assert (child, parent) == before
