import json

import pytest
import torch
from pydantic import ValidationError

from lab.small import one_run
from manifold_mixup.lab.errors import ConfigMismatch, CorruptedFile, StorageError
from manifold_mixup.lab.records import Failure, Record, RunFolder, describe_differences, find_records


def record(folder, **changes):
    values = {
        "experiment": "small",
        "data": "spiral",
        "model": "spiral_net",
        "method": "none",
        "label": "none",
        "options": {},
        "seed": 0,
        "metrics": {"test_error": 1.5, "test_nll": None},
        "best": {"test_error": 2.5, "test_nll": 0.5},
        "train": {"steps": 3},
        "config_hash": "0",
        "versions": {"torch": "2"},
        "hardware": {"cpus": 2},
        "seconds": 1.0,
        "command": "x",
        "date": "2026-01-01T00:00:00+00:00",
        "folder": folder,
    }
    return Record(**{**values, **changes})


def test_a_record_comes_back_as_it_was(tmp_path):
    folder = RunFolder(tmp_path, one_run())
    folder.claim()
    assert folder.read() is None
    written = record(folder.path)
    folder.finish(written)
    assert folder.read() == written
    saved = json.loads((folder.path / "record.json").read_text())
    assert saved["schema"] == 1
    assert "folder" not in saved
    assert find_records(tmp_path) == [written]


def test_folders_are_named_by_experiment_label_and_seed(tmp_path):
    run = one_run(methods=[{"name": "none", "label": "Plain run"}], seeds=[3])
    assert RunFolder(tmp_path, run).path == tmp_path / "small" / "plain-run" / "seed-3"


def test_a_folder_of_another_config_is_refused_and_left_alone(tmp_path):
    RunFolder(tmp_path, one_run(train__steps=12)).claim()
    other = RunFolder(tmp_path, one_run(train__steps=13, train__lr=0.5))
    before = (other.path / "config.json").read_text()
    with pytest.raises(
        ConfigMismatch, match=r"train.lr: 0.01 there, 0.5 here; train.steps: 12 there, 13 here.*--runs"
    ) as caught:
        other.claim()
    assert "\n" not in str(caught.value)
    assert (other.path / "config.json").read_text() == before
    RunFolder(tmp_path, one_run(train__steps=12)).claim()


def test_checking_creates_nothing(tmp_path):
    RunFolder(tmp_path, one_run()).check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hash": 1, "config": 2}'])
def test_a_damaged_config_is_a_clear_error(tmp_path, content):
    folder = RunFolder(tmp_path, one_run())
    folder.claim()
    (folder.path / "config.json").write_text(content)
    with pytest.raises(CorruptedFile, match="config.json is corrupted"):
        folder.check()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}'])
def test_a_damaged_record_is_a_clear_error(tmp_path, content):
    folder = RunFolder(tmp_path, one_run())
    folder.claim()
    (folder.path / "record.json").write_text(content)
    with pytest.raises(CorruptedFile, match="record.json"):
        folder.read()


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "small").write_text("x")
    with pytest.raises(StorageError, match=r"cannot (create the folder|read)"):
        RunFolder(tmp_path, one_run()).claim()


def test_pictures_come_back(tmp_path):
    folder = RunFolder(tmp_path, one_run())
    folder.claim()
    assert record(folder.path).pictures() == {}
    folder.write_pictures({"grid": torch.arange(4)})
    assert torch.equal(record(folder.path).pictures()["grid"], torch.arange(4))


def test_a_failure_is_noted_and_forgotten_when_the_run_succeeds(tmp_path):
    folder = RunFolder(tmp_path, one_run())
    folder.claim()
    folder.fail(Failure("small", "none", 0, "it broke", "trace"))
    assert json.loads((folder.path / "failure.json").read_text())["error"] == "it broke"
    assert folder.read() is None
    folder.finish(record(folder.path))
    assert not (folder.path / "failure.json").exists()


def test_a_failure_that_cannot_be_noted_is_no_second_error(tmp_path):
    (tmp_path / "small").write_text("x")
    folder = RunFolder(tmp_path, one_run())
    folder.fail(Failure("small", "none", 0, "it broke"))
    assert (tmp_path / "small").read_text() == "x"


def test_a_record_holds_nothing_unknown(tmp_path):
    with pytest.raises(ValidationError, match="accuracy"):
        record(tmp_path, accuracy=3)


def test_the_summary_has_what_json_prints(tmp_path):
    summary = record(tmp_path).summary()
    assert {"data", "model", "method", "label", "seed", "metrics"} <= summary.keys()
    assert json.loads(json.dumps(summary)) == summary


def test_differences():
    assert describe_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == (
        "a.b: 1 there, 3 here; c: 2 there, unset here; d: unset there, 4 here"
    )
    assert describe_differences({str(i): 1 for i in range(5)}, {}).endswith("; and 2 more")
