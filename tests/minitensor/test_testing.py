"""gradcheck finds what is wrong and says where; the strategies draw what they promise."""
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import minitensor
from minitensor.ops import relu, sigmoid
from minitensor.tensor import Tensor, fused, op
from minitensor.testing import GradientError, check_against, gradcheck, strategies


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


def composed(x):
    return np.sum(incomplete(np.exp(x)))

def cut(x):
    return np.sum(x * x.detach())

def unclear(x):
    return np.abs(x) * 2

def steps(x):
    return x + np.round(x)


CASES = [
    (halved, ([1.0, 2.0], [3.0, 4.0]), """\
gradcheck: halved, order 1: wrong gradient for argument 1 (y) at index (0,):
  input    3
  expected 1.1369617 (finite difference)
  found    0.56848084 (vjp)
  2 of 2 elements differ
  usual cause: a factor in the vjp: every element is 0.5 times what it should be"""),
    (incomplete, ([[1.0, 2.0]],), """\
gradcheck: incomplete, order 1: wrong gradient for argument 0 (x) at index (0, 0):
  input    1
  expected 3.4108851 (finite difference)
  found    2.2739234 (vjp)
  2 of 2 elements differ
  usual cause: a term missing in the vjp, or gradients in the wrong order"""),
    (severed, (2.0,), """\
gradcheck: severed, order 2: wrong gradient for argument 0 (x) at index ():
  input    2
  expected 12 (finite difference)
  found    0 (vjp)
  1 of 1 elements differ
  usual cause: a graph cut by .data, .detach() or a plain array where an op was meant"""),
    (undefined, ([1.0, 0.0],), """\
gradcheck: undefined, order 1: wrong gradient for argument 0 (x) at index (1,):
  input    0
  expected 0.76978671 (finite difference)
  found    nan (vjp)
  1 of 2 elements differ
  usual cause: a vjp that meets 0 / 0 or 0 * inf: make the operand safe before dividing, not after"""),
    (composed, (0.0,), """\
gradcheck: composed, order 1: wrong gradient for argument 0 (x) at index ():
  input    0
  expected 3 (finite difference)
  found    2 (vjp)
  1 of 1 elements differ
  usual cause: a factor in the vjp: every element is 0.666667 times what it should be
and in it: op 'incomplete', order 1: wrong gradient for argument 0 at index ():
  input    1
  expected 3 (finite difference)
  found    2 (vjp)
  1 of 1 elements differ
  usual cause: a factor in the vjp: every element is 0.666667 times what it should be"""),
    (cut, (2.0,), """\
gradcheck: cut, order 1: wrong gradient for argument 0 (x) at index ():
  input    2
  expected 4 (finite difference)
  found    2 (vjp)
  1 of 1 elements differ
  usual cause: a factor in the vjp: every element is 0.5 times what it should be
no op in it of up to 1000 elements is wrong by itself"""),
    (unclear, (-0.0005,), """\
gradcheck: unclear, order 1: wrong gradient for argument 0 (x) at index ():
  input    -0.0005
  expected -1.1666667 (finite difference)
  found    -2 (vjp)
  1 of 1 elements differ
  cause: a kink at 0, nearer than 2 eps: the slope is -2 before it and 2 after
  stay away: strategies.arrays(..., away_from=[0]), and distinct=True where two operands meet
and in it: op 'abs', order 1: wrong gradient for argument 0 at index ():
  input    -0.0005
  expected -0.58333333 (finite difference)
  found    -1 (vjp)
  1 of 1 elements differ
  cause: a kink at 0, nearer than 2 eps: the slope is -1 before it and 1 after
  stay away: strategies.arrays(..., away_from=[0]), and distinct=True where two operands meet"""),
]


@pytest.mark.parametrize(("f", "inputs", "message"), CASES, ids=[f.__name__ for f, *_ in CASES])
def test_gradcheck_names_argument_index_and_cause(f, inputs, message):
    with pytest.raises(GradientError) as caught:
        gradcheck(f, *inputs)
    assert str(caught.value) == message


STAY = "  stay away: strategies.arrays(..., away_from=[{}]), and distinct=True where two operands meet"


@pytest.mark.parametrize(("f", "inputs", "cause"), [
    (relu, (0.0007,),
     "a kink at 0, nearer than 2 eps: the slope is 0 before it and 1 after\n" + STAY.format(0)),
    (relu, ([1.0, -0.0019],),
     "a kink at 0, nearer than 2 eps: the slope is 0 before it and 0.7698 after\n" + STAY.format(0)),
    (np.maximum, (1.0, 1.0005),
     "a kink at 1.0005, nearer than 2 eps: the slope is 0 before it and 1 after\n" + STAY.format(1.0005)),
    (steps, (0.5,), "a jump at 0.5, nearer than 2 eps\n" + STAY.format(0.5)),
    (np.abs, (0.0,), "a jump at 0, nearer than 2 eps\n" + STAY.format(0)),             # of the gradient
    (np.log, (0.0015,), "f is nan at -0.001, nearer than 2 eps; stay inside its domain"),
    (np.sqrt, ([1.0, 0.0],), "f is nan at -0.0025, nearer than 2 eps; stay inside its domain"),
])
def test_gradcheck_sees_kinks_jumps_and_edges(f, inputs, cause):
    with pytest.raises(GradientError) as caught:
        gradcheck(f, *inputs)
    assert f"\n  cause: {cause}" in str(caught.value)


@given(strategies.arrays((), low=-4, high=4))
@settings(max_examples=20)
def test_a_wrong_vjp_of_a_smooth_function_is_not_taken_for_a_kink(x):
    @op()
    def wrong(x):
        return np.tanh(3 * x) + x * x * x, lambda g: g * 100

    with pytest.raises(GradientError, match="1 of 1 elements differ\n  usual cause"):
        gradcheck(wrong, x)


def test_gradcheck_passes_what_is_right():
    gradcheck(np.tanh, [[0.3, -0.7]])
    gradcheck(np.tanh, Tensor([[0.3, -0.7]]))
    gradcheck(severed, [1.0, 2.0], order=1)
    gradcheck(np.matmul, np.ones((2, 3)), np.ones((3, 2)), order=3)
    gradcheck(np.exp, 0.5, order=5)
    gradcheck(lambda x: np.split(x, 2), [1.0, 2.0])
    gradcheck(np.exp, np.ones((0, 2)))
    gradcheck(np.exp, np.float32(0.5))
    gradcheck(lambda x: Tensor(np.ones(2)), [1.0])


def test_gradcheck_names_functions_by_what_they_are():
    line = test_gradcheck_names_functions_by_what_they_are.__code__.co_firstlineno + 3
    for f, name in (
        (lambda x: incomplete(x), f"<lambda> \\(test_testing.py:{line}\\)"),
        (functools.partial(incomplete), "incomplete"),
    ):
        with pytest.raises(GradientError, match=f"gradcheck: {name}, order 1"):
            gradcheck(f, 1.0)
    with pytest.raises(GradientError, match="gradcheck: my op, order 1"):
        gradcheck(lambda x: incomplete(x), [1.0], name="my op")


@pytest.mark.parametrize(("wrong", "kind", "message"), [
    (lambda: gradcheck(np.exp, [1, 2]), TypeError,
     "gradcheck: argument 0 is an array of int64, and only real numbers have a gradient; write 1.0 for 1, or "
     "x.astype(float). Ids, targets and masks are no arguments: leave them in a closure, as in "
     "gradcheck(lambda x: f(x, ids), x)"),
    (lambda: gradcheck(np.multiply, 1.0, True), TypeError, "gradcheck: argument 1 is an array of bool, "),
    (lambda: check_against(minitensor.softmax, [1, 2]), TypeError, "check_against: argument 0 is an array"),
    (lambda: gradcheck(np.exp, [0.5], order=0), ValueError, "gradcheck: order is 0; it must be at least 1"),
    (lambda: gradcheck(lambda x: x.numpy(), [1.0]), TypeError,
     "gradcheck: f must return a Tensor or a sequence of them, made by ops"),
    (lambda: gradcheck(noisy, np.ones(8)), ValueError,
     "for the same inputs, so its differences mean nothing; fix what is random in it: "
     "dropout(x, p, seed=0), or minitensor.seed(0) on its first line"),
    (lambda: check_against(np.exp, [1.0]), ValueError,
     "check_against: exp ran no fused op, so that unfused() changes nothing; "
     "give reference=, the same function in ops"),
    (lambda: strategies.arrays((), low=0.1, high=0.2, gap=0.5), ValueError,
     "arrays: no multiple of gap=0.5 lies between low=0.1 and high=0.2, away from ()"),
])
def test_wrong_uses_are_explained(wrong, kind, message):
    with pytest.raises(kind) as caught:
        wrong()
    assert message in str(caught.value)


def noisy(x):
    return minitensor.dropout(x, 0.5)


# ---- check_against -----------------------------------------------------------------------------------------

def swish_reference(x):
    return x * sigmoid(x)

def swish(name):
    """A fused op, right or wrong."""
    def body(x):
        s = 1 / (1 + np.exp(-x))
        dx = s + x * s * (1 - s)
        if name == "value":
            return x * s + (1e-4 if x.dtype == np.float32 else 0), lambda g: g * dx
        if name == "gradient":
            return x * s, lambda g: g * s
        if name == "shape":
            return (x * s)[None], lambda g: g[0] * dx
        if name == "dtype":
            return (x * s).astype(np.float64), lambda g: (g * dx).astype(x.dtype)
        return x * s, lambda g: g * dx
    body.__name__ = name
    return fused(reference=swish_reference)(body)


@given(strategies.shapes().flatmap(strategies.arrays))
@settings(max_examples=10)
def test_check_against_passes_what_is_right(x):
    check_against(swish("right"), x)
    check_against(np.tanh, x, reference=lambda x: 2 * sigmoid(2 * x) - 1)
    check_against(minitensor.softmax, x[None])
    check_against(lambda x: minitensor.layernorm(x * x, np.ones(5, x.dtype)), np.arange(10.0).reshape(2, 5))


@pytest.mark.parametrize(("name", "message"), [
    ("value", "check_against: value in float32: wrong value at index ():\n  expected 0.73105858 (reference)\n"
              "  found    0.73115861 (fused op)\n  1 of 1 elements differ by more than 1e-05 of the largest"),
    ("gradient", "check_against: gradient in float64: wrong gradient for argument 0 (x) at index ():\n"
                 "  expected 0.92767051 (reference)\n  found    0.73105858 (fused op)\n"
                 "  1 of 1 elements differ by more than 1e-10 of the largest"),
    ("shape", "check_against: shape in float64: wrong value: it is float64 of shape (1,), "
              "and should be float64 of shape (), as the reference's"),
    ("dtype", "check_against: dtype in float32: wrong value: it is float64 of shape (), "
              "and should be float32 of shape (), as the reference's"),
])
def test_check_against_says_what_differs(name, message):
    with pytest.raises(GradientError) as caught:
        check_against(swish(name), 1.0)
    assert str(caught.value) == message


def test_check_against_sees_a_gradient_that_is_memory_of_an_input():
    @fused(reference=lambda x: x * x / 2)
    def half_square(x):
        return x * x / 2, lambda g: x                           # right for g = 1, but not its own

    with pytest.raises(GradientError) as caught:
        check_against(half_square, 1.0)
    assert str(caught.value) == ("check_against: half_square: the gradient for argument 0 is memory of an "
                                 "input, the value or another gradient; hand back an array of its own")


# ---- strategies --------------------------------------------------------------------------------------------

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


ARRAYS = strategies.shapes(min_side=0).flatmap(strategies.arrays)


@pytest.mark.parametrize(("drawn", "fails", "smallest"), [
    (strategies.shapes(min_side=0), lambda shape: True, ()),
    (strategies.shapes(), lambda shape: math.prod(shape) > 2, (3,)),
    (strategies.broadcastable_shapes(2), lambda shapes: True, ((), ())),
    (strategies.broadcastable_shapes(2), lambda shapes: shapes[0] != shapes[1], ((1,), ())),
    (ARRAYS, lambda x: True, np.zeros(())),
    (ARRAYS, lambda x: np.any(x > 0), np.ones(())),
    (ARRAYS, lambda x: np.any(x < 0), np.array(-1.0)),
    (ARRAYS, lambda x: np.any(x != np.round(x)), np.full((), 0.5)),
    (ARRAYS, lambda x: x.ndim == 2, np.zeros((0, 0))),
    (strategies.arrays((2,), away_from=(0, 1)), lambda x: True, -np.ones(2)),
    (strategies.axes(3), lambda axis: True, None),
    (strategies.axes(3), lambda axis: isinstance(axis, tuple) and len(axis) > 1, (0, 1)),
    (strategies.indices((3, 3)), lambda index: isinstance(index, tuple) and len(index) > 1, (0, 0)),
    (strategies.indices((3, 3)), lambda index: isinstance(index, tuple) and None in [
        None if part is None else 0 for part in index], (None, 0, 0)),
])
def test_failures_shrink_to_the_simplest(drawn, fails, smallest):
    found = find(drawn, lambda x: bool(fails(x)), settings=settings(max_examples=500, database=None))
    assert repr(found) == repr(smallest)


def test_a_failing_gradcheck_shrinks_to_one_number():
    @given(ARRAYS)
    @settings(database=None, phases=[Phase.generate, Phase.shrink])
    def test_incomplete(x):
        gradcheck(incomplete, x)

    with pytest.raises(GradientError) as caught:
        test_incomplete()
    assert "index ():\n  input    0\n  expected 1 (finite difference)\n  found    0 (vjp)" in str(
        caught.value)
    assert "x=array(0.)" in caught.value.__notes__[0]


# ---- in a project of the user's own ------------------------------------------------------------------------

PROJECT = """
import numpy as np
from hypothesis import given
import minitensor as mt
from minitensor.testing import check_against, gradcheck, strategies

@mt.op()
def cube(x):
    return x * x * x, lambda g: g * ({} * x * x)

@mt.fused(reference=lambda x: x ** 3)
def fused_cube(x):
    return x * x * x, lambda g: g * ({} * x * x)

@given(strategies.shapes().flatmap(strategies.arrays))
def test_cube(x):
    gradcheck(cube, x)

@given(strategies.shapes().flatmap(strategies.arrays))
def test_fused_cube(x):
    check_against(fused_cube, x)
"""


PROFILE = """
from hypothesis import settings
settings.register_profile("few", max_examples=10, deadline=None)
settings.load_profile("few")
"""


def test_a_users_own_project(tmp_path):
    (tmp_path / "conftest.py").write_text(PROFILE)
    (tmp_path / "test_right.py").write_text(PROJECT.format(3, 3))
    (tmp_path / "test_wrong.py").write_text(PROJECT.format(2, 2))
    root = str(Path(minitensor.__file__).parents[1])
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False)
    for said in ("2 failed, 2 passed",
                 "FAILED test_wrong.py::test_cube", "FAILED test_wrong.py::test_fused_cube",
                 "gradcheck: cube, order 1: wrong gradient for argument 0 (x) at index ():",
                 "expected 3 (finite difference)", "found    2 (vjp)", "x=array(1.)",
                 "every element is 0.666667 times what it should be",
                 "check_against: fused_cube in float64: wrong gradient for argument 0 (x) at index ():"):
        assert said in run.stdout, f"{said}\n{run.stdout}{run.stderr}"
