"""gradcheck finds what is wrong and says where; the strategies draw what they promise."""
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

import minitensor.linalg
import minitensor.ops
import minitensor.shape  # noqa: F401  (ops register when they are imported)
from minitensor.tensor import Tensor, op
from minitensor.testing import GradientError, gradcheck, strategies


@op()
def halved(x, y):
    return x * y, (lambda g: g * y, lambda g: g * x / 2)

@op()
def incomplete(x):
    return x * x + x, lambda g: g * (2 * x)

@op()
def severed(x):
    return x * x * x, lambda g: g * (3 * (x.data if isinstance(x, Tensor) else x) ** 2)

@op()
def undefined(x):
    return x * 1, lambda g: g * np.where(np.equal(x, 0), np.nan, 1)


@pytest.mark.parametrize(("f", "inputs", "message"), [
    (halved, ([1.0, 2.0], [3.0, 4.0]),
     r"halved, order 1: wrong gradient for argument 1 at index \(0,\)[\s\S]*expected [\s\S]*finite difference"
     r"[\s\S]*found [\s\S]*2 of 2 elements differ[\s\S]*a factor in the vjp: every element is 0.5 times"),
    (incomplete, ([[1.0, 2.0]],), r"argument 0 at index \(0, 0\)[\s\S]*a term missing in the vjp"),
    (severed, ([1.0, 2.0],), r"severed, order 2[\s\S]*found    0 [\s\S]*a graph cut by .data"),
    (undefined, ([1.0, 0.0],), r"index \(1,\)[\s\S]*1 of 2 elements differ[\s\S]*0 / 0 or 0 \* inf"),
])
def test_gradcheck_names_argument_index_and_cause(f, inputs, message):
    with pytest.raises(GradientError, match=message):
        gradcheck(f, *inputs)


def test_gradcheck_passes_what_is_right():
    gradcheck(np.tanh, [[0.3, -0.7]])
    gradcheck(severed, [1.0, 2.0], order=1)
    gradcheck(np.matmul, np.ones((2, 3)), np.ones((3, 2)), order=3)
    gradcheck(lambda x: np.split(x, 2), [1.0, 2.0])
    gradcheck(np.exp, np.ones((0, 2)))
    gradcheck(np.exp, np.float32(0.5))
    gradcheck(lambda x: Tensor(np.ones(2)), [1.0])
    with pytest.raises(TypeError, match="f must return a Tensor or a sequence of them"):
        gradcheck(lambda x: x.numpy(), [1.0])


def test_gradcheck_takes_a_name():
    with pytest.raises(GradientError, match="gradcheck: my op, order 1"):
        gradcheck(lambda x: incomplete(x), [1.0], name="my op")


@given(data=st.data())
def test_strategies_draw_what_they_promise(data):
    first, second, third = data.draw(strategies.broadcastable_shapes(3, min_side=0))
    np.broadcast_shapes(first, second, third)
    shape = data.draw(strategies.shapes(min_dims=1, max_dims=3, min_side=0, max_side=3))
    assert 1 <= len(shape) <= 3 and all(n <= 3 for n in shape)
    x = data.draw(strategies.arrays(shape, np.float32, -1, 1, away_from=(0.5,), gap=1 / 32, distinct=True))
    assert x.shape == shape and x.dtype == np.float32 and np.all((x >= -1) & (x <= 1))
    assert np.all(np.abs(x - 0.5) >= 1 / 32)
    assert x.size < 2 or np.min(np.diff(np.sort(x.ravel()))) >= 1 / 32
    np.sum(x, axis=data.draw(strategies.axes(x.ndim)))
    x[data.draw(strategies.indices(shape))]


@settings(max_examples=50)
@given(st.data())
def test_axes_of_a_scalar(data):
    assert data.draw(strategies.axes(0)) in (None, ())


def test_failures_shrink_to_something_small():
    x = find(strategies.shapes(min_side=0).flatmap(strategies.arrays), lambda x: bool(np.any(x > 1)))
    assert x.size == 1 and x.max() == 1 + 1 / 64


def test_an_order_below_one_would_check_nothing():
    with pytest.raises(ValueError, match="gradcheck: order is 0; it must be at least 1"):
        gradcheck(np.exp, [0.5], order=0)
