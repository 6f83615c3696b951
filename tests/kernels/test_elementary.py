"""exp, tanh and erf in a compiled loop: to two units in the last place, the C library's in float64."""
import math

import numpy as np
import pytest

from kernels import elementary
from kernels.jit import helper


@helper
def exp_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.exp(x[i])


@helper
def tanh_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.tanh(x[i])


@helper
def erf_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.erf(x[i])


def math_erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


FUNCTIONS = pytest.mark.parametrize(("loop", "exact"),
                                    [(exp_loop, np.exp), (tanh_loop, np.tanh), (erf_loop, math_erf)])
INF, NAN = math.inf, math.nan
SLOPE = 2 / math.sqrt(math.pi)               # of erf in zero
TINY, HUGE = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)


def apply(loop, x):
    y = np.empty_like(x)
    loop(x, y)
    return y


def ulps(actual, exact, dtype):
    """How far off the results are, in units in the last place of what they should be."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~finite], rounded[~finite])
    assert np.isfinite(actual[finite]).all()
    return np.abs(actual[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite]))


@FUNCTIONS
def test_float32_is_within_two_units(loop, exact):
    patterns = np.arange(0, 2**32, 5003, dtype=np.uint32).view(np.float32)   # all exponents, NaN and infinity
    ranges = ((-1, 1), (-10, 10), (-104, -87), (-88, 89), (0.6, 0.65), (0.9, 0.95), (3.5, 4.5))
    for x in (patterns, *(np.linspace(low, high, 200_001, dtype=np.float32) for low, high in ranges)):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            expected = exact(x.astype(np.float64))
        assert ulps(apply(loop, x), expected, np.float32).max() <= 2


@FUNCTIONS
def test_float64_is_the_c_library(loop, exact):
    for x in (np.linspace(-745, 709.7, 100_001), np.linspace(-5, 5, 100_001), np.linspace(-1e-9, 1e-9, 1001)):
        assert ulps(apply(loop, x), exact(x), np.float64).max() <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("loop", "x", "y"), [
    (exp_loop, [0.0, -0.0, INF, -INF, NAN, 1000, -1000, 1e30, -1e30, HUGE, -HUGE, TINY],
     [1, 1, INF, 0, NAN, INF, 0, INF, 0, INF, 0, 1]),
    (tanh_loop, [0.0, -0.0, INF, -INF, NAN, 1000, -1000, 1e30, HUGE, -HUGE, TINY, -TINY],
     [0.0, -0.0, 1, -1, NAN, 1, -1, 1, 1, -1, TINY, -TINY]),
    (erf_loop, [0.0, -0.0, INF, -INF, NAN, 1000, -1000, 1e30, HUGE, -HUGE, TINY, -TINY],
     [0.0, -0.0, 1, -1, NAN, 1, -1, 1, 1, -1, TINY * SLOPE, -TINY * SLOPE])])
def test_special_values(dtype, loop, x, y):
    x, y = np.array(x, dtype), np.array(y, dtype)
    actual = apply(loop, x)
    np.testing.assert_allclose(actual, y, rtol=1e-15)
    assert (np.signbit(actual) == np.signbit(y))[~np.isnan(y)].all()


def test_float32_exp_reaches_the_subnormals():
    x = np.array([-87.4, -90, -100, -103.27, -103.9, -104.1], np.float32)
    y = apply(exp_loop, x)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)).astype(np.float32), atol=2 * TINY)
    assert (y[:-1] > 0).all() and y[-1] == 0


@FUNCTIONS
def test_every_place_in_a_vector_gives_the_same(loop, exact):
    for dtype in (np.float32, np.float64):
        for n in (1, 3, 7, 15, 16, 17, 33, 65):
            x = np.linspace(-3, 3, n, dtype=dtype)
            alone = [apply(loop, x[i:i + 1].copy())[0] for i in range(n)]
            assert ulps(apply(loop, x), np.array(alone, np.float64), dtype).max() <= 2
