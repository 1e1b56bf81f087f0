"""From files to numbers, through the command: every method on a user's folder and on the published CIFAR-10 layout."""

import json

import numpy as np
import pytest
from PIL import Image

from lab.data import test_cifar
from manifold_mixup.lab import cli
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.measures.registry import MEASURES
from manifold_mixup.lab.methods import METHODS

CLASSES = ("blue", "green", "red")
SUPERVISED = [name for name, method in METHODS.items() if "classification" in method.tasks]
ON_IMAGES = [name for name in SUPERVISED if name != "batch_norm"]  # residual networks have it anyway
SMALL = ("--model", "preact_resnet18", "--width", "0.05", "--steps", "2", "--set", "train.batch_size=6", "--quiet")


def draw(folder, seed=0, n=10, size=12):
    """Photographs of one colour each, with noise."""
    random = np.random.default_rng(seed)
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 - c] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANIFOLD_MIXUP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """All methods, trained by one command."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ("compare", "--data", f"folder:{photos}", "--methods", ",".join(ON_IMAGES), "--seeds", "0,", "-j", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, *SMALL, "--runs", str(runs), "--name", "photos"])
    assert not caught.value.code
    return runs / "photos"


def test_every_method_trains_on_a_folder_of_images(trained):
    records = {path.parts[-3]: json.loads(path.read_text()) for path in trained.rglob("record.json")}
    assert records.keys() == set(ON_IMAGES)
    for name, record in records.items():
        assert record["metrics"]["test_nll"] is not None, name
        assert record["train"]["steps"] == 2
    assert len({record["metrics"]["test_nll"] for record in records.values()}) == len(records)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_runs_on_it(trained, name, capsys):
    code, out, err = call(capsys, "evaluate", trained / "manifold_mixup", "--measures", name, "--json", "--threads", 1)
    assert code == 0, err
    (line,) = map(json.loads, out.splitlines())
    assert line["measures"].keys() == {name}
    assert line["metrics"]
    assert all(MEASURES[name].describe(number) for number in line["metrics"])


def test_somebody_elses_folder_is_measured_by_the_names_of_its_classes(trained, tmp_path, capsys):
    other = draw(tmp_path / "other", seed=1, n=4, size=20)  # of another size, too
    (other / "green").rename(tmp_path / "green")  # and without one of the classes
    run = trained / "none/seed-0"
    code, out, err = call(capsys, "evaluate", run, "--data", f"folder:{other}", "--json", "--threads", 1)
    assert code == 0, err
    found = json.loads(out)
    assert found["data"].startswith("folder")
    assert 0 <= found["metrics"]["test_error"] <= 100
    (other / "blue").rename(other / "azure")
    code, _, err = call(capsys, "evaluate", run, "--data", f"folder:{other}", "--threads", 1)
    assert code == 2
    assert "classes that the network was not trained on: 'azure'" in err


def test_examples_that_the_run_has_seen_are_counted(trained, photos, capsys):
    code, out, err = call(
        capsys, "evaluate", trained / "none/seed-0", "--data", f"folder:{photos}", "--json", "--threads", 1
    )
    assert code == 0, err
    assert json.loads(out)["notes"] == ["the run was trained or validated on 24 of these 30 examples"]


def test_numbers_in_a_file_are_given_a_network_for_numbers(tmp_path, capsys):
    lines = [f"{i % 2}.5,{i},{i * i},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "points.csv").write_text("\n".join(["one,two,three,kind", *lines]) + "\n")
    data = f"hf:{tmp_path / 'points.csv'},label_column=kind,feature_columns=one+two"
    code, _, err = call(
        *(capsys, "train", "--data", data, "--steps", 2, "--set", "train.batch_size=6", "--runs", tmp_path, "--quiet"),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "train/manifold_mixup/seed-0/record.json").read_text())
    assert record["model"] == "mlp"


def test_a_network_of_a_library_trains_on_it(photos, tmp_path, capsys):
    code, _, err = call(
        *(capsys, "train", "--data", f"folder:{photos}", "--model", "timm:test_resnet", "--steps", 2, "--quiet"),
        *("--set", "train.batch_size=6", "--runs", tmp_path, "--set", "train.precision=32-true"),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "train/manifold_mixup/seed-0/record.json").read_text())
    assert record["model"] == "timm"
    assert "input" in record["train"]["layers"]


def test_every_method_trains_on_the_published_layout_of_cifar10(tmp_path, monkeypatch, capsys):
    contents, entry, _ = test_cifar.made("cifar10")
    test_cifar.write(tmp_path / "cifar-10-batches-py", contents)
    monkeypatch.setitem(DATASETS, "cifar10", entry)
    arguments = ("--data", "cifar10:validation_examples=5", "--data-dir", tmp_path, "--methods", ",".join(ON_IMAGES))
    code, out, err = call(
        capsys, "compare", *arguments, "--seeds", "0,", "-j", 1, *SMALL, "--runs", tmp_path / "runs", "--json"
    )
    assert code == 0, err
    assert len(out.splitlines()) == len(ON_IMAGES)
