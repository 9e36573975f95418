from math import isnan, sqrt

import pytest

from experiments.ablation.statistics import paired_difference, standard_error


def test_standard_error():
    # Deviations from 4: -2, 0, 2. Variance 8 / 2 = 4, over 3 values.
    assert standard_error([2.0, 4.0, 6.0]) == pytest.approx(sqrt(4 / 3))
    assert isnan(standard_error([1.0]))


def test_paired_difference():
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3); Student's t for 2 degrees of
    # freedom is 4.3027 at 97.5 %.
    d = paired_difference({1: 11.0, 2: 12.0, 3: 33.0}, {1: 10.0, 2: 10.0, 3: 30.0})
    assert d.mean == 2.0 and d.pairs == 3
    assert d.high - d.mean == pytest.approx(4.3027 / sqrt(3), abs=1e-4)
    assert d.mean - d.low == pytest.approx(4.3027 / sqrt(3), abs=1e-4)


def test_only_common_seeds_count():
    d = paired_difference({1: 5.0, 2: 100.0}, {1: 4.0, 3: 0.0})
    assert (d.mean, d.pairs) == (1.0, 1) and isnan(d.low)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference({1: 5.0}, {2: 4.0})
