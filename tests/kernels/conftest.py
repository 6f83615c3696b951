"""What the tests of the kernels share: how near is near enough, and runs on one thread and on two."""
import importlib

import numba
import numpy as np
import pytest

import kernels
from kernels import memory
from kernels.cpu import TARGET
from kernels.simd import ROUNDS


@pytest.fixture(scope="session")
def close():
    """A function: raises unless actual is expected but for so many roundings of something as large as size.

    expected and size are float64. A rounding counts as one eps, twice what it can be, since in a check of
    float64 the expected value is rounded as well. A sum of n terms is rounded n times; callers that allow √n
    roundings do so because errors of either sign add up like a random walk.
    """
    def check(actual, expected, size, roundings, where=""):
        expected, size = np.asarray(expected, np.float64), np.asarray(size, np.float64)
        assert actual.shape == expected.shape, where
        info = np.finfo(actual.dtype)
        limit = roundings * (info.eps * size + info.smallest_subnormal)
        error = np.abs(actual - expected)
        wrong = np.argwhere(~(error <= np.broadcast_to(limit, error.shape)))
        assert not len(wrong), (f"{where} at {tuple(wrong[0])}: {actual[tuple(wrong[0])]}, expected "
                                f"{expected[tuple(wrong[0])]}; {len(wrong)} of {error.size} are off")
    return check


@pytest.fixture(scope="session")
def same_bits():
    """A function: raises unless two tuples of arrays are the same, bit for bit."""
    def check(first, second, where=""):
        for i, (x, y) in enumerate(zip(first, second, strict=True)):
            assert x.dtype == y.dtype and x.shape == y.shape, where
            first_places = np.argwhere(x != y)[:3].tolist()
            assert x.tobytes() == y.tobytes(), f"{where}: result {i} differs at {first_places}"
    return check


@pytest.fixture(scope="session")
def one_and_two_threads():
    """A function: what f gives on one thread, and on two."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this process has one thread: NUMBA_NUM_THREADS=2 gives it two")

    def run(f):
        before = kernels.get_num_threads()
        try:
            kernels.set_num_threads(1)
            one = f()
            kernels.set_num_threads(2)
            return one, f()
        finally:
            kernels.set_num_threads(before)
    return run


@pytest.fixture
def bf16():
    """float32 is multiplied in bfloat16 while the test runs."""
    if not TARGET.bf16:
        pytest.skip(f"this CPU ({TARGET.name}) has no products in bfloat16")
    kernels.set_matmul_precision("bf16")
    yield
    kernels.set_matmul_precision("highest")


@pytest.fixture
def bf16_attention(bf16, monkeypatch):
    """Products of attention are in bfloat16, of however few keys."""
    if not ROUNDS:
        pytest.skip(f"{TARGET.name}: attention is in float32")
    monkeypatch.setattr("kernels.attention.MANY_KEYS", 1)


@pytest.fixture
def poison():
    """A function that fills all free buffers with NaNs."""
    def fill():
        for buffers in memory._free.values():
            for buffer in buffers:
                buffer.fill(255)
    return fill


@pytest.fixture
def parts(monkeypatch):
    """Attention goes by few keys at a time, so that in its backward pass threads share heads of few keys."""
    attention = importlib.import_module("kernels.attention")
    plans = attention._plan_forward, attention._plan_backward
    monkeypatch.setattr(attention, "KEYS", attention.MULTIPLE)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()
