"""Gradient checking: the vjp of a function against finite differences, and the vjp of its vjp as well.

>>> import numpy as np
>>> from minitensor.testing import gradcheck
>>> gradcheck(np.tanh, [[0.3, -0.7]])                       # raises GradientError, or says nothing

`strategies` draws shapes, arrays, axes and indices for property tests; only asking for it imports hypothesis.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitensor.tensor import Tensor, grad


class GradientError(AssertionError):
    """A vjp and the finite differences of its function disagree."""


def gradcheck(f: Callable, *inputs: Any, order: int = 2, eps: float = 1e-3, rtol: float = 1e-6,
              atol: float = 1e-8, name: str | None = None) -> None:
    """Check the gradients of f at inputs against central differences of fourth order, element by element.

    f: takes as many Tensors as there are inputs, returns one or several; options go into a closure.
    inputs: arrays, raised to float64. order: 2 checks the gradient of the gradient too. eps: the step, times
    max(1, |x|); no kink may be nearer than two steps. rtol, atol: of the element, and of the largest element.
    Raises GradientError, which names the function, the argument and the index.
    """
    if order < 1:
        raise ValueError(f"gradcheck: order is {order}; it must be at least 1")
    arrays = [np.array(x, dtype=np.float64) for x in inputs]
    name = name or getattr(f, "__name__", type(f).__name__)
    for level in range(1, order + 1):
        _check(_projected(f), arrays, f"{name}, order {level}", eps, rtol, atol)
        f = _gradient(_projected(f))


def _projected(f: Callable) -> Callable:
    """The scalar that a fixed random cotangent makes of f's outputs."""
    def scalar(*inputs: Tensor) -> Tensor:
        outputs = f(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not all(isinstance(y, Tensor) for y in outputs):
            raise TypeError("gradcheck: f must return a Tensor or a sequence of them, made by ops")
        random = np.random.default_rng(0)
        return sum((np.sum(y * random.uniform(0.5, 1.5, y.shape)) for y in outputs), Tensor(np.zeros(())))
    return scalar


def _gradient(scalar: Callable, create_graph: bool = True) -> Callable:
    """The gradient of a scalar function, for each of its inputs: zeros where nothing depends on them."""
    def gradients(*inputs: Tensor) -> Sequence[Tensor]:
        y = scalar(*inputs)
        if not y.requires_grad:
            return [Tensor(np.zeros(x.shape)) for x in inputs]
        return grad(y, inputs, create_graph=create_graph)
    return gradients


def _check(scalar: Callable, arrays: list, name: str, eps: float, rtol: float, atol: float) -> None:
    def value(position: int, index: tuple[int, ...], x: float) -> float:
        moved = [array.copy() if i == position else array for i, array in enumerate(arrays)]
        moved[position][index] = x
        return scalar(*(Tensor(array, requires_grad=True) for array in moved)).item()

    found = _gradient(scalar, create_graph=False)(*(Tensor(array, requires_grad=True) for array in arrays))
    for position, array in enumerate(arrays):
        expected = np.empty_like(array)
        for index in np.ndindex(array.shape):
            x = float(array[index])
            h = eps * max(1.0, abs(x))
            near = value(position, index, x + h) - value(position, index, x - h)
            far = value(position, index, x + 2 * h) - value(position, index, x - 2 * h)
            expected[index] = (8 * near - far) / (12 * h)
        vjp = found[position].data
        largest = np.max(np.abs(expected), initial=1)
        wrong = ~np.isclose(vjp, expected, rtol=rtol, atol=atol * largest)
        if wrong.any():
            raise GradientError(_explain(name, position, expected, vjp, wrong))


def _explain(name: str, position: int, expected: np.ndarray, found: np.ndarray, wrong: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found / expected
        constant = wrong.all() and np.ptp(ratio) < 1e-6
    if not np.isfinite(found[wrong]).all():
        cause = "a vjp that meets 0 / 0 or 0 * inf: make the operand safe before dividing, not after"
    elif not found.any():
        cause = "a graph cut by .data, .detach() or a plain array where an op was meant"
    elif constant:
        cause = f"a factor in the vjp: every element is {ratio[index]:.6g} times what it should be"
    elif "order 1" in name:
        cause = "a term missing in the vjp, gradients in the wrong order, or a kink nearer than 2 eps"
    else:
        cause = "a vjp that is right but not made of ops of its inputs, so that its own gradient lacks terms"
    return (f"gradcheck: {name}: wrong gradient for argument {position} at index {index}:\n"
            f"  expected {expected[index]:.10g} (finite difference)\n"
            f"  found    {found[index]:.10g} (vjp)\n"
            f"  {np.count_nonzero(wrong)} of {wrong.size} elements differ; usual cause: {cause}")


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("minitensor.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
