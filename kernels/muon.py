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
from kernels.matmul import matmul, symmetric_matmul

STEPS, (A, B, C), EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7
H, D = B / (2 * C), A - B * B / (4 * C)


def muon(parameters: Sequence[np.ndarray], gradients: Sequence[np.ndarray], momenta: Sequence[np.ndarray],
         parts: Sequence[int], lr: float, momentum: float, decay: float, scale: float = 1.0) -> None:
    """Update parameters and momenta in place; all of one dtype and with two axes.

    parts: how many matrices lie one above the other in each. scale: s, the factor that clips the gradients
    (which themselves stay as they are). Products are in the precision that `set_matmul_precision` names, but
    for matrices at least twice as long as wide (or as wide as long), whose form is not stable in bfloat16.
    """
    check_lists("muon", {"parameters": parameters, "gradients": gradients, "momenta": momenta},
                ("parameters", "momenta"))
    if len(parts) != len(parameters):
        raise ValueError(f"muon: parts holds {len(parts)} numbers; there are {len(parameters)} parameters")
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}       # which parameter, which part of it
    for i, (p, count) in enumerate(zip(parameters, parts, strict=True)):
        if p.ndim != 2 or count < 1 or len(p) % count:
            raise ValueError(f"muon: parameters[{i}] has shape {p.shape}; it must be a matrix, or {count} of "
                             "them one above the other")
        if p.size:
            alike.setdefault((len(p) // count, p.shape[1]), []).extend((i, part) for part in range(count))
    pointers, stacks = [], []
    for (rows, columns), places in alike.items():
        like = parameters[0].reshape(-1)[:0]
        stack = memory.empty((len(places), rows, columns), like.dtype)
        pointers.append(np.array([[x[i].ctypes.data + part * stack[0].nbytes for x in
                                   (parameters, gradients, momenta)] for i, part in places], np.int64))
        launch(_nesterov, len(places), like, pointers[-1], like.dtype.type(momentum),
               like.dtype.type(1 - momentum), like.dtype.type(scale), stack.reshape(len(places), -1))
        stacks.append(stack)
    for addresses, update in zip(pointers, _iterate(stacks), strict=True):
        count, rows, columns = update.shape
        rate = lr * math.sqrt(max(1, rows / columns))
        launch(_descend, count, like, addresses, like.dtype.type(1 - lr * decay), like.dtype.type(rate),
               update.reshape(count, -1))


def orthogonal(x: np.ndarray) -> np.ndarray:
    """The matrices of x (n, M, N) with all singular values brought near 1, up to noise in zeros."""
    check("orthogonal", "x", x, (None, None, None))
    norms = np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True)) + EPS
    return _iterate([x / norms])[0]


def _iterate(stacks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The steps of Newton and Schulz on stacks of X (n, M, N).

    Long X with short sides alike share the products that are as small as G.
    """
    results = list(stacks)
    long: dict[int, list[int]] = {}                                # stacks by their short side
    for i, x in enumerate(stacks):
        if max(x.shape[1:]) >= 2 * min(x.shape[1:]):
            long.setdefault(min(x.shape[1:]), []).append(i)
        else:
            for _ in range(STEPS):
                shifted = symmetric_matmul(x, x, *_sides(x), shift=H)
                x = _times(x, symmetric_matmul(shifted, shifted, scale=C, shift=D))
            results[i] = x
    for short, members in long.items():
        parts = [symmetric_matmul(stacks[i], stacks[i], *_sides(stacks[i]), exact=True) for i in members]
        grams = memory.empty((sum(map(len, parts)), short, short), parts[0].dtype)
        np.concatenate(parts, out=grams)
        ends = np.cumsum([len(part) for part in parts])
        for i, steps in zip(members, np.split(_gathered(grams), ends[:-1]), strict=True):
            results[i] = _times(stacks[i], steps, exact=True)
    return results


def _sides(x: np.ndarray) -> tuple[bool, bool]:
    """Which X to transpose for the smaller of XᵀX and X Xᵀ."""
    tall = x.shape[1] > x.shape[2]
    return tall, not tall


def _times(x: np.ndarray, bracket: np.ndarray, exact: bool = False) -> np.ndarray:
    """X S or S X, on the side of the smaller."""
    return matmul(x, bracket, exact=exact) if _sides(x)[0] else matmul(bracket, x, exact=exact)


def _gathered(gram: np.ndarray) -> np.ndarray:
    """The product of all S, from the first G; never in bfloat16, as G forgets what X is."""
    steps = bracket = _bracket(gram)
    for _ in range(STEPS - 1):
        gram = symmetric_matmul(symmetric_matmul(bracket, gram, exact=True), bracket, exact=True)
        bracket = _bracket(gram)
        steps = symmetric_matmul(bracket, steps, exact=True)
    return steps


def _bracket(gram: np.ndarray) -> np.ndarray:
    """S; gram is shifted for that, and back."""
    diagonals = gram.reshape(len(gram), -1)[:, ::gram.shape[1] + 1]
    before = diagonals.copy()
    diagonals += gram.dtype.type(H)
    bracket = symmetric_matmul(gram, gram, exact=True, scale=C, shift=D)
    diagonals[...] = before
    return bracket


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
