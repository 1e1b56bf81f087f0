import errno
import os

import pytest
import torch

from manifold_mixup.lab import storage
from manifold_mixup.lab.errors import CorruptedFile, StorageError

STATE = {
    "plain": [1, 2.5, "text", True, None],
    "empty": {},
    "tensors": {"a": torch.arange(6).reshape(2, 3), "b": [torch.tensor(0.1), torch.zeros(0)]},
    "numbered": {0: {"exp_avg": torch.ones(2)}, 3: "three"},
    "flag": torch.tensor([True, False]),
    "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_state_comes_back_as_it_was(tmp_path):
    storage.save_state(tmp_path / "c", STATE, step=7)
    assert same(storage.load_state(tmp_path / "c"), STATE)
    assert not same(storage.load_state(tmp_path / "c"), {**STATE, "plain": []})


def test_an_optimizers_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    storage.save_state(tmp_path, {"optimizer": optimizer.state_dict()}, step=1)
    other = torch.optim.Adam(model.parameters(), lr=5)
    other.load_state_dict(storage.load_state(tmp_path)["optimizer"])
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for before, after in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_be_stored_is_refused_by_path():
    with pytest.raises(TypeError, match=r"state at 'a/b/0' is a set"):
        storage.pack({"a": {"b": [{1}]}}, {})


def test_no_state_is_none(tmp_path):
    assert storage.load_state(tmp_path) is None


def test_the_newer_state_replaces_the_older_one_and_its_tensors(tmp_path):
    for step in (1, 2):
        storage.save_state(tmp_path, {"x": torch.tensor(step)}, step)
    assert storage.load_state(tmp_path)["x"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "tensors-2.safetensors"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_crash_while_saving_leaves_the_state_before(tmp_path, monkeypatch, fails_at):
    storage.save_state(tmp_path, {"x": torch.tensor(1)}, 1)
    write, calls = storage.write_atomically, []

    def crash(path, content):
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        storage.save_state(tmp_path, {"x": torch.tensor(2)}, 2)
    assert storage.load_state(tmp_path)["x"] == 1


DAMAGES = {
    "truncated tensors": lambda f: (f / "tensors-1.safetensors").write_bytes(
        (f / "tensors-1.safetensors").read_bytes()[:-3]
    ),
    "changed tensors": lambda f: (f / "tensors-1.safetensors").write_bytes(
        (f / "tensors-1.safetensors").read_bytes()[:-1] + b"\x07"
    ),
    "missing tensors": lambda f: (f / "tensors-1.safetensors").unlink(),
    "truncated json": lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:-20]),
    "empty json": lambda f: (f / "state.json").write_text(""),
    "other json": lambda f: (f / "state.json").write_text("[1]"),
    "bytes": lambda f: (f / "state.json").write_bytes(b"\xff\xfe\x00"),
    "a changed digit": lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("1.25", "1.35")),
    "unknown tensor": lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"x"', '"z"')),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path, damage):
    storage.save_state(tmp_path, {"x": torch.tensor(1), "loss": 1.25}, 1)
    damage(tmp_path)
    with pytest.raises(
        CorruptedFile, match=rf"(?s){tmp_path}.*delete .* to start this run from the beginning"
    ) as caught:
        storage.load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"x": 1}, tmp_path / "t.safetensors")
    with pytest.raises(CorruptedFile, match="is corrupted"):
        storage.read_tensors(tmp_path / "t.safetensors")


def test_a_full_disk_is_a_clear_error_and_leaves_no_rubbish(tmp_path, monkeypatch):
    storage.write_json(tmp_path / "a.json", 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*a.json: No space left on device"):
        storage.write_json(tmp_path / "a.json", 2)
    assert storage.read_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot create the folder"):
        storage.make_folder(tmp_path / "file" / "runs")
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_atomically(tmp_path / "nowhere" / "x", b"")
    with pytest.raises(StorageError, match="cannot read"):
        storage.read_json(tmp_path / "nothing.json")


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()
