"""Muon: momentum whose singular values are all brought near 1, by products of matrices alone.
Source: Jordan et al. 2024.

    g ← s g,   b ← μ b + (1 - μ) g,   u = μ b + (1 - μ) g        (Nesterov's momentum)
    p ← p - lr λ p - lr √max(1, M / N) orthogonal(u)             for p of M rows and N columns

orthogonal(u) takes X = u / ‖u‖ five times through X ← (a I + b A + c A²) X with A = X Xᵀ, an odd quintic of
the singular values that leaves them between 0.67 and 1.21 if they began above 0.0015. With Y = c^¼ X and
G = Y Yᵀ = √c A the bracket S is a square:

    S = a I + b A + c A² = (G + h I)² + d I,   h = b / (2 √c),   d = a - b² / (4 c)

so that all there is to do beside products is to add to diagonals. For more rows than columns G = YᵀY, and S
stands on the right. S and G commute, and the next G is S G S: where Y is long, the five S are gathered in
products as small as G, and Y is multiplied once, by all of them.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import prange

from kernels import memory
from kernels.adamw import array_at, check_lists
from kernels.check import check
from kernels.jit import helper, kernel, launch
from kernels.matmul import matmul

STEPS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
A, B, C = COEFFICIENTS
INNER, OUTER, UNIT = B / (2 * math.sqrt(C)), A - B * B / (4 * C), C**0.25


def muon(parameters: Sequence[np.ndarray], gradients: Sequence[np.ndarray], momenta: Sequence[np.ndarray],
         parts: Sequence[int], lr: float, momentum: float, decay: float, scale: float = 1.0) -> None:
    """Update parameters and momenta in place; all of one dtype and with two axes.

    parts: how many matrices lie one above the other in each. scale: s, the factor that clips the gradients
    (which themselves stay as they are). Products are in the precision that `set_matmul_precision` names, but
    for matrices at least twice as long as wide (or as wide as long), whose form is not stable in bfloat16.
    """
    check_lists("muon", {"parameters": parameters, "gradients": gradients, "momenta": momenta})
    if len(parts) != len(parameters):
        raise ValueError(f"muon: parts holds {len(parts)} numbers; there are {len(parameters)} parameters")
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}       # which parameter, which part of it
    for i, (p, count) in enumerate(zip(parameters, parts, strict=True)):
        if p.ndim != 2 or count < 1 or len(p) % count:
            raise ValueError(f"muon: parameters[{i}] has shape {p.shape}; it must be a matrix, or {count} of "
                             "them one above the other")
        if p.size:
            alike.setdefault((len(p) // count, p.shape[1]), []).extend((i, part) for part in range(count))
    for (rows, columns), places in alike.items():
        like = parameters[0].reshape(-1)[:0]
        stack = memory.empty((len(places), rows, columns), like.dtype)
        addresses = np.array([[x[i].ctypes.data + part * stack[0].nbytes for x in
                               (parameters, gradients, momenta)] for i, part in places], np.int64)
        launch(_nesterov, len(places), like, addresses, like.dtype.type(momentum),
               like.dtype.type(1 - momentum), like.dtype.type(scale), stack.reshape(len(places), -1))
        update = _iterate(stack)
        rate = lr * math.sqrt(max(1, rows / columns)) / UNIT
        launch(_descend, len(places), like, addresses, like.dtype.type(1 - lr * decay),
               like.dtype.type(rate), update.reshape(len(places), -1))


def orthogonal(x: np.ndarray) -> np.ndarray:
    """The matrices of x (n, M, N) with all singular values brought near 1, up to noise in zeros."""
    check("orthogonal", "x", x, (None, None, None))
    norms = np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True)) + EPS
    return _iterate(x * (UNIT / norms).astype(x.dtype)) * x.dtype.type(1 / UNIT)


def _iterate(y: np.ndarray) -> np.ndarray:
    """The steps of Newton and Schulz on Y (n, M, N)."""
    tall = y.shape[1] > y.shape[2]
    if max(y.shape[1:]) >= 2 * min(y.shape[1:]):
        steps = _gathered(matmul(y, y, transpose_a=tall, transpose_b=not tall, exact=True))
        return matmul(y, steps, exact=True) if tall else matmul(steps, y, exact=True)
    for _ in range(STEPS):
        bracket = _bracket(matmul(y, y, transpose_a=tall, transpose_b=not tall))
        y = matmul(y, bracket) if tall else matmul(bracket, y)
    return y


def _gathered(gram: np.ndarray) -> np.ndarray:
    """The product of all S, from the first G; never in bfloat16, as G forgets what Y is."""
    steps = bracket = _bracket(_copy(gram), exact=True)
    for _ in range(STEPS - 1):
        gram = matmul(matmul(bracket, gram, exact=True), bracket, exact=True)
        bracket = _bracket(_copy(gram), exact=True)
        steps = matmul(bracket, steps, exact=True)
    return steps


def _bracket(gram: np.ndarray, exact: bool = False) -> np.ndarray:
    """S; gram is overwritten."""
    _add_to_diagonals(gram, INNER)
    bracket = matmul(gram, gram, exact=exact)
    _add_to_diagonals(bracket, OUTER)
    return bracket


def _copy(x: np.ndarray) -> np.ndarray:
    copy = memory.empty(x.shape, x.dtype)
    copy[...] = x
    return copy


def _add_to_diagonals(x: np.ndarray, value: float) -> None:
    x.reshape(len(x), -1)[:, ::x.shape[1] + 1] += x.dtype.type(value)


@kernel
def _nesterov(like, addresses, momentum, rest, scale, stack, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        nesterov_part(array_at(like, addresses[task, 1], 0, stack.shape[1]),
                      array_at(like, addresses[task, 2], 0, stack.shape[1]), momentum, rest, scale,
                      stack[task])


@helper
def nesterov_part(g, b, momentum, rest, scale, y):
    """Update one matrix's momentum, and write Y of the first step."""
    squares = 0.0
    for i in range(g.size):
        gi = rest * scale * g[i]
        b[i] = momentum * b[i] + gi
        y[i] = momentum * b[i] + gi
        squares += np.float64(y[i]) * np.float64(y[i])
    factor = y.dtype.type(UNIT / (math.sqrt(squares) + EPS))
    for i in range(y.size):
        y[i] *= factor


@kernel
def _descend(like, addresses, shrink, rate, update, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        descend_part(array_at(like, addresses[task, 0], 0, update.shape[1]), shrink, rate, update[task])


@helper
def descend_part(p, shrink, rate, update):
    for i in range(p.size):
        p[i] = p[i] * shrink - rate * update[i]
