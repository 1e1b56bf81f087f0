import hashlib
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from lab.data.python2 import dumps
from manifold_mixup.lab.data import cifar
from manifold_mixup.lab.data.pickles import read_pickle
from manifold_mixup.lab.errors import CorruptedFile

PATH = Path("data_batch_1")
COARSE = """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1
vehicles_2"""


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_the_class_names_are_the_published_ones_and_the_pickles_of_these_tests_are_as_published():
    """The md5 of ``batches.meta`` and of CIFAR-100's ``meta``, which hold nothing else."""
    ten = {"num_cases_per_batch": 10000, "label_names": list(cifar.CIFAR10.info.classes), "num_vis": 3072}
    hundred = {"fine_label_names": list(cifar.CIFAR100.info.classes), "coarse_label_names": COARSE.split()}
    published = {file.name: file.md5 for file in (*cifar.CIFAR10_FILES.files, *cifar.CIFAR100_FILES.files)}
    assert hashlib.md5(dumps(ten)).hexdigest() == published["batches.meta"]
    assert hashlib.md5(dumps(hundred)).hexdigest() == published["meta"]


def test_what_the_files_hold_is_read_as_pickle_reads_it():
    images = np.random.default_rng(0).integers(0, 256, (7, 12), dtype=np.uint8)
    content = dumps({"labels": [3, 0, 255, 256, -1, 70000], "data": images, "filenames": ["a.png", "b.png"]})
    value = read_pickle(content, PATH)
    theirs = pickle.loads(content, encoding="bytes")
    assert {key.encode() for key in value} == set(theirs)
    assert value["labels"] == theirs[b"labels"] == [3, 0, 255, 256, -1, 70000]
    assert value["filenames"] == theirs[b"filenames"] == [b"a.png", b"b.png"]
    assert value["data"].dtype == np.uint8
    assert np.array_equal(value["data"], theirs[b"data"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_todays_numpy_writes_nothing_that_is_called(protocol, order):
    """Newer files of the same content are read, or refused where they ask for more."""
    images = np.asarray(np.arange(24, dtype=np.uint8).reshape(4, 6), order=order)
    content = pickle.dumps({"data": images, "labels": [1, 2]}, protocol)
    asked = {arg for op, arg, _ in pickletools.genops(content) if op.name == "GLOBAL"}
    if protocol < 3:
        assert "_codecs encode" in asked
        with pytest.raises(CorruptedFile, match="_codecs.encode"):
            read_pickle(content, PATH)
    elif protocol < 5:
        assert np.array_equal(read_pickle(content, PATH)["data"], images)
    else:
        with pytest.raises(CorruptedFile, match="_frombuffer"):
            read_pickle(content, PATH)


def attack(function, *arguments):
    return pickle.dumps({"data": Calls(function, *arguments)}, 2)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_a_command_is_refused_and_nothing_runs(tmp_path, protocol):
    trace = tmp_path / "ran"
    content = pickle.dumps({"data": Calls(os.system, f"touch {trace}"), "labels": []}, protocol)
    with pytest.raises(CorruptedFile, match=r"data_batch_1 .*asks for (posix|nt)\.system"):
        read_pickle(content, PATH)
    assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # so the attack was a real one


NESTED = {
    "in a list": lambda evil: {"labels": [1, [2, [evil]]]},
    "as a key": lambda evil: {"x": {(1, evil): 2}},
    "in a tuple": lambda evil: (1, evil),
    "alone": lambda evil: evil,
}


@pytest.mark.parametrize("where", NESTED)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("open({trace!r}, 'w')",)),
        (exec, ("open({trace!r}, 'w')",)),
        (open, ("{trace}", "w")),
        (os.mkdir, ("{trace}",)),
        (Calls, (os.mkdir, "{trace}")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_that_is_hidden_deeper_is_refused_too(tmp_path, where, function, arguments):
    trace = tmp_path / "ran"
    evil = Calls(function, *(a.format(trace=str(trace)) if isinstance(a, str) else a for a in arguments))
    with pytest.raises(CorruptedFile, match="asks for"):
        read_pickle(pickle.dumps(NESTED[where](evil), 2), PATH)
    assert not trace.exists()


def test_a_pickle_inside_an_array_is_not_opened(tmp_path):
    array = np.array([Calls(os.mkdir, str(tmp_path / "ran"))], dtype=object)
    with pytest.raises(CorruptedFile, match="asks for|type b?'O8'"):
        read_pickle(pickle.dumps({"data": array}, 4), PATH)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        b"cnumpy.core.multiarray\nfromfile\n",
        b"cnumpy\nload\n",
        b"cbuiltins\ngetattr\n",
        b"c__builtin__\neval\n",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n",
        b"cnumpy\nndarray.tofile\n",
        b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    ],
)
def test_only_the_names_that_an_array_needs_are_known(name):
    with pytest.raises(CorruptedFile, match="asks for"):
        read_pickle(b"\x80\x04}\x8c\x01x" + name + b"s.", PATH)


def test_the_stand_ins_cannot_be_changed_by_a_pickle():
    """BUILD sets attributes where an object lets it: here on the classes themselves, and on what they make."""
    set_on_class = b"\x80\x02}U\x01xcnumpy\nndarray\n}U\x05valueK\x01sbs."
    with pytest.raises(CorruptedFile, match="data_batch_1"):
        read_pickle(set_on_class, PATH)
    set_on_object = b"\x80\x02}U\x01xcnumpy\nndarray\n)R}U\x05valueK\x01sbs."
    with pytest.raises(CorruptedFile, match="data_batch_1"):
        read_pickle(set_on_object, PATH)
    images = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(read_pickle(dumps({"data": images}), PATH)["data"], images)


@pytest.mark.parametrize("dtype", ["int32", "float32", "complex64", "bool"])
def test_only_arrays_of_bytes_are_read(dtype):
    with pytest.raises(CorruptedFile, match="not of bytes"):
        read_pickle(dumps({"data": np.zeros((2, 3), dtype)}), PATH)


def test_an_array_must_fill_its_shape():
    content = dumps({"data": np.zeros((2, 3), np.uint8)}).replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")
    with pytest.raises(CorruptedFile, match="reshape"):
        read_pickle(content, PATH)


@pytest.mark.parametrize(
    "content",
    [b"", b".", b"\x80", b"\x80\x02", b"\x80\x63.", b"not a pickle", b"\x80\x02K\x01.", b"\x80\x02]q\x00.", b"(t."],
)
def test_what_is_no_dictionary_is_refused(content):
    with pytest.raises(CorruptedFile, match="data_batch_1"):
        read_pickle(content, PATH)


def test_a_pickle_that_is_cut_off_anywhere_is_refused():
    content = dumps({"labels": [1, 2], "data": np.zeros((2, 3), np.uint8)})
    for end in range(len(content)):
        with pytest.raises(CorruptedFile):
            read_pickle(content[:end], PATH)
