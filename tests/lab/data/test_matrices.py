import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from lab.data.python2 import dumps
from manifold_mixup.lab.data.matrices import CsrMatrix, read_number_pickle
from manifold_mixup.lab.errors import CorruptedFile

PATH = Path("ind.cora.x")
MATRIX = csr_matrix(np.array([[0, 2.5, 0], [0, 0, 0], [1, 0, 3]], np.float32))


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", ">f8", "<f4", "|u1", "|i1", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numbers_are_read_in_either_byte_order(dtype, order):
    array = np.asarray(np.arange(12).reshape(3, 4) % 7, dtype=dtype, order=order)
    for content in (pickle.dumps(array, 3), pickle.dumps(array, 4)):
        assert np.array_equal(read_number_pickle(content, PATH), pickle.loads(content))


@pytest.mark.parametrize("write", [dumps, lambda value: pickle.dumps(value, 3), lambda value: pickle.dumps(value, 4)])
def test_matrices_are_read_as_scipy_holds_them(write):
    matrix = read_number_pickle(write(MATRIX), PATH)
    assert isinstance(matrix, CsrMatrix)
    dense = np.zeros(matrix.shape)
    for row, column, value in zip(*matrix.places, matrix.data, strict=True):
        dense[row, column] = value
    assert np.array_equal(dense, MATRIX.toarray())


def test_a_dictionary_of_lists_is_read_without_its_factory():
    graph = defaultdict(list, {0: [1, 300], 70_000: [], 2: [0]})
    value = read_number_pickle(dumps(graph), PATH)
    assert (type(value), value) == (dict, dict(graph))
    with pytest.raises(KeyError):
        value[5]


def test_a_pickle_that_is_cut_off_anywhere_is_refused():
    for content in (dumps(MATRIX), dumps(defaultdict(list, {0: [1]}))):
        for end in range(len(content)):
            with pytest.raises(CorruptedFile, match=PATH.name):
                read_number_pickle(content[:end], PATH)


WRONG = {
    "objects": np.array([1, None], dtype=object),
    "text": np.array(["a", "b"]),
    "complex numbers": np.array([1j]),
    "a matrix of columns": MATRIX.tocsc(),
    "lists of lists": {0: [[1]]},
    "a truth among the neighbours": {0: [True]},
    "a name for a node": {"a": [1]},
    "a number": 3,
    "an array in an array": np.array({"a": np.ones(2)}, dtype=object),
}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_else_a_pickle_holds_is_refused(what):
    with pytest.raises(CorruptedFile, match=f"{PATH} is not a pickle that is read here"):
        read_number_pickle(pickle.dumps(WRONG[what], 4), PATH)


@pytest.mark.parametrize(
    "name", [b"cscipy.sparse\nload_npz\n", b"cnumpy\nload\n", b"c__builtin__\neval\n", b"ccollections\nOrderedDict\n"]
)
def test_only_the_names_that_the_files_need_are_known(name):
    with pytest.raises(CorruptedFile, match="asks for"):
        read_number_pickle(b"\x80\x02" + name + b".", PATH)


@pytest.mark.parametrize("name", [b"cnumpy\nndarray\n", b"cscipy.sparse.csr\ncsr_matrix\n", b"c__builtin__\nlist\n"])
def test_the_stand_ins_cannot_be_changed_by_a_pickle(name):
    """BUILD sets attributes where an object lets it: here on the classes themselves, and on what they make."""
    for target in (name, name + b")\x81"):
        with pytest.raises(CorruptedFile):
            read_number_pickle(b"\x80\x02" + target + b"}U\x05valueK\x01sb.", PATH)
    assert isinstance(read_number_pickle(dumps(MATRIX), PATH), CsrMatrix)
