"""Derivatives of derivatives: Jacobians, Hessians, and their products with vectors, which never form them.

Names and shapes are those of torch.autograd.functional. f is a function of the inputs that returns
one Tensor, or a Tensor that was already computed from them: the inputs may then be a model's parameters.

>>> import minitensor as mt
>>> x = mt.Tensor([1.0, 2.0])
>>> hessian(lambda x: np.sum(x ** 3), x)
Tensor([[ 6.,  0.],
        [ 0., 12.]])
>>> layer = mt.nn.Linear(2, 1)
>>> loss = np.sum(layer(x) ** 2)
>>> value, products = hvp(loss, layer.parameters(), [np.ones((1, 2)), np.ones(1)])
>>> [p.shape for p in products]
[(1, 2), (1,)]
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitensor.tensor import Tensor, _set, grad

_np: Any = np                               # numpy as a Tensor meets it
Inputs = Tensor | Sequence[Tensor]


def vjp(f: Callable | Tensor, inputs: Inputs, v: Any = None, create_graph: bool = False) -> tuple:
    """(y, vᵀ J): the value, and what each input gets of v, the gradient of y, of its shape.

    v may be left out for a scalar y. With a tuple or list of inputs there is a tuple of results.

    >>> y, dx = vjp(np.exp, Tensor([0.0, 1.0]), [1.0, 0.0])
    >>> dx
    Tensor([1., 0.])
    """
    with _set(recording=True):
        y, xs = _evaluated("vjp", f, inputs, create_graph)
        return _handed_out(y, create_graph), _like(inputs, _gradients(y, xs, v, create_graph))


def jvp(f: Callable | Tensor, inputs: Inputs, v: Any, create_graph: bool = False) -> tuple:
    """(y, J v): the value, and how it changes as the inputs move along v, of their shapes.

    By double backward: uᵀ J is linear in u, and its derivative by u, in the direction v, is J v.

    >>> y, dy = jvp(lambda x: x * x, Tensor([1.0, 3.0]), [1.0, 1.0])
    >>> dy
    Tensor([2., 6.])
    """
    with _set(recording=True):
        y, xs = _evaluated("jvp", f, inputs, create_graph)
        u = Tensor(np.zeros_like(y.data), requires_grad=True)
        pulled = _inner(_gradients(y, xs, u, create_graph=True), _directions("jvp", inputs, xs, v))
        return _handed_out(y, create_graph), _gradients(pulled, [u], None, create_graph)[0]


def jacobian(f: Callable | Tensor, inputs: Inputs, create_graph: bool = False) -> Any:
    """d y / d x of shape y.shape + x.shape, by one walk back for each element of y.

    >>> jacobian(lambda x: x[:2] * x[2], Tensor([1.0, 2.0, 3.0]))
    Tensor([[3., 0., 1.],
            [0., 3., 2.]])
    """
    with _set(recording=True):
        y, xs = _evaluated("jacobian", f, inputs, create_graph)
        return _like(inputs, _jacobians(y, xs, create_graph))


def hessian(f: Callable | Tensor, inputs: Inputs, create_graph: bool = False) -> Any:
    """d² y / d x d x of shape x.shape + x.shape, for a scalar y; for several inputs, rows of such blocks.

    >>> hessian(lambda x: x[0] * x[1] ** 2, Tensor([1.0, 3.0]))
    Tensor([[0., 6.],
            [6., 2.]])
    """
    with _set(recording=True):
        y, xs = _evaluated("hessian", f, inputs, create_graph)
        rows = [_jacobians(dx, xs, create_graph) for dx in _gradients(_scalar("hessian", y), xs, None, True)]
        return _like(inputs, [_like(inputs, row) for row in rows])


def hvp(f: Callable | Tensor, inputs: Inputs, v: Any, create_graph: bool = False) -> tuple:
    """(y, H v): a scalar value, and its Hessian times v, at the cost of two walks back.

    >>> y, product = hvp(lambda x: np.prod(x), Tensor([2.0, 3.0]), [1.0, 0.0])
    >>> product
    Tensor([0., 1.])
    """
    with _set(recording=True):
        y, xs = _evaluated("hvp", f, inputs, create_graph)
        gradients = _gradients(_scalar("hvp", y), xs, None, create_graph=True)
        along = _inner(gradients, _directions("hvp", inputs, xs, v))
        return _handed_out(y, create_graph), _like(inputs, _gradients(along, xs, None, create_graph))


# ---- what they share ---------------------------------------------------------------------------------------

def _evaluated(name: str, f: Callable | Tensor, inputs: Inputs,
               create_graph: bool) -> tuple[Tensor, list[Tensor]]:
    """y, and the tensors by which it is differentiated.

    For a function f they are copies, so that an input which depends on another is a variable of its own.
    """
    given: list[Any] = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not given:
        raise ValueError(f"{name}: there are no inputs to differentiate by")
    for i, x in enumerate(given):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: input {i} is a {type(x).__name__}; inputs are Tensors, "
                            "as minitensor.Tensor(x) makes of an array")
    if isinstance(f, Tensor):
        for i, x in enumerate(given):
            if not x.requires_grad:
                raise ValueError(f"{name}: input {i}, of shape {x.shape}, has requires_grad=False, so "
                                 "nothing was recorded of it; set it to True before f is computed, "
                                 "or give a function")
        return f, given
    xs = [_np.copy(x) if create_graph and x.requires_grad else Tensor(x.data, requires_grad=True)
          for x in given]
    y = f(*xs)
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: f returned a {type(y).__name__}; it must return one Tensor, made by ops "
                        "(np.concatenate joins several)")
    return y, xs


def _scalar(name: str, y: Tensor) -> Tensor:
    if y.size != 1:
        raise ValueError(f"{name}: f is of shape {y.shape}; it must be a scalar, as after np.sum: "
                         "jacobian is for functions of several values")
    return y


def _directions(name: str, inputs: Inputs, xs: list[Tensor], v: Any) -> list[Tensor]:
    """v as Tensors, one for each input."""
    vs = [v] if isinstance(inputs, Tensor) else list(v)
    if len(vs) != len(xs):
        raise ValueError(f"{name}: v has {len(vs)} parts and there are {len(xs)} inputs; give one for each")
    vs = [part if isinstance(part, Tensor) else Tensor(np.asarray(part, x.dtype))
          for part, x in zip(vs, xs, strict=True)]
    for i, (part, x) in enumerate(zip(vs, xs, strict=True)):
        if part.shape != x.shape:
            raise ValueError(f"{name}: v is {part.shape} for input {i}, which is {x.shape}; "
                             "the two must be alike")
    return vs


def _gradients(y: Tensor, xs: list[Tensor], v: Any, create_graph: bool) -> tuple[Tensor, ...]:
    """`grad`, with the graph kept, and zeros where y depends on nothing."""
    return grad(y, xs, v, retain_graph=True, create_graph=create_graph)


def _inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of the products of all elements."""
    terms = [_np.sum(x * y) for x, y in zip(xs, ys, strict=True)]
    return sum(terms[1:], terms[0])


def _jacobians(y: Tensor, xs: list[Tensor], create_graph: bool) -> list[Tensor]:
    """d y / d x for each x: a row for each element of y, whose gradient is 1 there and 0 elsewhere."""
    rows = []
    for i in range(y.size):
        one = np.zeros(y.size, y.dtype)
        one[i] = 1
        rows.append(_gradients(y, xs, one.reshape(y.shape), create_graph))
    columns = zip(*rows, strict=True) if rows else ((Tensor(np.zeros((0, *x.shape), x.dtype)),) for x in xs)
    return [_np.reshape(_np.stack(column) if rows else column[0], y.shape + x.shape)
            for column, x in zip(columns, xs, strict=True)]


def _like(inputs: Inputs, results: Sequence) -> Any:
    """One result for one input, a tuple for several."""
    return results[0] if isinstance(inputs, Tensor) else tuple(results)


def _handed_out(y: Tensor, create_graph: bool) -> Tensor:
    """Without create_graph no result holds on to the graph."""
    return y if create_graph else y.detach()
