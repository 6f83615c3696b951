"""Dropout's mask: how many it keeps, that nothing in it hangs together, that the kernel has the same."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kernels

SEEDS = st.integers(0, 2**64 - 1)
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SIZES = [(0,), (1,), (33, 65), (4095,), (4096,), (4097,), (3, 41, 1025)]


@given(SEEDS, st.floats(0, 1, exclude_max=True), st.integers(1, 200), st.integers(1, 5000))
@example(0, 0.5, 200, 5000)
@example(2**64 - 1, 0.1, 200, 5000)
def test_share_of_kept_is_one_minus_p(seed, p, rows, columns):
    for mask in (kernels.dropout_mask(rows, columns, p, seed), kernels.flat_mask((rows, columns), p, seed)):
        assert mask.shape == (rows, columns) and mask.dtype == np.bool_
        sigma = math.sqrt(p * (1 - p) / mask.size)
        assert abs(mask.mean() - (1 - p)) <= 5 * sigma + 5 / mask.size


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63])
def test_rows_and_columns_each_keep_their_share(p, seed):
    mask = kernels.dropout_mask(1000, 1000, p, seed)
    for axis in (0, 1):
        sigma = math.sqrt(p * (1 - p) / 1000)
        means = mask.mean(axis=axis)
        assert np.abs(means - (1 - p)).max() < 5 * sigma
        assert 0.85 < means.std() / sigma < 1.15             # neither more even than chance nor less


def correlation(x, y):
    return abs(np.corrcoef(x.ravel(), y.ravel())[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 99])
def test_neighbours_do_not_hang_together(p, seed):
    mask = kernels.dropout_mask(500, 2000, p, seed)
    limit = 5 / math.sqrt(mask.size / 2)
    for distance in (1, 2, 3, 4, 8, 16, 64, 256):
        assert correlation(mask[distance:], mask[:-distance]) < limit, f"rows {distance} apart"
        assert correlation(mask[:, distance:], mask[:, :-distance]) < limit, f"columns {distance} apart"
        assert correlation(mask[distance:, distance:], mask[:-distance, :-distance]) < limit, distance
    a, b, c, d = mask[:-1, :-1], mask[1:, :-1], mask[:-1, 1:], mask[1:, 1:]
    assert correlation(a ^ b, c ^ d) < limit                 # nor do the changes from a row to the next


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_seeds_do_not_hang_together(p):
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    masks = {seed: kernels.dropout_mask(500, 1000, p, seed) for seed in seeds}
    for first, second in itertools.combinations(seeds, 2):
        x, y = masks[first], masks[second]
        assert correlation(x, y) < 5 / math.sqrt(x.size), f"seeds {first} and {second}"
        assert correlation(x[1:], y[:-1]) < 5 / math.sqrt(x[1:].size)    # nor one mask the other's, a row on


def test_a_mask_is_a_part_of_the_larger_one():
    large = kernels.dropout_mask(100, 5000, 0.3, 8)
    np.testing.assert_array_equal(kernels.dropout_mask(7, 33, 0.3, 8), large[:7, :33])
    flat = large[:2, :4096].ravel()[:4200].reshape(2, 3, 700)
    np.testing.assert_array_equal(kernels.flat_mask((2, 3, 700), 0.3, 8), flat)


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_kernel_takes_the_flat_mask(dtype, p, seed):
    for shape in SIZES:
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        y = kernels.dropout(x, p, seed)
        assert y.dtype == dtype
        kept = kernels.flat_mask(shape, p, seed)
        np.testing.assert_array_equal(y, np.where(kept, x * dtype(1 / (1 - p)), 0))


@BOTH
def test_backward_drops_what_forward_dropped(dtype):
    x = np.random.default_rng(0).uniform(1, 2, (33, 1025)).astype(dtype)
    for p, seed in ((0.2, 1), (0.7, 2)):
        y, dx = kernels.dropout(x, p, seed), kernels.dropout(np.ones_like(x), p, seed)
        np.testing.assert_array_equal(y == 0, dx == 0)
        assert set(np.unique(dx)) == {0, dtype(1 / (1 - p))}


@BOTH
def test_p_of_zero_keeps_all(dtype, same_bits):
    x = np.random.default_rng(0).standard_normal((3, 5000)).astype(dtype)
    same_bits([kernels.dropout(x, 0, 3)], [x])
    assert kernels.dropout_mask(50, 5000, 0, 3).all()


def test_nan_is_dropped_like_a_number():
    x = np.full((2, 5000), np.nan, np.float32)
    np.testing.assert_array_equal(np.isnan(kernels.dropout(x, 0.5, 1)), kernels.flat_mask(x.shape, 0.5, 1))


@pytest.mark.parametrize("p", [1, 1.5, -0.1, math.nan, math.inf])
def test_bad_p(p):
    for call in (lambda: kernels.dropout(np.ones(3), p, 0), lambda: kernels.dropout_mask(3, 3, p, 0),
                 lambda: kernels.flat_mask((3, 3), p, 0), lambda: kernels.keep_below(p)):
        with pytest.raises(ValueError, match=r"dropout: p is .*\[0, 1\)"):
            call()


def test_keep_below_is_the_share_of_all_hashes():
    for p in (0.0, 0.25, 0.5, 0.9):
        assert (int(kernels.keep_below(p)) + 1) / 2**32 == pytest.approx(1 - p, abs=1e-9)
