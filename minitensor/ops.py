"""Elementwise ops and reductions: each is its value, then its vjp, on consecutive lines.

A body runs on ndarrays, and on Tensors when the gradient itself is to be differentiated. So it uses numpy's
functions (each answers for both), keeps masks as plain boolean arrays, and leaves broadcasting to the walk.
Where a derivative would meet 0/0, the operand is made safe before the division: a NaN that is masked after it
comes back one derivative later.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from kernels import memory
from minitensor.tensor import Tensor, _common_dtype, _weak, add_arrays, implements, op


def _values(x: Any) -> Any:
    return x._data if isinstance(x, Tensor) else x


def _alike(name: str, operands: Sequence) -> list:
    """The operands as arrays and Tensors of one dtype: what is no Tensor follows those that are."""
    dtype = _common_dtype(name, tuple(operands))
    if dtype is None:
        return list(operands)
    return [x if isinstance(x, Tensor) else np.asarray(_weak(name, x, dtype), dtype) for x in operands]


# ---- arithmetic --------------------------------------------------------------------------------------------

@op(np.add)
def add(x, y):
    """x + y, with broadcasting."""
    return _sum_of(x, y), (lambda g: g, lambda g: g)

def _sum_of(x: Any, y: Any) -> Any:
    """x + y; of arrays of one dtype in recycled memory, as a residual stream is a sum in every block."""
    arrays = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    if arrays and x.dtype == y.dtype and x.size >= memory.PAGE:
        return add_arrays(x, y, memory.empty(np.broadcast_shapes(x.shape, y.shape), x.dtype))
    return np.add(x, y)

@op(np.subtract)
def subtract(x, y):
    """x - y, with broadcasting."""
    return np.subtract(x, y), (lambda g: g, lambda g: -g)

@op(np.multiply)
def multiply(x, y):
    """x y, element by element, with broadcasting."""
    return np.multiply(x, y), (lambda g: g * y, lambda g: g * x)

@op(np.divide)
def divide(x, y):
    """x / y, with broadcasting."""
    z = np.divide(x, y)
    return z, (lambda g: g / y, lambda g: -g * z / y)

@op(np.power)
def power(x, y):
    """x ** y, with broadcasting; d/dx is right at x = 0 too, and d/dy is 0 there for y >= 0."""
    def dx(g):                                              # y x^(y-1), and 0 for the constant x^0 at x = 0
        constant = np.equal(x, 0) & np.equal(y, 0)
        exponent = np.where(constant, 1, y - 1).astype(x.dtype) if np.any(constant) else y - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            return g * (y * x ** exponent)

    def dy(g):                                              # x^y log x
        base = np.where(np.equal(x, 0) & np.greater_equal(y, 0), 1, x).astype(y.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            return g * (x ** y * np.log(base))
    return x ** y, (dx, dy)

@op(np.negative)
def negative(x):
    """-x."""
    return np.negative(x), lambda g: -g

@op(np.abs)
def abs(x):
    """|x|; the gradient at 0 is 0."""
    return np.abs(x), lambda g: g * np.sign(x)

@op(np.square)
def square(x):
    """x squared."""
    return np.square(x), lambda g: g * (2 * x)

@op(np.sqrt)
def sqrt(x):
    """The square root of x."""
    y = np.sqrt(x)
    return y, lambda g: g / (2 * y)

@op(np.reciprocal)
def reciprocal(x):
    """1 / x."""
    y = np.reciprocal(x)
    return y, lambda g: -g * y * y


# ---- exponentials and their kin ----------------------------------------------------------------------------

@op(np.exp)
def exp(x):
    """e to the power x."""
    y = np.exp(x)
    return y, lambda g: g * y

@op(np.expm1)
def expm1(x):
    """exp(x) - 1, exact for small x."""
    return np.expm1(x), lambda g: g * np.exp(x)

@op(np.log)
def log(x):
    """The natural logarithm of x."""
    return np.log(x), lambda g: g / x

@op(np.log1p)
def log1p(x):
    """log(1 + x), exact for small x."""
    return np.log1p(x), lambda g: g / (1 + x)

@op(np.sin)
def sin(x):
    """The sine of x."""
    return np.sin(x), lambda g: g * np.cos(x)

@op(np.cos)
def cos(x):
    """The cosine of x."""
    return np.cos(x), lambda g: -g * np.sin(x)

@op(np.tanh)
def tanh(x):
    """The hyperbolic tangent of x."""
    y = np.tanh(x)
    return y, lambda g: g * (1 - y * y)

@op()
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow and without cancellation."""
    positive = np.greater_equal(x, 0)
    e = np.exp(np.where(positive, np.negative(x), x))       # exp(-|x|); np.abs would have no derivative at 0
    y = np.where(positive, 1, e) / (1 + e)
    return y, lambda g: g * y * (1 - y)

@op()
def erf(x):
    """The error function: 2/sqrt(pi) times the integral of exp(-t^2) from 0 to x."""
    values = np.asarray(_values(x))
    y = np.vectorize(math.erf, otypes=[np.float64])(values).astype(np.result_type(values, np.float32))
    return y, lambda g: g * (2 / math.sqrt(math.pi) * np.exp(-x * x))


# ---- choices -----------------------------------------------------------------------------------------------

@op()
def relu(x):
    """max(x, 0); the gradient at 0 is 0."""
    return np.maximum(x, 0), lambda g: np.where(np.greater(x, 0), g, 0)

def _winner_takes(g: Any, wins: Any, ties: Any) -> Any:
    return np.where(wins, g, np.where(ties, g / 2, 0))

@op(np.maximum)
def maximum(x, y):
    """The larger of x and y, with broadcasting; equal operands share the gradient."""
    return np.maximum(x, y), (lambda g: _winner_takes(g, np.greater(x, y), np.equal(x, y)),
                              lambda g: _winner_takes(g, np.greater(y, x), np.equal(x, y)))

@op(np.minimum)
def minimum(x, y):
    """The smaller of x and y, with broadcasting; equal operands share the gradient."""
    return np.minimum(x, y), (lambda g: _winner_takes(g, np.less(x, y), np.equal(x, y)),
                              lambda g: _winner_takes(g, np.less(y, x), np.equal(x, y)))

@op()
def select(mask, x, y):
    """x where the boolean array mask is true, y elsewhere: what `where` comes down to."""
    return np.where(mask, x, y), (lambda g: None,
                                  lambda g: np.where(mask, g, 0),
                                  lambda g: np.where(mask, 0, g))

@implements(np.where)
def where(condition, x, y):
    """x where condition is true, y elsewhere, with broadcasting."""
    return select(np.asarray(_values(condition)), *_alike("where", (x, y)))

@op()
def limit(x, low, high):
    """x held between the arrays low and high, either of which may be None: what `clip` comes down to."""
    below = False if low is None else np.less(x, low)
    above = False if high is None else np.greater(x, high) | (False if low is None else np.greater(low, high))
    return np.clip(x, low, high), (lambda g: np.where(below | above, 0, g),
                                   lambda g: np.where(below & np.logical_not(above), g, 0),
                                   lambda g: np.where(above, g, 0))

@implements(np.clip)
def clip(x, a_min=None, a_max=None, *, min=None, max=None):
    """x held between a_min and a_max (or min and max), with broadcasting; None is no bound.

    The gradient passes where x equals a bound, as in torch.clamp; outside, it goes to the bound.
    """
    low, high = a_min if min is None else min, a_max if max is None else max
    present = iter(_alike("clip", [v for v in (x, low, high) if v is not None]))
    return limit(*(None if v is None else next(present) for v in (x, low, high)))

@op(np.copy)
def copy(x):
    """The same values in memory of their own."""
    return np.copy(x), lambda g: g

@op(np.astype)
def astype(x, dtype):
    """x in float32 or float64 (TypeError for any other dtype); the gradient is converted back."""
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"astype: a Tensor holds float32 or float64, not {np.dtype(dtype)}; "
                        "use t.numpy().astype(...) to convert outside the graph")
    return x.astype(dtype), lambda g: g.astype(x.dtype)


# ---- reductions: axis is None (all), an integer or a tuple -------------------------------------------------

def _kept(x: Any, axis: Any) -> tuple[int, ...]:
    """The shape of x with the reduced axes kept at length one."""
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    return tuple(1 if i in axes else n for i, n in enumerate(x.shape))

def _count(x: Any, axis: Any) -> int:
    """How many elements of x go into one element of the result."""
    return math.prod(n for n, kept in zip(x.shape, _kept(x, axis), strict=True) if kept == 1)

@op(np.sum)
def sum(x, axis=None, *, keepdims=False):
    """The sum over axis."""
    def vjp(g):
        return np.broadcast_to(np.reshape(g, _kept(x, axis)), x.shape)
    return np.sum(x, axis=axis, keepdims=keepdims), vjp

@op(np.mean)
def mean(x, axis=None, *, keepdims=False):
    """The mean over axis."""
    def vjp(g):
        return np.broadcast_to(np.reshape(g, _kept(x, axis)) / _count(x, axis), x.shape)
    return np.mean(x, axis=axis, keepdims=keepdims), vjp

@op(np.var)
def var(x, axis=None, *, keepdims=False):
    """The population variance over axis: the mean square of x - mean(x)."""
    centred = x - np.mean(x, axis=axis, keepdims=True)
    def vjp(g):
        return np.reshape(g, _kept(x, axis)) * 2 / _count(x, axis) * centred
    return np.mean(np.square(centred), axis=axis, keepdims=keepdims), vjp

@op(np.std)
def std(x, axis=None, *, keepdims=False):
    """The population standard deviation over axis; where it is 0, so is the gradient."""
    centred = x - np.mean(x, axis=axis, keepdims=True)
    variance = np.mean(np.square(centred), axis=axis, keepdims=True)
    flat = np.equal(variance, 0)
    y = np.sqrt(np.where(flat, 1, variance))
    def vjp(g):
        return np.where(flat, 0, np.reshape(g, y.shape) / (_count(x, axis) * y)) * centred
    value = np.where(flat, 0, y)
    return value if keepdims else np.squeeze(value, axis=axis), vjp

def _extreme(reduce: Callable, x: Any, axis: Any, keepdims: bool) -> tuple:
    y = reduce(x, axis=axis, keepdims=True)
    chosen = np.equal(x, y)
    def vjp(g):
        ties = np.sum(chosen, axis=axis, keepdims=True, dtype=x.dtype)
        return np.where(chosen, np.reshape(g, y.shape) / ties, 0)
    return y if keepdims else np.squeeze(y, axis=axis), vjp

@op(np.max, np.amax)
def max(x, axis=None, *, keepdims=False):
    """The largest element over axis; equal ones share the gradient. ValueError if there is none."""
    return _extreme(np.max, x, axis, keepdims)

@op(np.min, np.amin)
def min(x, axis=None, *, keepdims=False):
    """The smallest element over axis; equal ones share the gradient. ValueError if there is none."""
    return _extreme(np.min, x, axis, keepdims)

@implements(np.prod)
def prod(x, axis=None, *, keepdims=False):
    """The product over axis, multiplied in pairs of pairs: no derivative divides, so zeros do no harm."""
    axes = normalize_axis_tuple(range(x.ndim) if axis is None else axis, x.ndim)
    others = tuple(i for i in range(x.ndim) if i not in axes)
    y = np.reshape(np.transpose(x, axes + others), (_count(x, axis), *(x.shape[i] for i in others)))
    while len(y) > 1:
        half = len(y) // 2
        pairs, odd = y[:half] * y[half:2 * half], y[2 * half:]
        y = np.concatenate([pairs, odd]) if len(odd) else pairs
    y = y[0] if len(y) else np.sum(y, axis=0) + 1           # the product of nothing is one
    return np.reshape(y, _kept(x, axis)) if keepdims else y

@op()
def logsumexp(x, axis=None, *, keepdims=False):
    """log(sum(exp(x))) over axis, without overflow; -inf, with no gradient, where every x is -inf."""
    top = np.max(_values(x), axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(x - top)
    total = np.sum(e, axis=axis, keepdims=True)
    nothing = np.equal(total, 0)
    total = np.where(nothing, 1, total)
    y = np.where(nothing, -np.inf, np.log(total) + top)
    return y if keepdims else np.squeeze(y, axis=axis), lambda g: np.reshape(g, total.shape) / total * e

@op(np.cumsum)
def cumsum(x, axis=None):
    """The running sum along axis, or along the flattened x for None."""
    along = 0 if axis is None else axis
    def vjp(g):
        return np.reshape(np.flip(np.cumsum(np.flip(g, along), axis=along), along), x.shape)
    return np.cumsum(x, axis=axis), vjp


# ---- functions without a derivative ------------------------------------------------------------------------

def _of_values(function: Callable) -> Callable:
    @functools.wraps(function)
    def plain(*inputs, **options):
        return function(*map(_values, inputs), **{name: _values(x) for name, x in options.items()})
    return plain

def _constant(function: Callable) -> Callable:
    @functools.wraps(function)
    def constant(*inputs, **options):
        if "dtype" in options:
            raise TypeError(f"{function.__name__}: dtype= is not for Tensors; use t.astype(...) or t.numpy()")
        return Tensor(function(*map(_values, inputs), **options))
    return constant

_PLAIN: tuple[Callable, ...] = (                            # of a Tensor's values: they give a plain array
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal, np.logical_not,
    np.isfinite, np.isnan, np.isinf,
    np.isclose, np.allclose, np.array_equal, np.any, np.all, np.count_nonzero,
    np.argmax, np.argmin, np.argsort, np.shape, np.ndim, np.size,
)
for _function in _PLAIN:
    implements(_function)(_of_values(_function))
for _function in (np.zeros_like, np.ones_like, np.full_like, np.sign, np.floor, np.ceil, np.rint, np.round,
                  np.around):
    implements(_function)(_constant(_function))             # a Tensor that requires no gradient
