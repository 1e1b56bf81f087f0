"""The ramp against its formula."""

import math

import pytest

from manifold_mixup.lab.methods.ramp import ramp


@pytest.mark.parametrize("step", [0, 1, 2.5, 7, 9.999, 10, 11, 1000])
@pytest.mark.parametrize("start", [0, 3])
def test_between_its_ends_it_is_the_formula(step, start):
    done = (step - start) / 10
    expected = math.exp(-5) if done < 0 else 1.0 if done > 1 else math.exp(-5 * (1 - done) * (1 - done))
    assert ramp(step, start, 10) == pytest.approx(expected, rel=1e-15)


def test_it_grows_from_its_least_value_at_the_start_to_exactly_one():
    values = [ramp(step, 5, 20) for step in range(30)]
    assert values[:6] == [math.exp(-5)] * 6
    assert values[25:] == [1.0] * 5
    assert values[5:26] == sorted(set(values))


def test_without_length_it_goes_to_one_at_once():
    assert [ramp(step, 2, 0) for step in range(4)] == [math.exp(-5), math.exp(-5), 1.0, 1.0]
