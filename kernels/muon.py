"""Muon: momentum whose singular values are all brought near 1, by products of matrices alone.
Source: Jordan et al. 2024.

    g ← s g,   b ← μ b + (1 - μ) g,   u = μ b + (1 - μ) g        (Nesterov's momentum)
    p ← p - lr λ p - lr √max(1, M / N) orthogonal(u)             for p of M rows and N columns

orthogonal(u) takes X = u / ‖u‖ five times through X ← (a I + b G + c G²) X with G = X Xᵀ, an odd quintic of
the singular values that leaves them between 0.67 and 1.21 if they began above 0.0015. The bracket is

    S = a I + b G + c G² = c (G + h I)² + d I,   h = b / (2 c),   d = a - b² / (4 c)

so that all there is to do beside products is to scale them and to add to diagonals. For more rows than
columns G = XᵀX, and S stands on the right. S and G commute, and the next G is S G S: where X is long, the
five S are gathered in products as small as G, and X is multiplied once, by all of them. Of all products only
those with S X, or X S, are not symmetric.
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
from kernels.symmetric import symmetric_matmul

COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 5                    # a, b, c of each step
STEPS = [(b / (2 * c), c, a - b * b / (4 * c)) for a, b, c in COEFFICIENTS]          # h, c, d
EPS = 1e-7


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
        rate = lr * math.sqrt(max(1, rows / columns))
        launch(_descend, len(places), like, addresses, like.dtype.type(1 - lr * decay),
               like.dtype.type(rate), update.reshape(len(places), -1))


def orthogonal(x: np.ndarray) -> np.ndarray:
    """The matrices of x (n, M, N) with all singular values brought near 1, up to noise in zeros."""
    check("orthogonal", "x", x, (None, None, None))
    norms = np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True)) + EPS
    return _iterate(x / norms)


def _iterate(x: np.ndarray) -> np.ndarray:
    """The steps of Newton and Schulz on X (n, M, N)."""
    tall = x.shape[1] > x.shape[2]
    if max(x.shape[1:]) >= 2 * min(x.shape[1:]):
        steps = _gathered(symmetric_matmul(x, x, tall, not tall, exact=True))
        return matmul(x, steps, exact=True) if tall else matmul(steps, x, exact=True)
    for h, c, d in STEPS:
        shifted = symmetric_matmul(x, x, tall, not tall, shift=h)
        bracket = symmetric_matmul(shifted, shifted, scale=c, shift=d)
        x = matmul(x, bracket) if tall else matmul(bracket, x)
    return x


def _gathered(gram: np.ndarray) -> np.ndarray:
    """The product of all S, from the first G; never in bfloat16, as G forgets what X is."""
    steps = bracket = _bracket(gram, *STEPS[0])
    for step in STEPS[1:]:
        gram = symmetric_matmul(symmetric_matmul(bracket, gram, exact=True), bracket, exact=True)
        bracket = _bracket(gram, *step)
        steps = symmetric_matmul(bracket, steps, exact=True)
    return steps


def _bracket(gram: np.ndarray, h: float, c: float, d: float) -> np.ndarray:
    shifted = memory.empty(gram.shape, gram.dtype)
    shifted[...] = gram
    shifted.reshape(len(gram), -1)[:, ::gram.shape[1] + 1] += gram.dtype.type(h)
    return symmetric_matmul(shifted, shifted, exact=True, scale=c, shift=d)


@kernel
def _nesterov(like, addresses, momentum, rest, scale, stack, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        nesterov_part(array_at(like, addresses[task, 1], 0, stack.shape[1]),
                      array_at(like, addresses[task, 2], 0, stack.shape[1]), momentum, rest, scale,
                      stack[task])


@helper
def nesterov_part(g, b, momentum, rest, scale, x):
    """Update one matrix's momentum, and write the first X."""
    squares = 0.0
    for i in range(g.size):
        gi = rest * scale * g[i]
        b[i] = momentum * b[i] + gi
        x[i] = momentum * b[i] + gi
        squares += np.float64(x[i]) * np.float64(x[i])
    factor = x.dtype.type(1 / (math.sqrt(squares) + EPS))
    for i in range(x.size):
        x[i] *= factor


@kernel
def _descend(like, addresses, shrink, rate, update, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        descend_part(array_at(like, addresses[task, 0], 0, update.shape[1]), shrink, rate, update[task])


@helper
def descend_part(p, shrink, rate, update):
    for i in range(p.size):
        p[i] = p[i] * shrink - rate * update[i]
