"""Matrix products against numpy in float64: all remainders, transposed, batched, with bias and activation."""
import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import plan
from kernels.cpu import TARGET
from kernels.matmul import symmetric_matmul

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ODD = (1, 2, 3, 31, 33, 65, 127)
# A Latin square: every pair of sizes for M and K, K and N, M and N.
SQUARE = [(m, ODD[(i + j) % len(ODD)], n) for i, m in enumerate(ODD) for j, n in enumerate(ODD)]
# Around what K is cut into (384, 1536 or 3072), sizes that are no whole tiles, or nearly, and
# rows that lie a multiple of 4096 bytes apart.
EDGES = [(m, 9, 40) for m in (5, 6, 7, 13, 14, 15, 95, 96, 97, 223, 224, 225)]
EDGES += [(9, k, 40) for k in (383, 384, 385, 1023, 1024, 1025, 1535, 1536, 1537, 3071, 3072, 3073)]
EDGES += [(3, 5, n) for n in (4095, 4096, 4097, 8191, 8193)] + [(15, 257, 4097), (9, 600, 5000)]
LARGE = [(1025, 33, 65), (33, 1025, 65), (33, 65, 1025), (1024, 9, 33), (31, 1024, 33)]


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def swapped(x):
    return np.ascontiguousarray(np.swapaxes(x, -1, -2))


def product(a, b, transpose_a, transpose_b):
    """a @ b, from operands that lie in memory as told."""
    a, b = swapped(a) if transpose_a else a, swapped(b) if transpose_b else b
    return kernels.matmul(a, b, transpose_a, transpose_b)


def check_product(close, actual, a, b):
    """A sum of K products, each rounded at most K times: |error| <= K u Σ |a_ik b_kj|."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    close(actual, a @ b, np.abs(a) @ np.abs(b), a.shape[-1] + 2, f"{a.shape} @ {b.shape}")


@BOTH
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_product_equals_numpy(dtype, transpose_a, transpose_b, close):
    for m, k, n in [*SQUARE, *EDGES, *LARGE]:
        a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, seed=1)
        c = product(a, b, transpose_a, transpose_b)
        assert c.dtype == dtype
        check_product(close, c, a, b)


@BOTH
@pytest.mark.parametrize("batches", [
    ((3,), ()), ((), (3,)), ((3,), (3,)), ((1,), (3,)), ((2, 3), (3,)), ((2, 3), ()), ((2, 1), (1, 3)),
    ((2, 1), (3,)), ((17,), (17,)), ((40,), ())])
def test_batches_are_broadcast(dtype, batches, close):
    for transpose_a, transpose_b in itertools.product([False, True], repeat=2):
        a, b = normal(*batches[0], 7, 5, dtype=dtype), normal(*batches[1], 5, 33, dtype=dtype)
        c = product(a, b, transpose_a, transpose_b)
        check_product(close, c, a, b)


@BOTH
def test_a_batch_has_the_bits_of_its_parts(dtype, same_bits):
    a, b = normal(4, 37, 300, dtype=dtype), normal(4, 300, 41, dtype=dtype)
    parts = [kernels.matmul(x, y) for x, y in zip(a, b, strict=True)]
    same_bits([kernels.matmul(a, b)], [np.stack(parts)])
    same_bits([kernels.matmul(a, b[0])], [np.stack([kernels.matmul(x, b[0]) for x in a])])


@BOTH
def test_nothing_to_add_up_gives_zeros(dtype):
    for transposed in (False, True):
        a, b = np.empty((0, 3) if transposed else (3, 0), dtype), np.empty((0, 70), dtype)
        kernels.matmul(np.full((3, 1), 9, dtype), np.full((1, 70), 9, dtype))   # leaves numbers in the memory
        c = kernels.matmul(a, b, transpose_a=transposed)
        assert c.shape == (3, 70) and not c.any()
    assert not kernels.matmul(np.empty((2, 3, 0), dtype), np.empty((2, 0, 4), dtype)).any()


@pytest.mark.parametrize(("a", "b"), [
    ((0, 3), (3, 4)), ((4, 3), (3, 0)), ((0, 0), (0, 0)), ((0, 2, 3), (3, 4)), ((2, 0, 3), (2, 3, 4)),
    ((0, 2, 3), (1, 3, 4))])
def test_empty_results(a, b):
    c = kernels.matmul(np.ones(a), np.ones(b))
    assert c.shape == np.matmul(np.ones(a), np.ones(b)).shape and c.size == 0


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 80), st.integers(0, 99))
def test_products_of_whole_numbers_are_exact(m, k, n, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((m, k), (k, n)))
    np.testing.assert_array_equal(kernels.matmul(a, b), a @ b)


@BOTH
def test_same_bits_on_one_and_two_threads(dtype, one_and_two_threads, same_bits):
    for m, k, n in [(1, 300, 1025), (130, 513, 70), (1025, 33, 31), (7, 257, 4200), (600, 40, 600)]:
        a, b, bias = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype)

        def run(a=a, b=b, bias=bias):
            product = kernels.matmul(a, b, transpose_b=True)
            return product, *kernels.linear_forward(a, b, bias, "gelu_tanh"), kernels.column_sum(a)
        same_bits(*one_and_two_threads(run), f"{m}, {k}, {n}")


CUTS = [{"FAR": 1}, {"NEAR": 1}, {"LARGE": 1}, {"TALLEST": 20}, {"LEAST": 1}, {"MANY": 1}, {"REUSED": 1},
        {"LEAST": 1, "FAR": 1, "NEAR": 1}, {"TALLEST": 33, "LARGE": 1, "FAR": 1}]


@pytest.fixture
def cut(monkeypatch):
    """A function that has products cut up by other numbers; with none, by the usual ones."""
    def by(**numbers):
        monkeypatch.undo()
        for name, value in numbers.items():
            monkeypatch.setattr(plan, name, value)
        plan.plan_product.cache_clear()
    yield by
    by()


def many_products(dtype):
    """Of many or few rows, columns and k, transposed or not, in batches, with epilogues."""
    results = []
    for m, k, n in [(70, 33, 140), (22, 100, 320), (140, 50, 20), (65, 3100, 64), (3, 900, 96)]:
        a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype)
        results += [product(a, b, *swaps) for swaps in itertools.product([False, True], repeat=2)]
        for activation in ACTIVATIONS:
            results += kernels.linear_forward(a, swapped(b), normal(n, dtype=dtype), activation)
    many, few = normal(5, 74, 40, dtype=dtype), normal(40, 96, dtype=dtype)      # and short last tiles
    batch = normal(5, 20, 40, dtype=dtype)                                       # of little A, and one B
    return [*results, kernels.matmul(batch, normal(40, 330, dtype=dtype)), kernels.matmul(many, few),
            kernels.matmul(few.T.copy(), swapped(many)),
            kernels.matmul(many, swapped(many)),
            symmetric_matmul(many, many, transpose_b=True)]


@BOTH
def test_the_bits_are_the_same_however_a_result_is_cut_up(dtype, cut, poison, same_bits):
    expected = many_products(dtype)
    for numbers in CUTS:
        cut(**numbers)
        poison()
        same_bits(many_products(dtype), expected, numbers)


def test_bf16_bits_are_the_same_however_a_result_is_cut_up(bf16, cut, poison, same_bits):
    cut(DEPTH_TILES=2 * plan.DEPTH)                               # which large results have anyway
    expected = many_products(np.float32)
    for numbers in CUTS:
        cut(DEPTH_TILES=2 * plan.DEPTH, **numbers)
        poison()
        same_bits(many_products(np.float32), expected, numbers)


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 30, 64])
def test_any_depth_of_the_parts_of_k_will_do(dtype, depth, cut, poison, close):
    for m, k, n in [(33, 65, 70), (20, 90, 300), (140, 50, 20)]:
        a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype)
        for numbers in ({}, {"LARGE": 1}, {"MANY": 1}):
            cut(DEPTH=depth, **numbers)
            poison()
            for swaps in itertools.product([False, True], repeat=2):
                check_product(close, product(a, b, *swaps), a, b)


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row_or_column(dtype, value, same_bits):
    a, b = normal(33, 300, dtype=dtype), normal(300, 41, dtype=dtype)
    clean = kernels.matmul(a, b)
    for row, k in ((0, 0), (5, 299), (17, 256), (32, 100)):
        bad = a.copy()
        bad[row, k] = value
        expected = clean.copy()
        expected[row] = value * b[k]                         # what is finite does not count beside it
        for c in (kernels.matmul(bad, b), kernels.matmul(swapped(bad), b, transpose_a=True)):
            np.testing.assert_array_equal(c[row], expected[row])
            same_bits([np.delete(c, row, 0)], [np.delete(clean, row, 0)])
    bad = b.copy()
    bad[3, 40] = value
    c = kernels.matmul(a, bad)
    np.testing.assert_array_equal(c[:, 40], a[:, 3] * dtype(value))
    same_bits([c[:, :40]], [clean[:, :40]])


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0)**2,
}


@BOTH
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(dtype, activation, biased, close, same_bits):
    for n, k, m in [(1, 1, 1), (2, 3, 33), (31, 65, 127), (33, 257, 65), (3, 513, 4099), (97, 2, 31),
                    (65, 0, 3), (1037, 7, 1056)]:
        x, weight, bias = normal(n, k, dtype=dtype), normal(m, k, dtype=dtype, seed=1), normal(m, dtype=dtype)
        arguments = x, weight, bias if biased else None
        y, kept = kernels.linear_forward(*arguments, activation)
        before, _ = kernels.linear_forward(*arguments)
        assert y.dtype == before.dtype == dtype
        if activation in (None, "relu2"):
            same_bits([kept], [y])
        else:
            same_bits([y, kept], kernels.gelu_forward(before, activation == "gelu_tanh"))
        x, weight, bias = (v.astype(np.float64) for v in (x, weight, bias * biased))
        size = np.abs(x) @ np.abs(weight.T) + np.abs(bias)
        close(before, x @ weight.T + bias, size, k + 3, f"{n}, {k}, {m}")
        if activation is not None:
            before = before.astype(np.float64)
            expected = ACTIVATIONS[activation](before)
            close(y, expected, expected if activation == "relu2" else np.abs(before), 8, f"{n}, {k}, {m}")


@BOTH
def test_linear_is_a_product_whose_sums_start_from_the_bias_to_the_bit(dtype, same_bits):
    x, weight, bias = normal(35, 300, dtype=dtype), normal(70, 300, dtype=dtype), normal(70, dtype=dtype)
    product = kernels.matmul(x, weight, transpose_b=True)
    same_bits(kernels.linear_forward(x, weight), (product, product))
    x_and_one, with_bias = np.insert(x, 0, 1, axis=1), np.insert(weight, 0, bias, axis=1)
    product = kernels.matmul(x_and_one, with_bias, transpose_b=True)
    same_bits(kernels.linear_forward(x, weight, bias, "gelu"), kernels.gelu_forward(product))


def test_linear_without_rows_or_columns():
    for n, m in ((0, 4), (4, 0), (0, 0)):
        for activation in (None, "gelu_tanh", "relu2"):
            y, kept = kernels.linear_forward(np.ones((n, 3)), np.ones((m, 3)), np.ones(m), activation)
            assert y.shape == kept.shape == (n, m)


@BOTH
def test_linear_keeps_nan_in_its_row(dtype, same_bits):
    x, weight, bias = normal(20, 40, dtype=dtype), normal(33, 40, dtype=dtype), normal(33, dtype=dtype)
    bad = x.copy()
    bad[7, 3] = np.nan
    for activation in ("gelu_tanh", "relu2"):
        clean = kernels.linear_forward(x, weight, bias, activation)
        for y, was in zip(kernels.linear_forward(bad, weight, bias, activation), clean, strict=True):
            assert np.isnan(y[7]).all()
            same_bits([np.delete(y, 7, 0)], [np.delete(was, 7, 0)])


@BOTH
def test_column_sum(dtype, close):
    for n, c in itertools.product((0, *ODD, 1025), (*ODD, 1025)):
        x = normal(n, c, dtype=dtype)
        exact = x.astype(np.float64)
        close(kernels.column_sum(x), exact.sum(axis=0), np.abs(exact).sum(axis=0), n + 1)
    assert kernels.column_sum(np.empty((3, 0), dtype)).shape == (0,)


@pytest.mark.parametrize(("a", "b", "transposed"), [
    ((4, 3), (5, 2), (False, False)), ((4, 3), (4, 2), (False, True)), ((4, 3), (3, 2), (True, False)),
    ((2, 4, 3), (3, 3, 2), (False, False)), ((2, 4, 3), (2, 4, 2), (False, False))])
def test_shapes_that_do_not_fit(a, b, transposed):
    with pytest.raises(ValueError, match=r"matmul|broadcast"):
        kernels.matmul(np.ones(a), np.ones(b), *transposed)


def test_dtypes_are_not_mixed():
    with pytest.raises(TypeError, match=r"float32.*float64"):
        kernels.matmul(np.ones((2, 2), np.float32), np.ones((2, 2)))


@pytest.mark.parametrize(("a", "error"), [
    (np.ones((2, 2), np.int64), TypeError), (np.ones((2, 2), np.float16), TypeError), ([[1.0]], TypeError),
    (np.ones(2), ValueError), (np.float64(1), TypeError)])
def test_what_is_no_matrix_is_refused_by_name(a, error):
    for arguments in ((a, a), (a, np.ones((2, 2))), (np.ones((2, 2)), a)):
        with pytest.raises(error, match="matmul"):
            kernels.matmul(*arguments)
    with pytest.raises(error, match=r"column_sum|matmul"):
        kernels.column_sum(a)


def test_linear_names_the_wrong_argument():
    x, weight, bias = np.ones((4, 3)), np.ones((5, 3)), np.ones(5)
    for error, name, arguments in [
            (ValueError, "weight", (x, np.ones((5, 4)), bias)), (ValueError, "bias", (x, weight, np.ones(4))),
            (ValueError, "x", (np.ones(3), weight, bias)),
            (ValueError, "x", (np.ones((3, 4)).T, weight, bias)),
            (ValueError, "weight", (x, np.ones((3, 5)).T, bias)), (TypeError, "x", (x.astype(int), weight)),
            (TypeError, "weight", (x, weight.astype(np.float32))),
            (TypeError, "bias", (x, weight, bias.astype(np.float32)))]:
        with pytest.raises(error, match=f"linear_forward: {name} "):
            kernels.linear_forward(*arguments)
    for activation in ("relu", True):
        with pytest.raises(ValueError, match=r"linear_forward: activation is .*; it must be None or one of"):
            kernels.linear_forward(x, weight, bias, activation)


# ---- products that are symmetric --------------------------------------------------------------------------

SYMMETRIC = [(1, 3), (14, 1), (31, 33), (32, 32), (65, 127), (225, 1025), (300, 2)]


def check_symmetric(close, m, k, dtype, transpose, count=2, rounded=lambda x: x):
    x = normal(count, k, m, dtype=dtype) if transpose else normal(count, m, k, dtype=dtype)
    c = symmetric_matmul(x, x, transpose, not transpose, scale=0.5, shift=-3.0)
    assert c.dtype == dtype and np.array_equal(c, swapped(c))
    x = rounded(swapped(x) if transpose else x).astype(np.float64)
    size = np.abs(x) @ np.abs(swapped(x)) + 3 * np.eye(m)
    close(c, 0.5 * (x @ swapped(x)) - 3 * np.eye(m), size, k + 4, f"{m} x {k}")


@BOTH
@pytest.mark.parametrize("transpose", [False, True])
def test_a_symmetric_product_is_computed_by_half(dtype, transpose, close):
    for m, k in SYMMETRIC:
        check_symmetric(close, m, k, dtype, transpose)


def test_a_symmetric_product_of_many_columns(close):
    check_symmetric(close, 4097, 5, np.float32, False, count=1)


def test_products_of_symmetric_matrices_that_commute(close):
    x = normal(3, 70, 70)
    gram = symmetric_matmul(x, x, transpose_b=True)
    cube = symmetric_matmul(symmetric_matmul(gram, gram), gram)
    np.testing.assert_allclose(cube, np.linalg.matrix_power(gram, 3), rtol=0, atol=1e-11 * np.abs(cube).max())


def test_a_symmetric_product_has_the_same_bits_on_one_and_two_threads(one_and_two_threads, same_bits):
    for count in (1, 3):
        x = normal(count, 300, 800, dtype=np.float32)
        same_bits(*one_and_two_threads(lambda x=x: [symmetric_matmul(x, x, transpose_b=True)]))


def test_infinity_and_nan_in_a_symmetric_product():
    x = np.ones((1, 40, 3), np.float32)
    x[0, 5, 1], x[0, 35, 0] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = x[0] @ x[0].T
    np.testing.assert_array_equal(symmetric_matmul(x, x, transpose_b=True)[0], expected)


def test_what_cannot_be_symmetric_is_an_error():
    with pytest.raises(ValueError, match=r"b has shape \(2, 3, 4\); it must be \(2, 4, 3\)"):
        symmetric_matmul(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))
    assert symmetric_matmul(np.zeros((0, 3, 4)), np.zeros((0, 4, 3))).shape == (0, 3, 3)


# ---- products in bfloat16 ----------------------------------------------------------------------------------

def as_bf16(x):
    """x rounded to bfloat16, to nearest even, in float64: what a product is made of."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_bf16_rounds_the_operands_and_nothing_else(transpose_a, transpose_b, bf16, close):
    for m, k, n in [*SQUARE, *EDGES, *LARGE]:
        a, b = normal(m, k, dtype=np.float32), normal(k, n, dtype=np.float32, seed=1)
        check_product(close, product(a, b, transpose_a, transpose_b), as_bf16(a), as_bf16(b))


def test_bf16_is_within_a_256th_of_each_product(bf16, close):
    """Two roundings to 8 bits: relative 2**-8 together, for each of the products that are added up."""
    a, b = normal(65, 300, dtype=np.float32), normal(300, 70, dtype=np.float32, seed=1)
    error = np.abs(kernels.matmul(a, b) - a.astype(np.float64) @ b.astype(np.float64))
    assert np.all(error <= (np.abs(a) @ np.abs(b)) * (2**-8 + 1e-4))
    assert error.max() > 1e-3                                             # and it was not float32


def test_bf16_leaves_float64_and_column_sums_alone(bf16, close, same_bits):
    a, b = normal(40, 33), normal(33, 50)
    check_product(close, kernels.matmul(a, b), a, b)
    x = normal(300, 33, dtype=np.float32)
    total = kernels.column_sum(x)
    kernels.set_matmul_precision("highest")
    same_bits([total], [kernels.column_sum(x)])


def test_bf16_batches_and_epilogue(bf16, close):
    a, b = normal(5, 20, 31, dtype=np.float32), normal(5, 31, 40, dtype=np.float32)
    check_product(close, kernels.matmul(a, b), as_bf16(a), as_bf16(b))
    x, weight = a[0], np.ascontiguousarray(b[0].T)
    bias = normal(40, dtype=np.float32)
    before, _ = kernels.linear_forward(x, weight, bias)
    close(before, as_bf16(x) @ as_bf16(weight).T + bias, np.abs(x) @ np.abs(weight.T) + np.abs(bias), 34)
    np.testing.assert_array_equal(kernels.linear_forward(x, weight, bias, "gelu"),
                                  kernels.gelu_forward(before))


@pytest.mark.parametrize("transpose", [False, True])
def test_bf16_in_symmetric_products(transpose, bf16, close):
    for m, k in SYMMETRIC:
        check_symmetric(close, m, k, np.float32, transpose, rounded=as_bf16)


def test_bf16_same_bits_on_one_and_two_threads(bf16, one_and_two_threads, same_bits):
    a, b = normal(200, 700, dtype=np.float32), normal(700, 300, dtype=np.float32)
    columns = swapped(a)                                            # in groups of tiles
    same_bits(*one_and_two_threads(lambda: [kernels.matmul(a, b), kernels.matmul(columns, b, True)]))


@pytest.mark.parametrize(("k", "at"), [(35, 34), (36, 2), (36, 33)])     # alone, by vectors, behind them
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_bf16_keeps_nan_and_infinity(bits, k, at, bf16):
    """NaNs of which only low bits tell them from infinity too."""
    value = np.array([bits], np.uint32).view(np.float32)[0]
    a, b = np.ones((17, k), np.float32), np.ones((k, 40), np.float32)
    a[3, at] = value
    as_columns = [product(swapped(b), swapped(a), False, by_columns).T for by_columns in (False, True)]
    for c in (product(a, b, False, False), product(a, b, True, True), *as_columns):
        np.testing.assert_array_equal(c[3], np.full(40, value))
        assert np.all(np.delete(c, 3, 0) == k)


def test_precision_is_a_threads_own_and_is_checked():
    with pytest.raises(ValueError, match="precision is 'medium'; it must be 'highest' or 'bf16'"):
        kernels.set_matmul_precision("medium")
    if not TARGET.bf16:
        with pytest.raises(RuntimeError, match="has no products in bfloat16"):
            kernels.set_matmul_precision("bf16")
        return
    kernels.set_matmul_precision("bf16")
    try:
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(kernels.get_matmul_precision()))
        thread.start()
        thread.join()
        assert elsewhere == ["highest"] and kernels.get_matmul_precision() == "bf16"
    finally:
        kernels.set_matmul_precision("highest")
