"""exp, tanh, erf and the normal distribution in a compiled loop; in float64 they are the C library's."""
import math

import numba
import numpy as np
import pytest

from kernels import elementary
from kernels.jit import SAFE_MATH

compiled = numba.njit(fastmath=SAFE_MATH, error_model="numpy")        # as what calls them in a kernel


@compiled
def exp_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.exp(x[i])


@compiled
def tanh_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.tanh(x[i])


@compiled
def erf_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.erf(x[i])


@compiled
def exp_below_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.exp_below(x[i])


@compiled
def cdf_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.normal(x[i])[0]


@compiled
def pdf_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.normal(x[i])[1]


@compiled
def sigmoid_loop(x, y):
    for i in range(x.size):
        y[i] = elementary.sigmoid(x[i])


def math_erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def normal_cdf(x):
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))


def normal_pdf(x):
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


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


@pytest.mark.parametrize(("loop", "exact"), [
    (exp_loop, np.exp), (tanh_loop, np.tanh), (erf_loop, math_erf), (exp_below_loop, np.exp)])
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


def test_float32_exp_below_and_then_zero():
    x = np.concatenate([np.linspace(-87.3, 0, 1_000_001), np.linspace(-1, 88, 200_001)]).astype(np.float32)
    error = apply(exp_below_loop, x) / np.exp(x.astype(np.float64)) - 1
    assert (np.abs(error) <= 2.2e-7 + 1.4e-8 * np.abs(x)).all()
    assert (apply(exp_below_loop, np.float32([0.0, -0.0])) == 1).all()
    tiny = apply(exp_below_loop, np.linspace(-88, -87.4, 1001, dtype=np.float32))
    assert (tiny >= 0).all() and tiny.max() < np.finfo(np.float32).tiny
    below = np.array([-88, -90, -103, -1e4, -1e30, -HUGE, -INF, NAN], np.float32)
    np.testing.assert_array_equal(apply(exp_below_loop, below), [0] * 7 + [NAN])


@pytest.mark.parametrize(("loop", "exact"), [(cdf_loop, normal_cdf), (pdf_loop, normal_pdf)])
def test_float32_normal_distribution(loop, exact):
    x = np.linspace(-40, 40, 1_000_001, dtype=np.float32)
    y, expected = apply(loop, x), exact(x.astype(np.float64))
    assert np.abs(y - expected).max() <= 1.8e-7
    for reach, tolerance in ((6, 2e-6), (13, 6e-6)):                        # of the tails as well
        near = np.abs(x) < reach
        np.testing.assert_allclose(y[near], expected[near], rtol=tolerance)
    assert (y[x > 6] <= 1).all() and (y >= 0).all()


def test_sigmoid():
    x = np.concatenate([np.linspace(-87.3, 30, 1_000_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    error = apply(sigmoid_loop, x) * (1 + np.exp(-x.astype(np.float64))) - 1
    assert (np.abs(error) <= 3.5e-7 + 1.4e-8 * np.abs(x)).all()
    far = np.array([-INF, -1e30, -90, -89, 89, 1e30, INF, NAN])
    for dtype in (np.float32, np.float64):
        y = apply(sigmoid_loop, far.astype(dtype))
        np.testing.assert_allclose(y, [0, 0, 0, 0, 1, 1, 1, NAN], rtol=0, atol=1e-38)
        assert y[0] == y[1] == 0


@pytest.mark.parametrize(("loop", "exact"), [(cdf_loop, normal_cdf), (pdf_loop, normal_pdf)])
def test_float64_normal_distribution(loop, exact):
    x = np.linspace(-30, 30, 100_001)
    eps = np.finfo(np.float64).eps                      # of x; it is x² times that of exp(-x² / 2)
    assert (np.abs(apply(loop, x) - exact(x)) <= (4 + 2 * x * x) * eps * exact(x)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values_of_the_normal_distribution(dtype):
    x = np.array([0.0, -0.0, INF, -INF, NAN, 1000, -1000, 1e30, -1e30], dtype)
    np.testing.assert_allclose(apply(cdf_loop, x), [0.5, 0.5, 1, 0, NAN, 1, 0, 1, 0], rtol=1e-7)
    density = 1 / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(apply(pdf_loop, x), [density, density, 0, 0, NAN, 0, 0, 0, 0], rtol=2e-7)


@FUNCTIONS
def test_every_place_in_a_vector_gives_the_same(loop, exact):
    for dtype in (np.float32, np.float64):
        for n in (1, 3, 7, 15, 16, 17, 33, 65):
            x = np.linspace(-3, 3, n, dtype=dtype)
            alone = [apply(loop, x[i:i + 1].copy())[0] for i in range(n)]
            assert ulps(apply(loop, x), np.array(alone, np.float64), dtype).max() <= 2
