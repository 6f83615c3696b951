"""The kernels that work row by row or element by element, against the same formulas in numpy and float64."""
import itertools
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import kernels as K

EVERY_KERNEL = runpy.run_path(str(Path(__file__).with_name("every_kernel.py")))
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ODD = (1, 2, 3, 31, 33, 65, 127)
SHAPES = [*itertools.product(ODD, repeat=2), (1025, 1), (1, 1025), (1025, 33), (33, 1025), (1025, 1025)]
EMPTY = [(0, 5), (3, 0), (0, 0)]
INF, NAN = math.inf, math.nan
ERF = np.vectorize(math.erf, otypes=[np.float64])


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def total(x):
    """The sum of each row, as a column."""
    return x.sum(axis=1, keepdims=True)


def mean_of(x):
    return x.mean(axis=1, keepdims=True)


# ---- the formulas, in numpy --------------------------------------------------------------------------------

def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / total(e)


def logsumexp(x):
    top = x.max(axis=1)
    return top + np.log(np.exp(x - top[:, None]).sum(axis=1))


def log_softmax(x):
    return x - logsumexp(x)[:, None]


def layernorm(x, gain, bias, eps=1e-5):
    mean, rstd = x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + eps)
    return (x - mean[:, None]) * rstd[:, None] * gain + bias, mean, rstd


def layernorm_backward(dy, x, gain, mean, rstd):
    normed = (x - mean[:, None]) * rstd[:, None]
    h = gain * dy
    dx = rstd[:, None] * (h - mean_of(h) - normed * mean_of(h * normed))
    return dx, (dy * normed).sum(axis=0), dy.sum(axis=0)


def gelu(x, approximate):
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + ERF(x / math.sqrt(2)))


def gelu_backward(dy, x, approximate):
    if approximate:
        t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du)
    return dy * (0.5 * (1 + ERF(x / math.sqrt(2))) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def gelu_and_back(dy, x, approximate):
    return K.gelu_backward(dy, K.gelu_forward(x, approximate)[1])


# ---- values ------------------------------------------------------------------------------------------------

# In float32 a softmax below the normal numbers may be 0: sizes of which this is one rounding.
FLUSHED = float(np.finfo(np.float32).tiny / np.finfo(np.float32).eps)


class Case(NamedTuple):
    """A kernel, its arguments for a shape, the formula, and how large what is rounded on the way is."""
    name: str
    kernel: Callable
    arguments: Callable
    formula: Callable
    sizes: Callable

    def check(self, shape, dtype, close, spread=1.0, more=0):
        """spread: what inputs are multiplied by, so that exponentials underflow; more: roundings allowed."""
        arguments = [(spread * x).astype(dtype) for x in self.arguments(*shape)]
        exact = [x.astype(np.float64) for x in arguments]
        results, expected, sizes = self.kernel(*arguments), self.formula(*exact), self.sizes(*exact)
        if not isinstance(results, tuple):
            results, expected, sizes = (results,), (expected,), (sizes,)
        roundings = more + 20 + math.sqrt(shape[0]) + math.sqrt(shape[1])
        for i, (result, value, size) in enumerate(zip(results, expected, sizes, strict=True)):
            assert result.dtype == dtype
            close(result, value, size, roundings, f"{self.name} of {shape}, result {i}")


def one(n, c):
    return (normal(n, c),)


def two(n, c):
    return normal(n, c), normal(n, c, seed=1)


def with_softmax(n, c):
    return normal(n, c), softmax(normal(n, c, seed=1))


def with_log_softmax(n, c):
    return normal(n, c), log_softmax(normal(n, c, seed=1))


def for_layernorm(n, c):
    return normal(n, c), normal(c), normal(c, seed=1)


def for_layernorm_backward(n, c):
    x = normal(n, c)
    return normal(n, c, seed=1), x, normal(c), x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + 1e-5)


def layernorm_sizes(x, gain, bias):
    y, _, rstd = layernorm(x, np.ones_like(gain), np.zeros_like(bias))
    largest = np.abs(x).max(axis=1)
    lost = 1 + largest * rstd                            # digits that go when the mean is taken away
    return (np.abs(gain) * (np.abs(y) + 1) * lost[:, None] + np.abs(bias), largest, rstd * lost)


def layernorm_backward_sizes(dy, x, gain, mean, rstd):
    normed = np.abs(x - mean[:, None]) * rstd[:, None]
    lost = 1 + np.abs(x) * rstd[:, None]
    h = np.abs(gain * dy)
    dx = h + mean_of(h) + (normed + lost) * mean_of(h * (normed + lost))
    return rstd[:, None] * dx, (np.abs(dy) * (normed + lost)).sum(axis=0), np.abs(dy).sum(axis=0)


CASES = [
    Case("softmax", K.softmax_forward, one, softmax, lambda x: np.maximum(softmax(x), FLUSHED)),
    Case("softmax backward", K.softmax_backward, with_softmax, lambda dy, y: y * (dy - total(dy * y)),
         lambda dy, y: y * (np.abs(dy) + total(np.abs(dy * y)))),
    Case("log_softmax", K.log_softmax_forward, one, log_softmax,
         lambda x: 1 + np.abs(x) + np.abs(logsumexp(x))[:, None]),
    Case("log_softmax backward", K.log_softmax_backward, with_log_softmax,
         lambda dz, z: dz - np.exp(z) * total(dz),
         lambda dz, z: np.abs(dz) + np.exp(z) * (1 + np.abs(z)) * total(np.abs(dz))),
    Case("layernorm", K.layernorm_forward, for_layernorm, layernorm, layernorm_sizes),
    Case("layernorm without bias", lambda x, gain, bias: K.layernorm_forward(x, gain), for_layernorm,
         lambda x, gain, bias: layernorm(x, gain, 0), layernorm_sizes),
    Case("layernorm backward", K.layernorm_backward, for_layernorm_backward, layernorm_backward,
         layernorm_backward_sizes),
    *(Case(f"gelu, approximate {a}", lambda x, a=a: K.gelu_forward(x, a)[0], one,
           lambda x, a=a: gelu(x, a), np.abs)
      for a in (False, True)),
    *(Case(f"gelu backward, approximate {a}", lambda dy, x, a=a: gelu_and_back(dy, x, a), two,
           lambda dy, x, a=a: gelu_backward(dy, x, a), lambda dy, x: np.abs(dy) * (1 + x * x))
      for a in (False, True)),
    Case("relu2", K.relu2_forward, one, lambda x: np.maximum(x, 0)**2, lambda x: x * x),
    Case("relu2 backward", lambda dy, x: K.relu2_backward(dy, np.maximum(x, 0)**2), two,
         lambda dy, x: 2 * dy * np.maximum(x, 0), lambda dy, x: np.abs(dy * x)),
]
NAMES = [case.name for case in CASES]


@BOTH
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_value(case, dtype, close):
    for shape in SHAPES:
        case.check(shape, dtype, close)


@BOTH
@pytest.mark.parametrize("case", CASES[:1] + CASES[4:9], ids=NAMES[:1] + NAMES[4:9])
def test_value_of_large_inputs(case, dtype, close):
    for shape in ((3, 33), (31, 127)):
        case.check(shape, dtype, close, spread=100, more=300)


@BOTH
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_empty(case, dtype):
    for shape in EMPTY:
        with np.errstate(all="ignore"):
            arguments = [np.zeros(s, dtype) for s in empty_shapes(case, shape)]
            results = case.kernel(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        assert results[0].shape == shape and results[0].dtype == dtype
        if shape[0] == 0:
            assert not any(r.any() for r in results)         # sums over no rows are zero


def empty_shapes(case, shape):
    n, c = shape
    return {"layernorm": [shape, (c,), (c,)], "layernorm without bias": [shape, (c,), (c,)],
            "layernorm backward": [shape, shape, (c,), (n,), (n,)]}.get(
                case.name, [shape] * (1 + ("backward" in case.name)))


@pytest.mark.parametrize("columns", [7, 33, 100, 128])
def test_a_row_of_layernorm_has_the_same_bits_alone(columns, same_bits):
    x, gain, bias = (normal(*shape, dtype=np.float32) for shape in ((5, columns), (columns,), (columns,)))
    y, mean, rstd = K.layernorm_forward(x, gain, bias)
    for i in range(len(x)):
        alone = K.layernorm_forward(x[i:i + 1].copy(), gain, bias)
        same_bits(list(alone), [y[i:i + 1], mean[i:i + 1], rstd[i:i + 1]])


def test_layernorm_takes_eps(close):
    x = 1e-3 * normal(5, 33)
    for eps in (1e-12, 1e-5, 1.0):
        close(K.layernorm_forward(x, np.ones(33), eps=eps)[0], layernorm(x, 1, 0, eps)[0], 10, 60)


def test_gelu_takes_any_shape(same_bits):
    x = normal(2, 3, 5, 7)
    for y in (*K.gelu_forward(x), K.gelu_backward(x, x), K.relu2_forward(x), K.relu2_backward(x, x * x),
              K.dropout(x, 0.5, 1)):
        assert y.shape == x.shape
    same_bits([y.ravel() for y in K.gelu_forward(x)], K.gelu_forward(x.ravel()))
    assert K.gelu_forward(np.array(1.0))[0].shape == ()


@BOTH
def test_relu2_knows_its_input_by_its_output_to_the_bit(dtype, same_bits):
    bits = np.finfo(dtype)
    small, large = np.log10(np.sqrt([bits.tiny, bits.max]))
    scales = 10**np.random.default_rng(1).uniform(small + 5, large - 2, 20_000)
    x = (normal(20_000) * scales).astype(dtype)
    dy = normal(20_000, dtype=dtype, seed=2)
    same_bits([K.relu2_backward(dy, K.relu2_forward(x))], [dy * (2 * np.maximum(x, 0))])


# ---- NaN and infinity --------------------------------------------------------------------------------------

def special_rows(columns, dtype):
    """Rows with NaN or infinity in the first, a middle and the last place; and a first row without."""
    rows = [normal(columns)]
    for values in ((NAN,), (INF,), (-INF,), (INF, -INF), (NAN, -INF), (NAN, INF)):
        for place in (0, columns // 2, columns - len(values)):
            row = normal(columns)
            row[place:place + len(values)] = values
            rows.append(row)
    for value in (NAN, INF, -INF):
        rows.append(np.full(columns, value))
    mostly = np.full(columns, -INF)
    mostly[columns // 3] = 0.5
    return np.array([*rows, mostly]).astype(dtype)


def same_kind(actual, expected, where):
    """NaN where NaN is expected, infinities where infinities, and near where finite."""
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=where)


SPECIAL = [
    ("softmax", K.softmax_forward, softmax),
    ("log_softmax", K.log_softmax_forward, log_softmax),
    ("layernorm", lambda x: K.layernorm_forward(x, *np.ones((2, x.shape[1]), x.dtype)),
     lambda x: layernorm(x, 1, 1)),
    *((f"gelu, approximate {a}", lambda x, a=a: K.gelu_forward(x, a)[0],
       lambda x, a=a: gelu(x, a)) for a in (False, True)),
    *((f"gelu backward, approximate {a}", lambda x, a=a: gelu_and_back(x, x, a),
       lambda x, a=a: gelu_backward(x, x, a)) for a in (False, True)),
    ("relu2", K.relu2_forward, lambda x: np.maximum(x, 0)**2),
    ("relu2 backward", lambda x: K.relu2_backward(np.ones_like(x), np.maximum(x, 0)**2),
     lambda x: 2 * np.maximum(x, 0)),
    ("dropout", lambda x: K.dropout(x, 0.0, 1), lambda x: x),
]


@BOTH
@pytest.mark.parametrize(("name", "kernel", "formula"), SPECIAL, ids=[name for name, _, _ in SPECIAL])
def test_nan_and_infinity_go_where_numpy_sends_them(name, kernel, formula, dtype):
    for columns in (3, 5, 33, 67):
        x = special_rows(columns, dtype)
        with np.errstate(all="ignore"):
            expected = formula(x.astype(np.float64))
        actual = kernel(x)
        pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
        for got, wanted in pairs:
            same_kind(got, wanted, f"{name} of {columns} columns")


@BOTH
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_large_numbers_is_the_line_or_zero(dtype, backward, approximate):
    x = np.array([-1e4, -100, -20, 20, 100, 1e4], dtype)
    if backward:
        y, expected = gelu_and_back(np.ones_like(x), x, approximate), x > 0
    else:
        y, expected = K.gelu_forward(x, approximate)[0], np.maximum(x, 0)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-80)


@BOTH
def test_backward_of_softmax_passes_nan_on_in_its_row(dtype, same_bits):
    y, dy = softmax(normal(6, 33)).astype(dtype), normal(6, 33, dtype=dtype, seed=1)
    z = np.log(y)
    clean = K.softmax_backward(dy, y), K.log_softmax_backward(dy, z)
    dy[2, 17] = NAN
    for dx, was in zip((K.softmax_backward(dy, y), K.log_softmax_backward(dy, z)), clean, strict=True):
        assert np.isnan(dx[2]).all()
        same_bits([np.delete(dx, 2, 0)], [np.delete(was, 2, 0)])


@BOTH
def test_masked_places_get_no_gradient(dtype):
    x = normal(5, 33, dtype=dtype)
    x[:, ::3] = -INF
    dy = normal(5, 33, dtype=dtype)
    assert not K.softmax_backward(dy, K.softmax_forward(x))[:, ::3].any()
    z = K.log_softmax_forward(x)
    assert (z[:, ::3] == -INF).all() and np.isfinite(np.delete(z, np.s_[::3], 1)).all()
    np.testing.assert_array_equal(K.log_softmax_backward(dy, z)[:, ::3], dy[:, ::3])


@BOTH
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_bad_row_leaves_the_others_alone(dtype, value, same_bits):
    """More rows than a task takes, to the bit."""
    x = normal(600, 65, dtype=dtype)
    bad = x.copy()
    bad[300, 33] = value
    gain = np.ones(65, dtype)
    targets = np.arange(600) % 65
    for kernel in (K.softmax_forward, K.log_softmax_forward, lambda x: K.layernorm_forward(x, gain)[0],
                   lambda x: K.cross_entropy_forward(x, targets)[0]):
        same_bits([np.delete(kernel(bad), 300, 0)], [np.delete(kernel(x), 300, 0)])


# ---- cross-entropy -----------------------------------------------------------------------------------------

@BOTH
def test_cross_entropy(dtype, close):
    for n, v in SHAPES:
        logits, dlosses = normal(n, v, dtype=dtype), normal(n, dtype=dtype)
        targets = np.random.default_rng(n).integers(0, v, n)
        losses, norms = K.cross_entropy_forward(logits, targets)
        dlogits = K.cross_entropy_backward(dlosses, logits, targets, norms)
        assert losses.dtype == norms.dtype == dlogits.dtype == dtype
        x, rows, roundings = logits.astype(np.float64), np.arange(n), 20 + math.sqrt(v)
        size = 1 + np.abs(x).max(axis=1) + np.abs(logsumexp(x))
        close(norms.sum(axis=1), logsumexp(x), size, roundings)
        close(losses, -log_softmax(x)[rows, targets], size, roundings)
        hot = np.eye(v)[targets]
        d = dlosses.astype(np.float64)[:, None]
        close(dlogits, d * (softmax(x) - hot), np.abs(d) * (softmax(x) * size[:, None] + hot), roundings)


@BOTH
def test_cross_entropy_ignores(dtype, same_bits):
    logits, dlosses = normal(40, 33, dtype=dtype), np.ones(40, dtype)
    targets = np.arange(40) % 33
    full = K.cross_entropy_forward(logits, targets)
    for index in (-100, -1, 5, 1000):
        ignored = np.zeros(40, bool)
        ignored[[3, 4, 39]] = True
        some = np.where(ignored, index, targets)
        ignored |= some == index
        losses, norms = K.cross_entropy_forward(logits, some, index)
        dlogits = K.cross_entropy_backward(dlosses, logits, some, norms, index)
        assert not losses[ignored].any() and not dlogits[ignored].any()
        same_bits([losses[~ignored]], [full[0][~ignored]])
        assert dlogits[~ignored].any(axis=1).all()


def test_cross_entropy_ignores_nan_rows():
    logits = np.full((3, 5), NAN)
    losses, norms = K.cross_entropy_forward(logits, np.array([-100, 1, -100]))
    dlogits = K.cross_entropy_backward(np.ones(3), logits, np.array([-100, 1, -100]), norms)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    np.testing.assert_array_equal(np.isnan(dlogits).all(axis=1), [False, True, False])
    assert not dlogits[[0, 2]].any()


@BOTH
def test_cross_entropy_of_masked_logits(dtype):
    for columns in (3, 33, 67):
        logits = normal(4, columns, dtype=dtype)
        logits[:2, 1:] = -INF                                # one class left: sure, or wrong without end
        logits[2, 1::2] = -INF
        logits[3] = -INF
        targets = np.array([0, 1, 2, 0])
        losses, norms = K.cross_entropy_forward(logits, targets)
        with np.errstate(all="ignore"):
            expected = -log_softmax(logits.astype(np.float64))[np.arange(4), targets]
        same_kind(losses, expected, f"{columns} columns")
        assert losses[0] == 0 and losses[1] == INF and np.isnan(losses[3])
        dlogits = K.cross_entropy_backward(np.ones(4, dtype), logits, targets, norms)
        with np.errstate(all="ignore"):
            expected = softmax(logits.astype(np.float64)) - np.eye(columns)[targets]
        same_kind(dlogits, expected, f"{columns} columns")


@BOTH
@pytest.mark.parametrize("scale", [1e3, 1e4, 1e30])
def test_cross_entropy_of_huge_logits_stays_finite(dtype, scale):
    logits = dtype(scale) * np.eye(33, dtype=dtype) - dtype(scale)
    losses, norms = K.cross_entropy_forward(logits, np.arange(33))
    dlogits = K.cross_entropy_backward(np.ones(33, dtype), logits, np.arange(33), norms)
    assert not losses.any() and not dlogits.any()


@BOTH
def test_a_common_offset_of_the_logits_costs_no_digits(dtype, close):
    """The offset is exact in either dtype: the logits are multiples of 1/64."""
    logits, targets = np.round(normal(40, 33, dtype=dtype) * 64) / 64, np.arange(40) % 33
    far = logits + dtype(2**14)
    assert np.array_equal(far - dtype(2**14), logits)
    x, rows = logits.astype(np.float64), np.arange(40)
    close(K.log_softmax_forward(far), log_softmax(x), 1 + np.abs(log_softmax(x)), 20)
    losses, norms = K.cross_entropy_forward(far, targets)
    close(losses, -log_softmax(x)[rows, targets], 1 + np.abs(log_softmax(x)[rows, targets]), 20)
    dlogits = K.cross_entropy_backward(np.ones(40, dtype), far, targets, norms)
    close(dlogits, softmax(x) - np.eye(33)[targets], np.ones((40, 33)), 20)


@pytest.mark.parametrize("wrong", [-1, 5, -2, 10**9])
def test_targets_out_of_range(wrong):
    logits, targets = np.zeros((3, 5)), np.array([0, wrong, 1])
    for call in (lambda: K.cross_entropy_forward(logits, targets),
                 lambda: K.cross_entropy_backward(np.zeros(3), logits, targets, np.zeros((3, 2)))):
        with pytest.raises(IndexError, match=f"cross_entropy: targets holds {wrong}"):
            call()


def test_cross_entropy_without_rows():
    losses, norms = K.cross_entropy_forward(np.zeros((0, 5)), np.zeros(0, np.int64))
    assert losses.shape == (0,)
    assert K.cross_entropy_backward(losses, np.zeros((0, 5)), np.zeros(0, np.int64), norms).shape == (0, 5)


# ---- embedding ---------------------------------------------------------------------------------------------

@BOTH
def test_embedding(dtype):
    for n, c in SHAPES:
        weight, dy = normal(7, c, dtype=dtype), normal(n, c, dtype=dtype)
        ids = np.random.default_rng(n).integers(0, 7, n)     # repeated, and in no order
        np.testing.assert_array_equal(K.embedding_forward(ids, weight), weight[ids])
        expected = np.zeros((7, c), dtype)
        np.add.at(expected, ids, dy)                         # in order of n, so that the bits are the same
        np.testing.assert_array_equal(K.embedding_backward(dy, ids, 7), expected)
        total = weight.copy()
        assert K.embedding_backward(dy, ids, 7, total) is total
        np.add.at(weight, ids, dy)
        np.testing.assert_array_equal(total, weight)


def test_embedding_of_one_id_adds_up_in_order():
    dy = np.float32(10) ** np.random.default_rng(0).integers(-8, 9, (1000, 65)).astype(np.float32)
    expected = np.zeros(65, np.float32)
    for row in dy:
        expected += row
    np.testing.assert_array_equal(K.embedding_backward(dy, np.full(1000, 2), 4)[2], expected)


def test_embedding_without_ids_and_without_columns():
    none = np.zeros(0, np.int64)
    assert K.embedding_forward(none, np.ones((3, 5))).shape == (0, 5)
    np.testing.assert_array_equal(K.embedding_backward(np.ones((0, 5)), none, 3), np.zeros((3, 5)))
    assert K.embedding_forward(np.zeros(2, np.int64), np.ones((3, 0))).shape == (2, 0)
    assert K.embedding_backward(np.ones((2, 0)), np.zeros(2, np.int64), 3).shape == (3, 0)


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_ids_out_of_range(wrong):
    ids, weight, dy = np.array([0, wrong]), np.ones((3, 5)), np.ones((2, 5))
    for call in (lambda: K.embedding_forward(ids, weight), lambda: K.embedding_backward(dy, ids, 3)):
        with pytest.raises(IndexError, match=f"embedding: ids holds {wrong}; it must be in 0 to 2"):
            call()


def test_numbers_of_32_bits(same_bits):
    x, ids = normal(40, 33, dtype=np.float32), np.random.default_rng(0).integers(0, 33, 40)
    small, dlosses = ids.astype(np.int32), np.ones(40, np.float32)
    losses, norms = K.cross_entropy_forward(x, ids)
    same_bits(K.cross_entropy_forward(x, small), (losses, norms))
    dlogits = K.cross_entropy_backward(dlosses, x, ids, norms)
    same_bits([K.cross_entropy_backward(dlosses, x, small, norms)], [dlogits])
    same_bits([K.embedding_forward(small, x)], [x[ids]])
    same_bits([K.embedding_backward(x, small, 33)], [K.embedding_backward(x, ids, 33)])


# ---- optimizer ---------------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize(("decay", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.1, 0.3)])
def test_adamw(dtype, decay, scale, close):
    lr, beta1, beta2, eps = 1e-2, 0.9, 0.95, 1e-8
    for shape in ((1,), (3,), (33, 65), (127,), (1025, 33)):
        p, g = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
        m, v = np.zeros_like(p), np.zeros_like(p)
        q, mean, square = (x.astype(np.float64) for x in (p, m, v))
        for step in range(1, 8):
            given = g.copy()
            K.adamw([p], [g], [m], [v], [decay], step, lr, beta1, beta2, eps, scale)
            np.testing.assert_array_equal(g, given)
            s = scale * g.astype(np.float64)
            mean, square = beta1 * mean + (1 - beta1) * s, beta2 * square + (1 - beta2) * s * s
            root = np.sqrt(square / (1 - beta2**step))
            q -= lr * decay * q + lr * (mean / (1 - beta1**step)) / (root + eps)
            close(m, mean, 4, 4 * step)
            close(v, square, 16, 4 * step)
            close(p, q, 1 + np.abs(q), 4 * step, f"{shape}, step {step}")
            g = normal(*shape, dtype=dtype, seed=step + 1)


@BOTH
def test_adamw_with_no_gradient_only_decays(dtype, close):
    p, zero = normal(100, dtype=dtype), np.zeros(100, dtype)
    before = p.astype(np.float64)
    K.adamw([p], [zero], [zero.copy()], [zero.copy()], [0.5], 1, 0.1, 0.9, 0.99, 1e-8)
    close(p, before * (1 - 0.1 * 0.5), np.abs(before), 2)


@BOTH
def test_many_parameters_are_updated_as_each_alone(dtype, same_bits):
    """Tasks are cut across them: the shapes make three tasks of five parameters."""
    shapes = [(1,), (150, 150), (0, 3), (7,), (130, 200)]

    def arrays():
        p, g, m, v = ([normal(*shape, dtype=dtype, seed=seed) for shape in shapes] for seed in range(4))
        return p, g, m, [x * x for x in v]

    together, apart, decays = arrays(), arrays(), [0.0, 0.1, 0.2, 0.3, 0.4]
    K.adamw(*together, decays, 3, 1e-3, 0.9, 0.99, 1e-8, 0.5)
    for *each, decay in zip(*apart, decays, strict=True):
        K.adamw(*([x] for x in each), [decay], 3, 1e-3, 0.9, 0.99, 1e-8, 0.5)
    for group, each in zip(together, apart, strict=True):
        same_bits(group, each)
    total = sum(math.fsum(g.astype(np.float64).ravel()**2) for g in together[1])
    assert K.sum_of_squares(together[1]) == pytest.approx(total, rel=1e-13)


def test_adamw_refuses_lists_that_differ():
    with pytest.raises(TypeError, match="adamw: parameters is a ndarray; it must be a list of arrays"):
        K.adamw(X, [X], [X], [X], [0.0], 1, 1e-3, 0.9, 0.99, 1e-8)
    with pytest.raises(ValueError, match="adamw: gradients holds 2 arrays; there are 1 parameters"):
        K.adamw([X], [X, X], [X], [X], [0.0], 1, 1e-3, 0.9, 0.99, 1e-8)
    with pytest.raises(ValueError, match="adamw: decays holds 2 numbers; there are 1 parameters"):
        K.adamw([X], [X], [X], [X], [0.0, 0.0], 1, 1e-3, 0.9, 0.99, 1e-8)
    K.adamw([], [], [], [], [], 1, 1e-3, 0.9, 0.99, 1e-8)
    assert K.sum_of_squares([]) == 0


def test_lists_with_other_arrays_than_in_the_step_before_are_looked_at_anew():
    rows = normal(99, 40)
    for i in range(99):                                  # rows whose ids are those of the row before
        total = math.fsum(rows[i].astype(np.float64)**2)
        assert K.sum_of_squares([rows[i]]) == pytest.approx(total, rel=1e-13)
    arrays = list(np.abs(normal(4, 40)))
    for step in range(1, 9):
        expected = [x.copy() for x in arrays]
        K.adamw(*([x] for x in expected), [0.1], step, 1e-3, 0.9, 0.99, 1e-8)
        K.adamw(*([x] for x in arrays), [0.1], step, 1e-3, 0.9, 0.99, 1e-8)
        np.testing.assert_array_equal(arrays, expected)
        arrays[step % 4] = np.abs(rows[step])
    arrays[0].flags.writeable = False
    with pytest.raises(ValueError, match="parameters holds a read-only array"):
        K.adamw(*([x] for x in arrays), [0.1], 9, 1e-3, 0.9, 0.99, 1e-8)
    long, short = normal(40), normal(3)
    K.adamw([long, long], [long, long], [long, long], [long, long], [0.0] * 2, 1, 1e-3, 0.9, 0.99, 1e-8)
    with pytest.raises(ValueError, match="gradients holds 3 arrays; there are 2 parameters"):
        K.adamw([long, long], [long] * 3, [long] * 2, [long], [0.0] * 2, 1, 1e-3, 0.9, 0.99, 1e-8)
    with pytest.raises(ValueError, match=re.escape("gradients[1] has shape (3,)")):
        K.adamw([long, long], [long, short], [long] * 2, [long] * 2, [0.0] * 2, 1, 1e-3, 0.9, 0.99, 1e-8)


@BOTH
@pytest.mark.parametrize(("shape", "last"), [((3, 5, 7), 3), ((3, 5, 7), 2), ((40, 33, 31), 2),
                                             ((40, 33, 31), 1), ((200, 1000), 0), ((0, 4), 1)])
def test_add_takes_the_shape_of_the_last_axes(dtype, shape, last):
    x, y = normal(*shape, dtype=dtype), normal(*shape[len(shape) - last:], dtype=dtype)
    np.testing.assert_array_equal(K.add(x, y), x + y)
    expected = x + y
    assert K.add(x, y, x) is x
    np.testing.assert_array_equal(x, expected)


@BOTH
def test_sum_of_squares(dtype):
    for shape in [*SHAPES, *EMPTY, (5, 3, 33), ()]:
        x = normal(*shape, dtype=dtype)
        assert K.sum_of_squares([x]) == pytest.approx(math.fsum(x.astype(np.float64).ravel()**2), rel=1e-13)
    assert isinstance(K.sum_of_squares([x]), float)
    huge = np.full(5, np.finfo(np.float32).max, dtype)
    assert K.sum_of_squares([huge]) == pytest.approx(5 * float(huge[0])**2)      # added up in float64
    for value in (NAN, INF, -INF):
        x = np.ones(1025, dtype)
        x[1000] = value
        np.testing.assert_equal(K.sum_of_squares([x]), value * value)


# ---- what holds for all ------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("case", EVERY_KERNEL["CASES"], ids=lambda case: case.__name__)
def test_same_bits_on_one_and_two_threads(case, dtype, one_and_two_threads, same_bits):
    same_bits(*one_and_two_threads(lambda: case(dtype)))
    same_bits(case(dtype), case(dtype))


def test_the_table_has_every_kernel(monkeypatch):
    not_compiled = {"dropout_mask", "flat_mask", "keep_below", "set_num_threads", "get_num_threads",
                    "set_matmul_precision", "get_matmul_precision"}
    called = set()

    def noting(name, kernel):
        return lambda *arguments, **options: called.add(name) or kernel(*arguments, **options)

    for name in K.__all__:
        monkeypatch.setattr(K, name, noting(name, getattr(K, name)))
    for case in EVERY_KERNEL["CASES"]:
        case(np.float32)
    assert called >= set(K.__all__) - not_compiled


X, ROW, COLUMN, IDS = np.ones((4, 3)), np.ones(3), np.ones(4), np.zeros(4, np.int64)
ATTENTION = {"qkv": np.ones((2, 4, 3)), "out": np.ones((2, 4, 1)), "norms": np.ones((2, 1, 4))}
CROSS = {"q": np.ones((2, 3, 2)), "kv": np.ones((2, 5, 4)), "out": np.ones((2, 3, 2)),
         "norms": np.ones((2, 1, 3))}
# A kernel with right arguments by name, and for each of them shapes that are wrong beside the others.
ARGUMENTS = [
    (K.softmax_forward, {"x": X}, {"x": [(3,), (2, 3, 4)]}),
    (K.softmax_backward, {"dy": X, "y": X}, {"dy": [(3,)], "y": [(3, 4), (4, 4), (5, 3), (12,)]}),
    (K.log_softmax_forward, {"x": X}, {"x": [(3,), (2, 3, 4)]}),
    (K.log_softmax_backward, {"dz": X, "z": X}, {"dz": [(3,)], "z": [(3, 4), (4, 4), (5, 3), (12,)]}),
    (K.layernorm_forward, {"x": X, "gain": ROW, "bias": ROW},
     {"x": [(3,)], "gain": [(4,), (1, 3)], "bias": [(2,), ()]}),
    (K.layernorm_backward, {"dy": X, "x": X, "gain": ROW, "mean": COLUMN, "rstd": COLUMN},
     {"dy": [(3,)], "x": [(3, 4), (5, 3)], "gain": [(4,)], "mean": [(3,), (4, 1)], "rstd": [(5,)]}),
    (K.gelu_forward, {"x": X}, {}),
    (K.gelu_backward, {"dy": X, "slope": X}, {"slope": [(3, 4), (12,)]}),
    (K.relu2_forward, {"x": X}, {}),
    (K.relu2_backward, {"dy": X, "y": X}, {"y": [(3, 4), (12,)]}),
    (lambda x: K.dropout(x, 0.5, 1), {"x": X}, {}),
    (K.add, {"x": X, "y": X, "out": X}, {"y": [(3, 4), (12,)], "out": [(3, 4), (3,)]}),
    (K.cross_entropy_forward, {"logits": X, "targets": IDS},
     {"logits": [(3,)], "targets": [(3,), (4, 1), ()]}),
    (K.cross_entropy_backward, {"dlosses": COLUMN, "logits": X, "targets": IDS, "norms": np.ones((4, 2))},
     {"dlosses": [(3,), (4, 1)], "logits": [(4,)], "targets": [(5,)], "norms": [(4,), (3, 2)]}),
    (K.embedding_forward, {"ids": IDS, "weight": X}, {"ids": [(2, 2)], "weight": [(3,)]}),
    (lambda dy, ids, total: K.embedding_backward(dy, ids, 3, total), {"dy": X, "ids": IDS, "total": X[:3]},
     {"dy": [(4,)], "ids": [(3,), (5,)], "total": [(2, 5), (3, 4)]}),
    (lambda x: K.sum_of_squares([X, x]), {"arrays": X}, {}),
    (lambda *arrays: K.adamw(*([x] for x in arrays), [0.0], 1, 1e-3, 0.9, 0.9, 1e-8),
     {"parameters": X, "gradients": X, "firsts": X, "seconds": X},
     {"gradients": [(3, 4)], "firsts": [(12,)], "seconds": [(4,)]}),
    (lambda *arrays: K.muon(*([x] for x in arrays), [1], 1e-3, 0.9, 0.1),
     {"parameters": X, "gradients": X, "momenta": X}, {"gradients": [(3, 4)], "momenta": [(12,)]}),
    (K.orthogonal, {"x": np.ones((2, 4, 3))}, {"x": [(4, 3)]}),
    (lambda qkv: K.rotary_forward(qkv, 1), {"qkv": np.ones((2, 4, 6))}, {"qkv": [(4, 6), (2, 4, 9)]}),
    (lambda dy, y, scales: K.rotary_backward(dy, y, scales, 1),
     {"dy": np.ones((2, 4, 6)), "y": np.ones((2, 4, 6)), "scales": np.ones((8, 2))},
     {"dy": [(4, 6)], "y": [(2, 4, 9)], "scales": [(8, 1), (7, 2)]}),
    (lambda qkv: K.attention_forward(qkv, 1), {"qkv": np.ones((2, 4, 3))}, {"qkv": [(4, 3), (2, 4, 4)]}),
    (lambda *arrays: K.attention_backward(*arrays, 1), {"dout": np.ones((2, 4, 1)), **ATTENTION},
     {"dout": [(2, 4, 3), (4, 1)], "qkv": [(4, 3), (2, 4, 4)], "out": [(2, 5, 1)],
      "norms": [(2, 4, 1), (2, 4)]}),
    (lambda q, kv: K.cross_attention_forward(q, kv, 1), {"q": CROSS["q"], "kv": CROSS["kv"]},
     {"q": [(2, 4), (4, 3)], "kv": [(2, 5, 3), (3, 5, 4), (5, 4)]}),
    (lambda *arrays: K.cross_attention_backward(*arrays, 1), {"dout": np.ones((2, 3, 2)), **CROSS},
     {"dout": [(2, 5, 2), (3, 2)], "q": [(3, 2)], "kv": [(2, 5, 2)], "out": [(2, 5, 2)],
      "norms": [(2, 1, 5)]}),
]
WRONG = [pytest.param(*case, name, id=f"{i}-{name}") for i, case in enumerate(ARGUMENTS) for name in case[1]]


@pytest.mark.parametrize(("kernel", "arguments", "wrong_shapes", "name"), WRONG)
def test_wrong_arguments_are_refused_by_name(kernel, arguments, wrong_shapes, name):
    def refused(error, wrong, named=name):
        with pytest.raises(error, match=rf"^\w+: ({named})(\[\d\])? "):
            kernel(*({key: x.copy() for key, x in arguments.items()} | {name: wrong}).values())

    right = arguments[name]
    kernel(*(x.copy() for x in arguments.values()))
    refused(TypeError, right.tolist())
    refused(TypeError, right.astype(right.dtype.newbyteorder()))
    refused(TypeError, right.astype(np.float64 if right is IDS else np.int64))
    refused(ValueError, np.repeat(right, 2, axis=-1)[..., ::2])
    for shape in wrong_shapes.get(name, []):
        refused(ValueError, np.ones(shape, right.dtype))
    if right is not IDS and sum(x is not IDS for x in arguments.values()) > 1:
        refused(TypeError, right.astype(np.float32), "|".join(arguments))      # one is unlike the others
