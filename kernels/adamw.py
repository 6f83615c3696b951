"""AdamW: one pass over parameters, gradients and moments, with the clipping factor applied on the way.
Source: Loshchilov, Hutter 2019.

    g ← s g,   m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,
    p ← p - lr λ p - lr (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels.check import check
from kernels.jit import flat_tasks, helper, kernel, launch


def adamw(parameter: np.ndarray, gradient: np.ndarray, first: np.ndarray, second: np.ndarray, step: int,
          lr: float, beta1: float, beta2: float, eps: float, decay: float, scale: float = 1.0) -> None:
    """Update parameter and its moments first and second in place, all of one shape.

    step: t, counted from 1. scale: s, the factor that clips the gradient (which itself stays as it is).
    """
    check("adamw", "parameter", parameter)
    for name, array in (("gradient", gradient), ("first", first), ("second", second)):
        check("adamw", name, array, parameter.shape, like=parameter)
    for name, array in (("parameter", parameter), ("first", first), ("second", second)):
        if not array.flags.writeable:
            raise ValueError(f"adamw: {name} is read-only; it is updated in place, so pass a copy")
    if step < 1:
        raise ValueError(f"adamw: step is {step}; steps are counted from 1")
    real = parameter.dtype.type
    root = math.sqrt(1 - beta2**step)
    launch(_adamw, flat_tasks(parameter), *(x.reshape(-1) for x in (parameter, gradient, first, second)),
           real(1 - lr * decay), real(scale), real(beta1), real(1 - beta1), real(beta2), real(1 - beta2),
           real(lr / (1 - beta1**step)), real(root), real(eps))


def sum_of_squares(x: np.ndarray) -> float:
    """Σ x² in float64, for the norm of a gradient."""
    check("sum_of_squares", "x", x)
    partial = np.empty(flat_tasks(x))
    launch(_sum_of_squares, len(partial), x.reshape(-1), partial)
    return float(partial.sum())


@kernel
def _adamw(p, g, m, v, shrink, scale, beta1, rest1, beta2, rest2, rate, root, eps, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        i, j = p.size * task // tasks, p.size * (task + 1) // tasks
        adamw_part(p[i:j], g[i:j], m[i:j], v[i:j], shrink, scale, beta1, rest1, beta2, rest2, rate, root, eps)


@helper
def adamw_part(p, g, m, v, shrink, scale, beta1, rest1, beta2, rest2, rate, root, eps):
    for i in range(p.size):
        gi = g[i] * scale
        m[i] = beta1 * m[i] + rest1 * gi
        v[i] = beta2 * v[i] + rest2 * gi * gi
        p[i] = p[i] * shrink - rate * m[i] / (math.sqrt(v[i]) / root + eps)


@kernel
def _sum_of_squares(x, partial, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        partial[task] = squares_part(x[x.size * task // tasks:x.size * (task + 1) // tasks])


@helper
def squares_part(x):
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total
