import copy
import math
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from lab.small import DIGITS, SPIRAL, experiment, one_run, tree
from manifold_mixup.lab.config import ExperimentConfig, RunConfig, TrainConfig, slug
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.data.planetoid import PlanetoidOptions
from manifold_mixup.lab.errors import RecipeError
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.models import MODELS
from manifold_mixup.lab.parsing import effective_settings, parse_config


def problems(raw):
    with pytest.raises(RecipeError) as caught:
        parse_config(raw, "test")
    assert "\n" not in str(caught.value)
    return caught.value.problems


def test_every_default_is_filled_in():
    config = experiment(methods=[{"name": "manifold_mixup"}])
    assert config.methods[0].options == {
        "alpha": 2.0,
        "per": "batch",
        "pairing": "random",
        "probability": 1.0,
        "layers": "auto",
    }
    assert config.model.options == {"width": 8, "input_scale": 1.0, "dropout": 0.0, "batch_norm": False}
    assert config.train.optimizer == "adam"


def test_parsing_is_idempotent_and_leaves_its_input_alone():
    raw = tree(methods=[{"name": "manifold_mixup", "options": {"layers": "input+bottleneck"}}])
    before = copy.deepcopy(raw)
    config = parse_config(raw, "test")
    assert raw == before
    assert config.methods[0].options["layers"] == ["input", "bottleneck"]
    assert parse_config(config.model_dump(mode="json"), "again") == config


BAD = {
    "unknown key at the top": ({"epochs": 3}, ["epochs: unknown key"]),
    "unknown key in train": ({"train__stepz": 3}, ["train.stepz: unknown key, did you mean 'steps'?"]),
    "wrong type": ({"train__steps": "many"}, ["train.steps: input should be a valid integer (got 'many')"]),
    "a number as text": ({"train__lr": "0.1"}, ["train.lr: input should be a valid number (got '0.1')"]),
    "out of range": ({"train__lr": -1.0}, ["train.lr: input should be greater than 0 (got -1.0)"]),
    "no number": ({"train__lr": math.nan}, ["train.lr: input should be"]),
    "bad batch size": ({"train__batch_size": "half"}, ["train.batch_size: input should be a valid integer"]),
    "unknown data set": ({"data__name": "spirals"}, ["data.name: unknown data set 'spirals': did you mean 'spiral'?"]),
    "unknown model": ({"model__name": "mpl"}, ["model.name: unknown model 'mpl': did you mean 'mlp'?"]),
    "unknown model option": (
        {"model__options": {"widht": 3}},
        ["model.options.widht: unknown key, did you mean 'width'?"],
    ),
    "unknown data option": ({"data__options": {"point": 3}}, ["data.options.point: unknown key"]),
    "unknown method": ({"methods": [{"name": "mixup"}]}, ["methods.0.name: unknown method 'mixup': did you mean"]),
    "negative alpha": (
        {"methods": [{"name": "none"}, {"name": "manifold_mixup", "options": {"alpha": -1.0}}]},
        ["methods.1.options.alpha: input should be greater than or equal to 0 (got -1.0)"],
    ),
    "unknown layer": (
        {"methods": [{"name": "manifold_mixup", "options": {"layers": ["bottlenek"]}}]},
        ["methods.0.options.layers: the model has no module named 'bottlenek': did you mean 'bottleneck'"],
    ),
    "unknown layer of the noise": (
        {"methods": [{"name": "hidden_noise", "options": {"layers": ["input"]}}]},
        ["methods.0.options.layers: the model has no module named 'input'"],
    ),
    "wrong keyword": (
        {"methods": [{"name": "manifold_mixup", "options": {"layers": "all"}}]},
        ["methods.0.options.layers: 'all' is no choice here, 'auto' is"],
    ),
    "layers of a wrong type": (
        {"methods": [{"name": "manifold_mixup", "options": {"layers": [1]}}]},
        ["methods.0.options.layers: should be a keyword or a list of layer names"],
    ),
    "no methods": ({"methods": []}, ["methods: list should have at least 1 item"]),
    "no seeds": ({"seeds": []}, ["seeds: list should have at least 1 item"]),
    "negative seed": ({"seeds": [-1]}, ["seeds.0: input should be greater than or equal to 0 (got -1)"]),
    "seed twice": ({"seeds": [1, 2, 1]}, ["seeds: a seed is listed twice"]),
    "label twice": (
        {"methods": [{"name": "none", "label": "A b"}, {"name": "dropout", "label": "a-b"}]},
        ["methods.1.label: 'a-b' is the label of methods.0 too; labels must differ"],
    ),
    "method twice": (
        {"methods": [{"name": "none"}, {"name": "none"}]},
        ["methods.1.label: 'none' is the label of methods.0"],
    ),
    "label without letters": (
        {"methods": [{"name": "none", "label": "--"}]},
        ["methods.0.label: '--' holds no letter"],
    ),
    "name with a slash": ({"name": "../x"}, ["name: string should match pattern"]),
    "model for other data": ({"data": {"name": "digits"}}, ["model: model 'spiral_net' reads vectors"]),
    "momentum of adam": ({"train__momentum": 0.9}, ["train: momentum and nesterov are read by optimizer 'sgd' only"]),
    "nesterov without momentum": (
        {"train__optimizer": "sgd", "train__nesterov": True},
        ["train: nesterov needs a momentum above 0"],
    ),
    "unknown measure": ({"measures": ["knn", "knm:k=1"]}, ["measures.1: unknown measure 'knm': did you mean 'knn'"]),
    "unknown option of a measure": (
        {"measures": ["knn:neighbours=1"]},
        ["measures.0: knn.neighbours: unknown key"],
    ),
    "bad value of a measure": (
        {"measures": ["spectra:split=all"]},
        ["measures.0: spectra.split: input should be 'test', 'validation' or 'train' (got 'all')"],
    ),
    "measure that does not read like one": (
        {"measures": ["knn:"]},
        ["measures.0 'knn:' should read name or name:key=value"],
    ),
    "measure twice": ({"measures": ["knn:k=1", "knn:k=3"]}, ["measures.1: measure 'knn' is listed twice"]),
    "measures in one text": ({"measures": "knn"}, ["measures: input should be a valid list"]),
    "measure that is no text": ({"measures": [3]}, ["measures.0: input should be a valid string"]),
    "images asked of vectors": (
        {"measures": ["knn", "noise:sd=0.1"]},
        ["measures.1: measure 'noise' needs images, and data 'spiral' are none"],
    ),
    "not a table": ({"data": "spiral"}, ["data: input should be a valid dictionary"]),
    "a method that is no table": ({"methods": ["none"]}, ["methods.0: input should be a valid dictionary"]),
}


@pytest.mark.parametrize(("changes", "expected"), BAD.values(), ids=BAD)
def test_a_mistake_is_named_with_its_key_path(changes, expected):
    found = problems(tree(SPIRAL, **changes))
    assert len(found) == len(expected), found
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_missing_parts_are_named():
    assert [problem.split(":")[0] for problem in problems({"name": "x"})] == ["data", "model", "methods", "seeds"]


def test_three_mistakes_are_reported_at_once():
    raw = tree(train__stepz=3, data__name="digit", methods=[{"name": "manifold_mixup", "options": {"alpha": -1.0}}])
    found = problems(raw)
    assert [problem.split(":")[0] for problem in found] == ["train.stepz", "data.name", "methods.0.options.alpha"]
    with pytest.raises(RecipeError, match=r"^test: 3 mistakes: \(1\) train.stepz.*\(2\) data.name.*\(3\) methods.0"):
        parse_config(raw, "test")


def test_one_wrong_option_does_not_hide_the_others():
    options = {"alpha": -1.0, "layers": ["nowhere"], "prob": 1}
    found = problems(tree(methods=[{"name": "manifold_mixup", "options": options}]))
    assert [problem.split(":")[0] for problem in found] == [
        "methods.0.options.alpha",
        "methods.0.options.prob",
        "methods.0.options.layers",
    ]


@pytest.mark.parametrize("name", ["dropout", "batch_norm"])
def test_a_method_whose_option_the_model_lacks_is_refused(name):
    raw = tree(DIGITS, model={"name": "preact_resnet8"}, methods=[{"name": name}])
    assert problems(raw) == [
        f"methods.0: method {name!r} sets model.options.{name}, which model 'preact_resnet8' does not have"
    ]


def test_checking_draws_no_random_number():
    import torch

    before = torch.get_rng_state()
    experiment(methods=[{"name": "manifold_mixup", "options": {"layers": ["bottleneck"]}}])
    assert torch.equal(torch.get_rng_state(), before)


def test_full_batch_is_zero():
    assert experiment(train__batch_size="full").train.batch_size == 0


OTHER = {
    "steps": 13,
    "batch_size": 11,
    "optimizer": "sgd",
    "lr": 0.5,
    "momentum": 0.9,
    "nesterov": True,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "eval_every": 7,
    "precision": "bf16-mixed",
    "loss": "bce-softmax",
    "label_smoothing": 0.1,
    "ema": 0.9,
    "compile": True,
    "threads": 2,
    "epochs": 3,
    "milestones": [4],
    "gamma": 0.5,
    "warmup": 0.5,
}
NEEDS = {
    "momentum": {"train__optimizer": "sgd"},
    "nesterov": {"train__optimizer": "sgd", "train__momentum": 0.5},
    "milestones": {"train__schedule": "step"},
    "gamma": {"train__schedule": "step", "train__milestones": [5]},
    "warmup": {"train__schedule": "one-cycle"},
    "epochs": {"train__steps": None},
}


def test_every_training_setting_changes_the_hash():
    assert OTHER.keys() == TrainConfig.model_fields.keys()
    hashes = {one_run().config.hash}
    for i, (key, value) in enumerate(OTHER.items(), 1):
        hashes.add(one_run(**{**NEEDS.get(key, {}), f"train__{key}": value}).config.hash)
        assert len(hashes) == i + 1, key


def other_value(field):
    """A value that the option allows and that is not its default."""
    value, kinds = field.default, [field.annotation, *get_args(field.annotation)]
    if isinstance(value, bool):
        return not value
    choices = [choice for kind in kinds for choice in get_args(kind)] if Literal in map(get_origin, kinds) else []
    for choice in choices:
        if choice != value:
            return choice
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, int):
        return value - 1 if value > 1 else 2
    if value in ("auto", "all"):
        return ["head"]
    for kind, example in ((int, 7), (float, 0.5), (bool, True), (str, "x")):
        if kind in kinds:
            return example
    return ["x"]


@pytest.mark.parametrize(
    "entry",
    [*DATASETS.values(), *MODELS.values(), *METHODS.values(), *MEASURES.values()],
    ids=lambda e: getattr(e, "name", None) or e.info.name,
)
def test_every_option_changes_the_resolved_config(entry):
    model = entry.Options if isinstance(entry, type) else entry.options
    required = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
    for name, field in model.model_fields.items():
        needs = {"split": "random"} if model is PlanetoidOptions and name != "split" else {}  # for its sizes
        default = model.model_validate(required | needs)
        value = "y" if name in required else other_value(field)
        changed = model.model_validate({**required, **needs, name: value})
        assert changed.model_dump() != default.model_dump(), name
        assert field.description, name


def test_label_and_description_do_not_change_the_hash():
    plain = one_run(methods=[{"name": "none"}])
    named = one_run(methods=[{"name": "none", "label": "plain"}], description="x", name="other", measures=["knn"])
    assert plain.config.hash == named.config.hash
    assert (named.label, named.experiment) == ("plain", "other")
    assert plain.config.hash != one_run(seeds=[1]).config.hash
    assert plain.config.hash != one_run(methods=[{"name": "dropout"}]).config.hash
    assert plain.config.hash != one_run(model__options={"width": 9}).config.hash
    assert plain.config.hash != one_run(data__options={"points_per_class": 13}).config.hash


def test_runs_go_seed_by_seed():
    config = experiment(methods=[{"name": "none"}, {"name": "dropout"}], seeds=[4, 2])
    assert [(run.config.seed, run.label) for run in config.runs()] == [
        (4, "none"),
        (4, "dropout"),
        (2, "none"),
        (2, "dropout"),
    ]


def test_methods_set_their_part_of_model_and_training():
    def settings(name, options):
        return effective_settings(one_run(methods=[{"name": name, "options": options}]).config)

    assert settings("dropout", {"p": 0.25})[0]["dropout"] == 0.25
    assert settings("batch_norm", {})[0]["batch_norm"] is True
    assert settings("weight_decay", {"strength": 0.5})[1].weight_decay == 0.5
    assert settings("none", {}) == (one_run().config.model.options, one_run().config.train)


def test_a_label_is_made_of_the_options_that_were_set():
    methods = [
        {"name": "manifold_mixup"},
        {"name": "manifold_mixup", "options": {"alpha": 1, "layers": ["input", "head"]}},
    ]
    labels = [method.label for method in experiment(methods=methods).methods]
    assert labels == ["manifold_mixup", "manifold_mixup (alpha=1, layers=input+head)"]


@pytest.mark.parametrize(
    ("label", "folder"),
    [("Hidden only", "hidden-only"), ("é=2, a/b", "é=2-a-b"), ("..", ""), ("a.b_c", "a.b_c"), ("--x--", "x")],
)
def test_slugs_are_safe_names_of_folders(label, folder):
    assert slug(label) == folder


def test_configs_cannot_be_changed():
    config = experiment()
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "y"
    assert isinstance(config, ExperimentConfig)
    assert isinstance(next(config.runs()).config, RunConfig)
