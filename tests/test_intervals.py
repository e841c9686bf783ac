"""Intervals over seeds and photos: by hand, against scipy where it has the case, and by how often they are right."""

import numpy as np
import pytest
from scipy import stats


@pytest.fixture(scope='module')
def interval(load_tool):
    return load_tool('intervals').interval


def test_a_case_by_hand(interval):
    # means of rows 1.5 and 5.5, of columns 2 and 5, of all 3.5; what is left of each value is 1 or -1
    mean, half = interval([[1, 2], [3, 8]])
    rows, columns, rest = 2 * 8, 2 * 4.5, 4  # mean squares, of 1 degree of freedom each
    variance = (rows + columns - rest) / 4
    freedom = 21**2 / (16**2 + 9**2 + 4**2)
    assert mean == 3.5
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * variance**0.5, rel=1e-12)


def test_one_seed_gives_the_interval_of_a_mean(interval):
    values = np.random.default_rng(0).normal(size=(1, 40))
    found = stats.ttest_1samp(values[0], 0).confidence_interval(0.9)
    mean, half = interval(values, confidence=0.9)
    assert (mean - half, mean + half) == pytest.approx(tuple(found), rel=1e-12)


def test_where_photos_are_alike_seeds_alone_count(interval):
    by_seed = np.array([[1.0], [2.0], [4.0]])
    found = stats.ttest_1samp(by_seed[:, 0], 0).confidence_interval(0.95)
    mean, half = interval(np.tile(by_seed, 100))
    assert (mean - half, mean + half) == pytest.approx(tuple(found), rel=1e-9)


def test_where_seeds_are_alike_photos_alone_count(interval):
    by_photo = np.random.default_rng(0).normal(size=30)
    found = stats.ttest_1samp(by_photo, 0).confidence_interval(0.95)
    mean, half = interval(np.tile(by_photo, (4, 1)))
    assert (mean - half, mean + half) == pytest.approx(tuple(found), rel=1e-9)


def test_values_that_are_all_the_same_have_no_width(interval):
    assert interval(np.full((3, 5), 2.0)) == (2.0, 0.0)


@pytest.mark.parametrize(
    'of_seeds, of_photos, most', [(0.0, 1.0, 0.98), (0.2, 1.0, 0.97), (1.0, 0.2, 0.97), (0.0, 0.0, 1)]
)
def test_nineteen_of_twenty_intervals_hold_the_truth(interval, of_seeds, of_photos, most):
    # more do where neither seeds nor photos matter, because two degrees of freedom then tell little
    generator, held, trials = np.random.default_rng(0), 0, 1000
    for _ in range(trials):
        values = generator.normal(size=(3, 40)) + of_seeds * generator.normal(size=(3, 1))
        mean, half = interval(values + of_photos * generator.normal(size=(1, 40)))
        held += abs(mean) <= half
    assert 0.93 <= held / trials <= most
