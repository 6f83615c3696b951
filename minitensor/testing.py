"""Test an op of your own: its vjp against finite differences, its fused form against its reference.

An op in five lines has broadcasting, second derivatives, numpy's dispatch and a place in the trace:

>>> import numpy as np
>>> import minitensor as mt
>>> @mt.op()
... def softplus(x):
...     "log(1 + exp(x)), without overflow."
...     y = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
...     return y, lambda g: g * mt.sigmoid(x)

Its test in three, under pytest and hypothesis, in any project:

>>> from hypothesis import Phase, given, settings
>>> from minitensor.testing import GradientError, check_against, gradcheck, strategies
>>> brief = settings(max_examples=9, derandomize=True, phases=[Phase.generate, Phase.shrink])  # for this page
>>> @brief
... @given(strategies.shapes().flatmap(strategies.arrays))
... def test_softplus(x):
...     gradcheck(softplus, x)                              # the vjp, and the vjp of the vjp
>>> test_softplus()

What a wrong vjp looks like: hypothesis draws arrays until one fails, then looks for the smallest and simplest
that does, here two numbers:

>>> @mt.op()
... def scaled(x, y):
...     return x * y, (lambda g: g * y, lambda g: g)         # and x, in the second?
>>> from hypothesis import strategies as st
>>> pairs = strategies.broadcastable_shapes(2).flatmap(lambda s: st.tuples(*map(strategies.arrays, s)))
>>> @brief
... @given(pairs)
... def test_scaled(pair):
...     gradcheck(scaled, *pair)
>>> try:
...     test_scaled()
... except GradientError as error:
...     print(error, error.__notes__[0].splitlines()[1], sep="\\n")
gradcheck: scaled, order 1: wrong gradient for argument 1 (y) at index ():
  input    0
  expected 0 (finite difference)
  found    1 (vjp)
  1 of 1 elements differ
  usual cause: a term missing in the vjp, or gradients in the wrong order
    pair=(array(0.), array(0.)),

A fused op is a body with a kernel of its own and a reference composed of ops; the two must agree:

>>> def reference(x):
...     return x * mt.sigmoid(x)
>>> @mt.fused(reference=reference)
... def swish(x):
...     s = 1 / (1 + np.exp(-x))                            # a kernel's place
...     return x * s, lambda g: g * (s + x * s * (1 - s))
>>> @brief
... @given(strategies.shapes(min_side=0).flatmap(strategies.arrays))
... def test_swish(x):
...     check_against(swish, x)                             # in float64 and in float32
>>> test_swish()

`strategies` draws shapes, arrays, axes and indices; only asking for it imports hypothesis.
"""
from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitensor.tensor import Node, Tensor, grad, unfused

LARGE = 1000                                # an op with more elements is not looked at by itself


class GradientError(AssertionError):
    """A vjp and the finite differences of its function disagree, or a fused op and its reference."""


# ---- gradcheck ---------------------------------------------------------------------------------------------

def gradcheck(f: Callable, *inputs: Any, order: int = 2, eps: float = 1e-3, rtol: float = 1e-6,
              atol: float = 1e-8, name: str | None = None) -> None:
    """Check the gradients of f at inputs against central differences of fourth order, element by element.

    f: takes as many Tensors as there are inputs, returns one or several; options go into a closure.
    inputs: arrays of floats, or Tensors, raised to float64. order: 2 checks the gradient of the gradient too,
    3 the next. eps: the step, times max(1, |x|); no kink may be nearer than two steps. rtol, atol: of the
    element, and of the largest element.
    Raises GradientError, which names the function, in it the op, the argument, the index, and what usually
    causes it; TypeError for integers, ValueError for an f that gives another value each time.

    >>> gradcheck(np.matmul, [[0.5, 1.0]], [[2.0], [-1.0]], order=3)
    >>> from minitensor import relu
    >>> gradcheck(relu, 1e-4)
    Traceback (most recent call last):
    minitensor.testing.GradientError: gradcheck: relu, order 1: wrong gradient for argument 0 (x) at index ():
      input    0.0001
      expected 0.55833333 (finite difference)
      found    1 (vjp)
      1 of 1 elements differ
      cause: a kink at 0, nearer than 2 eps: the slope is 0 before it and 1 after
      stay away: strategies.arrays(..., away_from=[0]), and distinct=True where two operands meet
    """
    if order < 1:
        raise ValueError(f"gradcheck: order is {order}; it must be at least 1")
    arrays = _floats("gradcheck", inputs)
    name = name or _name(f)
    _check_repeatable(_projected(f), arrays, name)
    derivative = f
    for level in range(1, order + 1):
        scalar = _projected(derivative)
        try:
            _check(scalar, arrays, _arguments(f, len(arrays)), f"{name}, order {level}", eps, rtol, atol)
        except GradientError as error:
            raise GradientError(f"{error}{_blame(f, arrays, level, eps, rtol, atol)}") from None
        derivative = _gradient(scalar)


def _floats(name: str, inputs: Sequence) -> list[np.ndarray]:
    """The inputs in float64; TypeError for integers, which have no gradient."""
    arrays = [np.array(x.data if isinstance(x, Tensor) else x) for x in inputs]
    for i, array in enumerate(arrays):
        if array.dtype.kind != "f":
            raise TypeError(f"{name}: argument {i} is an array of {array.dtype}, and only real numbers "
                            "have a gradient; write 1.0 for 1, or x.astype(float). Ids, targets and masks "
                            "are no arguments: leave them in a closure, as in "
                            f"{name}(lambda x: f(x, ids), x)")
    return [array.astype(np.float64) for array in arrays]


def _name(f: Callable) -> str:
    """What to call f: its name, and for a lambda where it is written."""
    f = getattr(f, "func", f)                               # a functools.partial's
    name = getattr(f, "__name__", type(f).__name__)
    if name == "<lambda>":
        return f"<lambda> ({Path(f.__code__.co_filename).name}:{f.__code__.co_firstlineno})"
    return name


def _arguments(f: Callable, count: int) -> list[str]:
    """Each argument's number, with its name where f says it."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):                         # a builtin may have no signature
        return [str(i) for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [f"{i} ({names[i]})" if i < len(names) else str(i) for i in range(count)]


def _check_repeatable(scalar: Callable, arrays: list[np.ndarray], name: str) -> None:
    first, second = (scalar(*map(Tensor, arrays)).item() for _ in range(2))
    if not np.array_equal(first, second, equal_nan=True):
        raise ValueError(f"gradcheck: {name} gave {first:.6g}, then {second:.6g} for the same inputs, so its "
                         "differences mean nothing; fix what is random in it: dropout(x, p, seed=0), or "
                         "minitensor.seed(0) on its first line")


def _projected(f: Callable) -> Callable:
    """The scalar that a fixed random cotangent makes of f's outputs."""
    def scalar(*inputs: Tensor) -> Tensor:
        outputs = f(*inputs)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise TypeError("gradcheck: f must return a Tensor or a sequence of them, made by ops")
        return sum((np.sum(y * _cotangent(i, y)) for i, y in enumerate(outputs)), Tensor(np.zeros(())))
    return scalar


def _cotangent(i: int, y: Tensor) -> np.ndarray:
    """Weights no two of which are alike; of a single number 1, so that its gradient is reported as it is."""
    return np.random.default_rng(i).uniform(0.5, 1.5, y.shape) if y.size != 1 else np.ones(y.shape)


def _gradient(scalar: Callable, create_graph: bool = True) -> Callable:
    """The gradient of a scalar function, for each of its inputs: zeros where nothing depends on them."""
    def gradients(*inputs: Tensor) -> Sequence[Tensor]:
        y = scalar(*inputs)
        if not y.requires_grad:
            return [Tensor(np.zeros(x.shape)) for x in inputs]
        return grad(y, inputs, create_graph=create_graph)
    return gradients


def _check(scalar: Callable, arrays: list, arguments: list[str], name: str, eps: float, rtol: float,
           atol: float) -> None:
    def value(position: int, index: tuple[int, ...], x: float) -> float:
        moved = [array.copy() if i == position else array for i, array in enumerate(arrays)]
        moved[position][index] = x
        with np.errstate(all="ignore"):                     # outside f's domain: _roughness says so
            return scalar(*(Tensor(array, requires_grad=True) for array in moved)).item()

    with np.errstate(all="ignore"):
        found = _gradient(scalar, create_graph=False)(*(Tensor(x, requires_grad=True) for x in arrays))
    for position, array in enumerate(arrays):
        expected = np.empty_like(array)
        for index in np.ndindex(array.shape):
            x = float(array[index])
            h = eps * max(1.0, abs(x))
            near = value(position, index, x + h) - value(position, index, x - h)
            far = value(position, index, x + 2 * h) - value(position, index, x - 2 * h)
            expected[index] = (8 * near - far) / (12 * h)
        vjp = found[position].data
        largest = np.max(np.abs(expected), initial=1, where=np.isfinite(expected))
        wrong = ~np.isclose(vjp, expected, rtol=rtol, atol=atol * largest)
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            x = float(array[index])
            cause = _roughness(functools.partial(value, position, index), x, eps * max(1.0, abs(x)))
            raise GradientError(
                f"gradcheck: {name}: wrong gradient for argument {arguments[position]} at index {index}:\n"
                f"  input    {x:.6g}\n"
                f"  expected {expected[index]:.8g} (finite difference)\n"
                f"  found    {vjp[index]:.8g} (vjp)\n"
                f"  {np.count_nonzero(wrong)} of {wrong.size} elements differ\n"
                f"  {cause or 'usual cause: ' + _cause(name, expected, vjp, wrong)}")


def _cause(name: str, expected: np.ndarray, found: np.ndarray, wrong: np.ndarray) -> str:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found / expected
        constant = wrong.all() and np.isfinite(ratio).all() and np.ptp(ratio) < 1e-6
    if not np.isfinite(found[wrong]).all():
        return "a vjp that meets 0 / 0 or 0 * inf: make the operand safe before dividing, not after"
    if not found.any():
        return "a graph cut by .data, .detach() or a plain array where an op was meant"
    if constant:
        return f"a factor in the vjp: every element is {ratio.flat[0]:.6g} times what it should be"
    if "order 1" in name:
        return "a term missing in the vjp, or gradients in the wrong order"
    return "a vjp that is right but not made of ops of its inputs, so that its own gradient lacks terms"


def _roughness(f: Callable, x: float, h: float) -> str:
    """What keeps f from being smooth within 2 h of x: a kink, a jump, or the edge of where it is defined.

    On a fine grid a smooth function's second differences are all small; a kink's is large, and a jump's are
    two large ones that cancel.
    """
    step = h / 8
    grid = x + step * np.arange(-20, 21)
    y = np.array([f(t) for t in grid])
    if not np.isfinite(y).all():
        edge = grid[~np.isfinite(y)][0]
        return f"cause: f is {y[~np.isfinite(y)][0]} at {edge:.6g}, nearer than 2 eps; stay inside its domain"
    bends = np.diff(y, 2)
    k = int(np.argmax(np.abs(bends)))
    noise = 1e4 * np.finfo(float).eps * np.max(np.abs(y))
    if abs(bends[k]) <= 20 * np.median(np.abs(bends)) + noise:
        return ""
    near = slice(max(k - 2, 0), k + 3)
    place = float(np.average(grid[1:-1][near], weights=np.abs(bends[near])))
    slopes = np.diff(y) / step
    before, after = slopes[max(k - 2, 0)], slopes[min(k + 3, len(slopes) - 1)]
    what = "kink" if abs(bends[near].sum()) > 0.5 * abs(bends[k]) else "jump"
    place = round(place, 9 if what == "kink" else 3) + 0.0  # of a jump the grid tells no more; and no -0
    slopes_are = f": the slope is {before:.4g} before it and {after:.4g} after" if what == "kink" else ""
    return (f"cause: a {what} at {place:.6g}, nearer than 2 eps{slopes_are}\n"
            f"  stay away: strategies.arrays(..., away_from=[{place:.6g}]), and distinct=True where two "
            "operands meet")


def _blame(f: Callable, arrays: list[np.ndarray], order: int, eps: float, rtol: float, atol: float) -> str:
    """Which of the ops that f is composed of is wrong by itself."""
    outputs = f(*(Tensor(x, requires_grad=True) for x in arrays))
    nodes = [node for y in ([outputs] if isinstance(outputs, Tensor) else outputs) for node in _nodes(y)]
    if len(nodes) < 2:
        return ""
    for node in nodes:
        places = [i for i, x in enumerate(node.inputs) if isinstance(x, Tensor)]
        if sum(node.inputs[i].size for i in places) > LARGE:
            continue

        def alone(*tensors: Tensor, node: Node = node, places: list[int] = places) -> Any:
            inputs = list(node.inputs)
            for i, tensor in zip(places, tensors, strict=True):
                inputs[i] = tensor
            return node.op(*inputs, **node.options)

        derivative: Callable = alone
        for level in range(1, order + 1):
            try:
                _check(_projected(derivative), [node.inputs[i].data for i in places], list(map(str, places)),
                       f"op '{node.op.__name__}', order {level}", eps, rtol, atol)
            except GradientError as error:
                return f"\nand in it: {str(error).removeprefix('gradcheck: ')}"
            derivative = _gradient(_projected(derivative))
    return f"\nno op in it of up to {LARGE} elements is wrong by itself"


def _nodes(y: Tensor) -> Iterator[Node]:
    """The recorded ops below y, in the order in which they ran."""
    found: dict[int, Node] = {}
    waiting = [y]
    while waiting:
        node = waiting.pop().node
        if node is not None and node.serial not in found:
            found[node.serial] = node
            waiting.extend(x for x in node.inputs if isinstance(x, Tensor))
    return (found[serial] for serial in sorted(found))


# ---- check_against -----------------------------------------------------------------------------------------

def check_against(f: Callable, *inputs: Any, reference: Callable | None = None, float64: float = 1e-10,
                  float32: float = 1e-5, name: str | None = None) -> None:
    """Check the value and the gradients of a fused op at inputs against its reference, in both dtypes.

    f: takes as many Tensors as there are inputs, returns one; options go into a closure. inputs: arrays of
    floats. reference: a function of the same inputs, run in float64; left out, it is f under `unfused()`,
    where every fused op runs the reference that it names. float64, float32: the tolerance of each, times the
    largest element (or 0.01, where all of it has cancelled).
    Raises GradientError, which names the dtype, the argument and the index; also where a gradient is memory
    of something else, as the walk adds into what a fused op hands back.

    >>> import minitensor as mt
    >>> check_against(mt.softmax, np.ones((2, 3)))
    >>> check_against(mt.gelu, [0.5], reference=mt.relu)
    Traceback (most recent call last):
    minitensor.testing.GradientError: check_against: gelu in float64: wrong value at index (0,):
      expected 0.5 (reference)
      found    0.34573123 (fused op)
      1 of 1 elements differ by more than 1e-10 of the largest
    """
    arrays = _floats("check_against", inputs)
    name = name or _name(f)
    for dtype, tolerance in ((np.float64, float64), (np.float32, float32)):
        rounded = [x.astype(dtype) for x in arrays]
        y, gradients, fused_ops = _value_and_gradients(f, rounded)
        if reference is None and not fused_ops:
            raise ValueError(f"check_against: {name} ran no fused op, so that unfused() changes nothing; "
                             "give reference=, the same function in ops")
        with unfused():
            expected_y, expected, _ = _value_and_gradients(reference or f, [x.astype(float) for x in rounded])
        what = f"check_against: {name} in {np.dtype(dtype)}: wrong"
        _compare(f"{what} value", y, expected_y, dtype, tolerance)
        for argument, ours, theirs in zip(_arguments(f, len(arrays)), gradients, expected, strict=True):
            _compare(f"{what} gradient for argument {argument}", ours, theirs, dtype, tolerance)
        for i, ours in enumerate(gradients):
            if any(np.shares_memory(ours, other) for other in (*rounded, y, *gradients[:i])):
                raise GradientError(f"check_against: {name}: the gradient for argument {i} is memory of an "
                                    "input, the value or another gradient; hand back an array of its own")


def _value_and_gradients(f: Callable, arrays: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], bool]:
    """f's value, the gradients that a fixed cotangent gives its inputs, and whether a fused op ran."""
    inputs = [Tensor(x, requires_grad=True) for x in arrays]
    y = f(*inputs)
    if not isinstance(y, Tensor):
        raise TypeError("check_against: f must return a Tensor, made by ops")
    fused_ops = any(node.op.reference is not None for node in _nodes(y))     # type: ignore[attr-defined]
    if y.requires_grad:
        y.backward(gradient=_cotangent(0, y).astype(y.dtype))
    return y.data, [np.zeros_like(x.data) if x.grad is None else x.grad.data for x in inputs], fused_ops


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray, dtype: Any, tolerance: float) -> None:
    if ours.shape != theirs.shape or ours.dtype != dtype:
        raise GradientError(f"{what}: it is {ours.dtype} of shape {ours.shape}, "
                            f"and should be {np.dtype(dtype)} of shape {theirs.shape}, as the reference's")
    largest = np.max(np.abs(theirs), initial=0.01, where=np.isfinite(theirs))
    wrong = ~np.isclose(ours, theirs, rtol=0, atol=tolerance * largest, equal_nan=True)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise GradientError(f"{what} at index {index}:\n"
                            f"  expected {theirs[index]:.8g} (reference)\n"
                            f"  found    {ours[index]:.8g} (fused op)\n"
                            f"  {np.count_nonzero(wrong)} of {wrong.size} elements differ by more than "
                            f"{tolerance:g} of the largest")


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("minitensor.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
