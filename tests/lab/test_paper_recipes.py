"""The recipes of the paper's tables: what they say, that they start, and that they train the papers' networks."""

import json
import math
import re
import tomllib
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from lab.published_data import publish
from manifold_mixup.lab.config import Component
from manifold_mixup.lab.data import get_dataset
from manifold_mixup.lab.data.subsets import split_training
from manifold_mixup.lab.evaluation import evaluate_run
from manifold_mixup.lab.experiment import Settings, run_experiments
from manifold_mixup.lab.models import build_model
from manifold_mixup.lab.recipe import RECIPES, Overrides, load_recipe, recipe_files
from manifold_mixup.lab.reproduce import cost_of
from manifold_mixup.lab.studies import SCALES, load_study, study_files

FILES = {path.stem: path for path in sorted(RECIPES.rglob("*.toml"))}
SCALED = [name for name, path in FILES.items() if path.parent != RECIPES]
BEYOND = [name for name in SCALED if re.search("_graphmix$|_labels_", name)]  # other tasks: test_task_recipes.py
SCALED = [name for name in SCALED if name not in BEYOND]
FULL, SHORT, DESK = ([name for name in SCALED if FILES[name].parent.name == scale] for scale in SCALES)
LONGER = [name for name in FULL if name.startswith("svd_")]  # no table: desk recipes at length
TABLES = [name for name in FULL if name not in LONGER]

# The tables' networks, epochs and the epochs at which the rate falls, from the paper's text.
LONG, WIDE, LONGEST = (1200, (400, 800)), (400, (200, 300)), (2000, (1000, 1500))
PAPER = {
    "cifar10_preact18": ("preact_resnet18", *LONG),
    "cifar10_preact34": ("preact_resnet34", *LONG),
    "cifar10_wrn": ("wrn_28_10", *WIDE),
    "cifar100_preact18": ("preact_resnet18", *LONG),
    "cifar100_preact34": ("preact_resnet34", *LONG),
    "cifar100_wrn": ("wrn_28_10", *WIDE),
    "svhn_preact18": ("preact_resnet18", *LONG),
    "svhn_preact34": ("preact_resnet34", *LONG),
    "svhn_wrn": ("wrn_28_10", *WIDE),
    "tiny_imagenet_preact18": ("preact_resnet18", *LONGEST),
    "cifar10_layers": ("preact_resnet18", *LONGEST),
    "cifar100_layers": ("preact_resnet18", *LONGEST),
    "cifar10_alpha": ("preact_resnet18", *LONGEST),
    "cifar10_preact50": ("preact_resnet50", 600, (200, 400)),  # its milestones are ours
    "cifar10_blocked": ("preact_resnet18", *WIDE),  # its milestones are ours
    "cifar10_preact152": ("preact_resnet152", *LONG),
}
ONLY_FULL = {"cifar10_blocked", "cifar10_preact152"}
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tiny_imagenet": 100_000}
CROPS = {"cifar10": (2, True), "cifar100": (2, True), "svhn": (2, False), "tiny_imagenet": (4, True)}

THREE = ["none", "input mixup", "manifold mixup"]
SETS = ["S = 0+1+2", "S = 0+1", "S = 0+1+2+3", "S = 1+2", "S = 0", "S = 1+2+3", "S = 1", "S = 2+3", "S = 2", "S = none"]
LABELS = {
    "cifar10_preact18": [*THREE, "input mixup, alpha 2", "blocked gradient"],
    "cifar100_preact34": [*THREE, "input mixup, alpha 2"],
    "cifar10_wrn": [*THREE, "manifold mixup, S = 0+1+2"],
    "cifar100_wrn": [*THREE, "manifold mixup, S = 0+1+2"],
    "svhn_wrn": [*THREE, "manifold mixup, S = 0+1+2"],
    "tiny_imagenet_preact18": [
        "none",
        *(f"{kind} mixup, alpha {a}" for kind in ("input", "manifold") for a in ("0.2", "0.5", "1", "2")),
    ],
    "cifar10_layers": SETS,
    "cifar100_layers": SETS,
    "cifar10_alpha": [
        f"{kind} mixup, alpha {a}" for kind in ("input", "manifold") for a in ("0.5", "1", "1.2", "1.5", "1.8", "2")
    ],
    "cifar10_preact50": [*THREE, "dropout", "cutout"],
    "cifar10_blocked": ["blocked gradient"],
}
NAMES = {  # the method behind a label of one name
    "none": "none",
    "blocked gradient": "blocked_gradient",
    "cutmix": "cutmix",
    "cutout": "cutout",
    "label smoothing": "label_smoothing",
    "last layer": "last_layer_mixup",
    "dropout": "dropout",
    "weight decay": "weight_decay",
    "adamixup": "adamixup",
}
STAGES = {"0": "input", "1": "stage1", "2": "stage2", "3": "stage3"}


recipe = cache(load_recipe)  # as it is


def header(name):
    return re.match(r"(#.*\n)+", FILES[name].read_text())[0]


def base(name):
    return name.removesuffix("_full").removesuffix("_short")


def data_of(name):
    return re.match(r"cifar100|cifar10|svhn|tiny_imagenet", name)[0]


def layers(numbers):
    return [] if numbers == "none" else [STAGES[k] for k in numbers.split("+")]


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_is_valid_and_its_header_says_how_to_run_it(name):
    config = recipe(name)
    assert config.name == name
    assert config == load_recipe(str(FILES[name]))
    text = header(name)
    assert re.search(rf"^#   manifold-mixup compare --recipe {name}( |$)", text, flags=re.MULTILINE)
    assert cost_of(name).endswith(".")
    assert "published" in text.lower() or "Table" in text or "Figure" in text


def test_the_recipes_of_the_tables_are_there_at_each_scale():
    assert {base(name) for name in TABLES} == PAPER.keys()
    assert {base(name) for name in SHORT} == PAPER.keys() - ONLY_FULL
    assert all(name.endswith(f"_{FILES[name].parent.name}") for name in SCALED)
    assert recipe_files() == FILES


@pytest.mark.parametrize("name", SCALED)
def test_a_header_names_the_studies_that_show_the_recipe(name):
    scale = FILES[name].parent.name
    panels = [(study, panel) for study in study_files() for panel in load_study(study).panels]
    shown = {study for study, panel in panels if panel.recipes.get(scale) == name}
    assert all(name not in panel.recipes.values() or panel.recipes.get(scale) == name for _, panel in panels)
    line = re.search(
        rf"^#   manifold-mixup reproduce ([\w-]+) --scale {scale}(?: +\(likewise (.*)\))?$", header(name), re.MULTILINE
    )
    named = set() if line is None else {line[1], *(line[2] or line[1]).split(", ")}
    assert named <= shown
    assert named == shown or (scale == "desk" and named)


@pytest.mark.parametrize("name", TABLES)
def test_full_recipes_have_the_papers_settings(name):
    config = recipe(name)
    model, epochs, milestones = PAPER[base(name)]
    train = config.train
    assert (config.data.name, config.model.name) == (data_of(name), model)
    assert (train.epochs, tuple(train.milestones), train.gamma, train.schedule) == (epochs, milestones, 0.1, "step")
    assert (train.optimizer, train.lr, train.momentum, train.nesterov) == ("sgd", 0.1, 0.9, True)
    assert (train.weight_decay, train.batch_size, train.loss) == (1e-4, 100, "bce-softmax")
    assert (train.label_smoothing, train.ema, train.precision, train.threads) == (0.0, None, "bf16-mixed", 0)
    crop, flip = CROPS[config.data.name]
    assert config.data.options == {
        "train_examples": None,
        "validation_examples": 0,
        "crop_padding": crop,
        "flip": flip,
    }
    untouched = {"width": 1.0, "dropout": 0.0, "stem_stride": "auto"}
    own = {"variant": "code", "negative_slope": 0.0} if model == "wrn_28_10" else {"final_norm": False}
    assert config.model.options == untouched | own
    assert config.seeds == list(range(2 if "layers" in name else 5))
    assert sorted(m.label for m in config.methods) == sorted(LABELS.get(base(name), THREE))


def test_the_authors_cap_on_svhns_classes_can_be_asked_for():
    counts = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # published, of the digits 0 to 9
    assert sum(counts) == IMAGES["svhn"]
    labels = np.repeat(np.arange(10), counts)
    kept, _ = split_training(labels, 0, 62156, 0)
    assert np.bincount(labels[kept]).tolist() == [min(count, 7325) for count in counts]
    assert all("train_examples=62156" in header(name) for name in TABLES if data_of(name) == "svhn")


@pytest.mark.parametrize("name", SHORT)
def test_short_recipes_change_the_full_ones_where_they_say_so(name):
    full = f"{base(name)}_full"
    assert tomllib.loads(FILES[name].read_text())["extends"] == full
    config, parent = recipe(name), recipe(full)
    expected = parent.train.model_dump() | {
        "epochs": 200,
        "loss": "cross-entropy",
        "schedule": "cosine",
        "milestones": [],
        "gamma": None,
    }
    assert config.train.model_dump() == expected
    assert config.data.options == {**parent.data.options, "crop_padding": 4}
    assert config.model == parent.model
    assert config.seeds == list(range(2 if "layers" in name else 3))
    added = [m.label for m in config.methods if m not in parent.methods]
    assert added == (["adamixup"] if base(name) in ("cifar10_preact18", "cifar100_preact18") else [])
    assert all(method in config.methods for method in parent.methods)


@pytest.mark.parametrize("name", SCALED)
def test_labels_are_the_agreed_ones_and_tell_the_truth(name):
    config = recipe(name)
    convolutions = config.model.name.startswith(("preact", "wrn"))
    wide = config.model.name == "wrn_28_10"
    for method in config.methods:
        match = re.fullmatch(
            r"(input|manifold) mixup(?:, alpha ([\d.]+)|, S = (0\+1\+2)|, (hidden only))?", method.label
        )
        if match:
            kind, alpha, numbers, hidden = match.groups()
            assert method.name == f"{kind}_mixup"
            assert method.options["alpha"] == float(alpha or {"input": 1, "manifold": 2}[kind])
            if kind == "manifold" and convolutions:
                assert method.options["layers"] == layers(numbers or ("0+1" if wide else "0+1+2"))
            if hidden:
                assert "input" not in method.options["layers"]
        elif method.label.startswith("S = "):
            assert method.name == "manifold_mixup"
            assert method.options["alpha"] == 2.0
            assert method.options["layers"] == layers(method.label.removeprefix("S = "))
        else:
            assert method.name == NAMES[method.label]
            if method.label == "blocked gradient":
                assert (method.options["alpha"], method.options["layers"]) == (2.0, layers("0+1+2"))
        if method.name in ("input_mixup", "manifold_mixup", "blocked_gradient"):
            rest = {key: method.options[key] for key in ("pairing", "probability", "per")}
            assert rest == {"pairing": "random", "probability": 1.0, "per": "batch"}


@cache
def flops(model, data):
    """Operations of a forward and a backward of one image: two for each weight and place it is applied at, thrice.

    The images need no gradient, so that the first convolution counts twice only.
    """
    info = get_dataset(data).info
    total = 0

    def count(module, args, output):
        nonlocal total
        places = output[0, 0].numel()  # of a convolution; 1 of a linear layer
        total += 2 * module.weight.numel() * places * (2 if args[0].shape[1:] == info.shape else 3)

    with torch.device("meta"):
        network = build_model(model, {}, info.shape, len(info.classes))
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        network(torch.empty(1, *info.shape))
    return total


@pytest.mark.parametrize("name", [*TABLES, *SHORT])
def test_the_estimated_cost_is_the_arithmetic(name):
    config = recipe(name)
    run = flops(config.model.name, config.data.name) * IMAGES[config.data.name] * config.train.epochs / 1e14 / 3600
    runs = len(config.seeds) * len(config.methods)
    twice = len(config.seeds) * sum(m.name == "adamixup" for m in config.methods)  # two networks
    found = re.match(
        r"(\d+) runs of about ([\d.]+) GPU hours.*?, so ([\d.]+) GPU hours; estimated, never run", cost_of(name)
    )
    assert int(found[1]) == runs
    assert float(found[2]) == pytest.approx(run, rel=0.06)
    assert float(found[3]) == pytest.approx(run * (runs + twice), rel=0.06)
    assert "100 TFLOP/s" in cost_of(name)


# --- running them


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield publish(tmp_path_factory.mktemp("published"), patch)


COMPLICATED = ["cutmix", "last_layer_mixup", "manifold_mixup", "noisy_feature_mixup", "blocked_gradient", "adamixup"]


def most_complicated(config):
    """The method with the most machinery, and of several like it the one with the most layers."""

    def machinery(method):
        rank = COMPLICATED.index(method.name) if method.name in COMPLICATED else -1
        return rank, len(method.options.get("layers", ()))

    return max(config.methods, key=machinery)


def few(name):
    """Settings that leave a recipe's data set with a handful of images, and save the time of the compiler."""
    options = get_dataset(recipe(name).data.name).options.model_fields
    return [
        "train.compile=false",
        *(["data.options.validation_examples=4"] if "validation_examples" in options else []),
    ]


@pytest.mark.parametrize("name", [*DESK, *LONGER])
def test_every_desk_recipe_starts(name, places, tmp_path):
    config = recipe(name)
    labels = [config.methods[0].label, most_complicated(config).label]
    width = 16 if config.model.name == "mlp" else 0.05
    overrides = Overrides(
        steps=2,
        train_examples=12,
        width=width,
        seeds="0,",
        keep=labels,
        settings=["train.batch_size=6", *few(name)],
    )
    outcome = run_experiments([load_recipe(name, overrides, places)], Settings(tmp_path, places=places))
    assert not outcome.failures
    assert {record.label for record in outcome.records} == set(labels)
    for record in outcome.records:
        assert (record.train["steps"], record.train["examples"]) == (2, 12)
        assert math.isfinite(record.metrics["test_nll"])
    weights = {record.metrics["test_nll"] for record in outcome.records}
    assert len(weights) == len(set(labels))


def check_two_epochs(name, label, places, folder, images=4, batch=2):
    """A recipe's true network on a few images, with a fall of the rate between two epochs: its record."""
    milestones = ["train.milestones=[1]"] if recipe(name).train.schedule == "step" else []
    overrides = Overrides(
        epochs=2,
        train_examples=images,
        threads=1,
        seeds="0,",
        keep=[label],
        settings=[f"train.batch_size={batch}", *milestones],
    )
    outcome = run_experiments([load_recipe(name, overrides, places)], Settings(folder, places=places))
    assert not outcome.failures
    (record,) = outcome.records
    assert record.label == label
    assert record.train["steps"] == 2 * images // batch
    assert record.train["model_options"]["width"] == 1.0
    assert record.best == {}
    assert math.isfinite(record.metrics["test_nll"])
    log = [json.loads(line) for line in (record.folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2]
    if milestones:
        assert [line["lr"] for line in log] == pytest.approx([0.01, 0.01])
    return record


def test_a_full_recipe_trains_and_is_measured_on_cifar10_1(places, tmp_path):
    record = check_two_epochs("cifar10_preact18_full", "manifold mixup", places, tmp_path)
    assert record.train["layers"] == layers("0+1+2")
    assert record.train["settings"]["loss"] == "bce-softmax"
    found = evaluate_run(record.folder, [], data=Component(name="cifar10_1"), places=places)
    assert found.data.startswith("cifar10_1")
    assert 0 <= found.metrics["test_error"] <= 100
    assert found.metrics["test_nll"] != record.metrics["test_nll"]


SLOW = [
    ("cifar10_preact18_short", "adamixup"),
    ("cifar10_blocked_full", "blocked gradient"),
    ("cifar10_preact50_full", "dropout"),
    ("cifar10_preact152_full", "manifold mixup"),
    ("cifar10_layers_full", "S = 0+1+2+3"),
    ("cifar100_preact34_full", "input mixup, alpha 2"),
    ("cifar100_wrn_short", "manifold mixup"),
    ("svhn_wrn_full", "manifold mixup, S = 0+1+2"),
    ("tiny_imagenet_preact18_short", "none"),
]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("svhn_preact18_full", "manifold mixup"),
        ("tiny_imagenet_preact18_full", "manifold mixup, alpha 0.2"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
)
def test_full_and_short_recipes_train_the_papers_networks(name, label, places, tmp_path):
    check_two_epochs(name, label, places, tmp_path)
