"""No key of a recipe is ignored: another value changes what a run leaves, or is refused.

The keys are taken from the classes that validate a recipe, so that a new one fails here until it has a line in a table
below and an effect.
"""

import copy
import functools
import hashlib
import json

import pytest
import torch

from lab.published_data import publish
from lab.small import tree
from manifold_mixup.lab.config import TrainConfig
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.errors import LabError
from manifold_mixup.lab.methods import METHODS
from manifold_mixup.lab.models import MODELS
from manifold_mixup.lab.parsing import parse_config
from manifold_mixup.lab.records import RunFolder
from manifold_mixup.lab.run import execute

REFUSED = "refused"
DIGITS = {
    "name": "keys",
    "data": {"name": "digits", "options": {"train_examples": 20}},
    "model": {"name": "mlp", "options": {"width": 12, "depth": 2}},
    "train": {"steps": 4, "batch_size": 6, "lr": 0.01},
    "methods": [{"name": "none"}],
    "seeds": [0],
}


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """From an experiment of one run to what can be seen of it; the same experiment is run once."""
    folder = tmp_path_factory.mktemp("keys")
    compiled = []

    def spy(network):
        compiled.append(network)
        return network

    @functools.cache
    def run(text):
        compiled.clear()
        number = sum(1 for _ in folder.glob("run-*"))
        try:
            planned = next(parse_config(json.loads(text), "test", places).runs())
            record = execute(RunFolder(folder / f"run-{number}", planned), places=places)
        except LabError:
            return REFUSED
        weights = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in record.folder.glob("*.safetensors")
        }
        lines = len((record.folder / "log.jsonl").read_text().splitlines())
        return json.dumps([weights, record.metrics, lines, record.hardware["threads"], len(compiled)])

    with pytest.MonkeyPatch.context() as patch:
        places = publish(tmp_path_factory.mktemp("published"), patch)
        patch.setattr(torch, "compile", spy)
        yield lambda experiment: run(json.dumps(experiment))


def changed(experiment, path, value):
    """A copy with one value in another place; a list in the path is indexed by number."""
    result = copy.deepcopy(experiment)
    *parents, key = path.split(".")
    node = result
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[int(key) if isinstance(node, list) else key] = value
    return result


def assert_it_matters(look, experiment, path, value):
    """The value is refused, or leaves something else than the experiment without it: which of the two."""
    plain, other = look(experiment), look(changed(experiment, path, value))
    assert plain != REFUSED
    assert other != plain, f"{path} = {value!r} changes nothing"
    return other


def test_what_should_change_nothing_changes_nothing(look):
    experiment = {
        **DIGITS,
        "methods": [{"name": "manifold_mixup", "label": "one", "options": {"layers": ["hidden.2"]}}],
    }
    plain = look(experiment)
    assert plain != REFUSED
    same = (("name", "other"), ("description", "text"), ("methods.0.label", "two"), ("measures", ["spectra"]))
    for path, value in same:
        assert look(changed(experiment, path, value)) == plain
    assert look(changed(experiment, "seeds.0", 1)) != plain


# --- train

SGD = {"steps": None, "epochs": 3, "optimizer": "sgd", "momentum": 0.9}
SETUPS = {
    "adam for some steps, constant": {},
    "sgd for some epochs, in steps": {**SGD, "schedule": "step", "milestones": [1]},
    "sgd for some epochs, one cycle": {**SGD, "schedule": "one-cycle"},
    "adam for some epochs, cosine, binary": {"steps": None, "epochs": 2, "schedule": "cosine", "loss": "bce-softmax"},
}
TRAIN = {  # other values of every key; what is a setup's own value already is left out there
    "steps": [3],
    "epochs": [2],
    "batch_size": [4],
    "loss": ["bce-softmax", "cross-entropy"],
    "label_smoothing": [0.2],
    "optimizer": ["adam", "sgd"],
    "lr": [0.02],
    "momentum": [0.5],
    "nesterov": [True],
    "schedule": ["constant", "cosine", "one-cycle"],
    "milestones": [[2]],
    "gamma": [0.5],
    "warmup": [0.6],
    "weight_decay": [0.1],
    "ema": [0.5],
    "eval_every": [1],
    "precision": ["bf16-mixed"],
    "compile": [True],
    "threads": [2],
}


@pytest.mark.parametrize("key", TrainConfig.model_fields)
def test_every_key_of_the_training_has_an_effect_or_is_refused(look, key):
    effects = []
    for setup in [{}] if key == "threads" else SETUPS.values():  # two threads wait for each other on a busy machine
        values = {k: v for k, v in {**DIGITS["train"], **setup, "threads": 1}.items() if v is not None}
        experiment = {**DIGITS, "train": values}
        default = TrainConfig.model_validate(values).model_dump()[key]
        effects += [
            assert_it_matters(look, experiment, f"train.{key}", value) for value in TRAIN[key] if value != default
        ]
    assert set(effects) != {REFUSED}  # it can be used somewhere


# --- data

ELSEWHERE = {"folder", "hf"}  # a user's own: what their options choose among is shown in their own tests
ELSEWHERE |= {name for name, entry in DATASETS.items() if entry.info.nodes}  # graphs: in test_graph_splits
DATA = {
    "train_examples": (12, 10),
    "validation_examples": (4, 6),
    "crop_padding": (2, 1),
    "flip": (False, True),
    "points_per_class": (12, 10),
    "validation_points": (20, 16),
    "test_points": (20, 16),
    "degrees": (780.0, 700.0),
}
DATA_KEYS = [
    (name, key) for name, entry in DATASETS.items() if name not in ELSEWHERE for key in entry.options.model_fields
]


def test_the_data_sets_are_those_we_know_of():
    assert {name for name, _ in DATA_KEYS} | ELSEWHERE | {"cifar10_1"} == DATASETS.keys()


@pytest.mark.parametrize(("name", "key"), DATA_KEYS)
def test_every_option_of_a_data_set_has_an_effect(look, name, key):
    options = {option: DATA[option][0] for option in DATASETS[name].options.model_fields}
    net = {"name": "spiral_net" if name == "spiral" else "mlp", "options": {"width": 10}}
    experiment = tree(DIGITS, data={"name": name, "options": options}, model=net, train__steps=2)
    assert assert_it_matters(look, experiment, f"data.options.{key}", DATA[key][1]) != REFUSED


# --- methods

IMAGES = {"name": "preact_resnet8", "options": {"width": 4}}
ON_MLP = {"dropout", "batch_norm"}  # what sets options that the residual network lacks
BASES = {"cutout": {"size": 3}, "cutmix": {"probability": 1.0}}
METHOD = {
    "alpha": 0.3,
    "pairing": "halves",
    "probability": 0.0,
    "per": "example",
    "layers": ["stage1"],
    "additive": 0.1,
    "multiplicative": 0.6,
    "enabled": False,
    "intrusion": 0.3,
    "head": "stage1",  # no linear layer
    "size": 5,
    "sd": 0.1,
    "epsilon": 0.3,
    "p": 0.2,
    "strength": 0.1,
    "alpha_unlabelled": 0.3,
    "weight": 7.0,
    "ramp": 1.0,
    "targets": "logits",
    "target_mode": "eval",
    "decay": 0.3,
    "mix": "logits",
    "teacher_mode": "train",
}
FEW_LABELS = {"name": "semi_supervised", "options": {"batch_size": 6}}
ON_GRAPHS = {name for name, method in METHODS.items() if method.tasks == ("node_classification",)}  # in their own tests
METHOD_KEYS = [(name, key) for name in METHODS if name not in ON_GRAPHS for key in METHODS[name].Options.model_fields]


@pytest.mark.parametrize(("name", "key"), METHOD_KEYS)
def test_every_option_of_a_method_has_an_effect(look, name, key):
    method = {"name": name, "options": BASES.get(name, {})}
    experiment = tree(DIGITS, methods=[method], **({} if name in ON_MLP else {"model": IMAGES}))
    if METHODS[name].tasks == ("semi_supervised",):
        experiment["task"] = FEW_LABELS
    seen = assert_it_matters(look, experiment, f"methods.0.options.{key}", METHOD[key])
    assert (seen == REFUSED) == (key == "head")


# --- networks

SMALL = {  # a network for each class of options, small
    "mlp": {"width": 12, "depth": 2},
    "mnist_bottleneck": {"bottleneck": 4, "before": 1, "after": 1, "units": 16},
    "preact_resnet8": {"width": 4},
    "preact_resnet18": {"width": 0.05},
    "wrn_28_2": {"width": 0.1},
    "spiral_net": {"width": 8},
}
LIBRARIES = {"timm", "torchvision"}
MODEL = {
    "width": {"preact_resnet18": 0.1, "wrn_28_2": 0.2, "mnist_bottleneck": 0.5},
    "depth": 1,
    "dropout": 0.5,
    "batch_norm": True,
    "bottleneck": 5,
    "before": 2,
    "after": 2,
    "units": 8,
    "input_scale": 0.5,
    "blocks": 2,
    "stem_stride": 2,
    "final_norm": True,
    "negative_slope": 0.1,
    "variant": "standard",
}
MODEL_KEYS = [(name, key) for name in SMALL for key in MODELS[name].options.model_fields]


def test_the_networks_are_those_we_know_of():
    known = {MODELS[name].options for name in SMALL}
    others = {entry.options for name, entry in MODELS.items() if name not in LIBRARIES and not entry.graph}
    assert others == known  # options of networks on a graph are tried in test_graph_nets


@pytest.mark.parametrize(("name", "key"), MODEL_KEYS)
def test_every_option_of_a_network_has_an_effect(look, name, key):
    experiment = tree(DIGITS, model={"name": name, "options": SMALL[name]})
    if name == "spiral_net":
        points = {"points_per_class": 12, "validation_points": 20, "test_points": 20}
        experiment["data"] = {"name": "spiral", "options": points}
    value = MODEL[key] if key != "width" else MODEL["width"].get(name, 6)
    assert assert_it_matters(look, experiment, f"model.options.{key}", value) != REFUSED
