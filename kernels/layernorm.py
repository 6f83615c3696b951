"""Layer normalisation of each row, on (N, C). Source: Ba, Kiros, Hinton 2016.

    x̂ = (x - mean) rstd,   rstd = 1 / sqrt(var + eps),   y = gain x̂ + bias

    With h = gain dy:   dx = rstd (h - mean(h) - x̂ mean(h x̂)),
    as mean and variance each depend on every x of the row;   dgain = Σ_rows dy x̂,   dbias = Σ_rows dy.
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import kernel, row_tasks


def layernorm_forward(x: np.ndarray, gain: np.ndarray, bias: np.ndarray | None = None,
                      eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, C), gain (C,), bias (C,) or None -> y (N, C), mean (N,), rstd (N,)."""
    check("layernorm_forward", "x", x, (None, None))
    check("layernorm_forward", "gain", gain, x.shape[1:], like=x)
    if bias is not None:
        check("layernorm_forward", "bias", bias, x.shape[1:], like=x)
    y, mean, rstd = (memory.empty(shape, x.dtype) for shape in (x.shape, x.shape[:1], x.shape[:1]))
    _layernorm_forward(x, gain, gain[:0] if bias is None else bias, x.dtype.type(eps), y, mean, rstd, row_tasks(x))
    return y, mean, rstd


def layernorm_backward(dy: np.ndarray, x: np.ndarray, gain: np.ndarray, mean: np.ndarray,
                       rstd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx (N, C), dgain (C,), dbias (C,), from the gradient and what the forward pass was given and gave."""
    check("layernorm_backward", "dy", dy, (None, None))
    check("layernorm_backward", "x", x, dy.shape, like=dy)
    check("layernorm_backward", "gain", gain, dy.shape[1:], like=dy)
    check("layernorm_backward", "mean", mean, dy.shape[:1], like=dy)
    check("layernorm_backward", "rstd", rstd, dy.shape[:1], like=dy)
    tasks = row_tasks(x)
    dx = memory.empty(x.shape, x.dtype)
    partial = memory.zeros((2, tasks, x.shape[1]), x.dtype)
    sums = memory.empty((2, x.shape[1]), x.dtype)
    _layernorm_backward(dy, x, gain, mean, rstd, dx, partial[0], partial[1], tasks)
    np.sum(partial, axis=1, out=sums)
    return dx, sums[0], sums[1]


@kernel
def _layernorm_forward(x, gain, bias, eps, y, mean, rstd, tasks):
    rows, width = x.shape
    for task in prange(tasks):
        for i in range(rows * task // tasks, rows * (task + 1) // tasks):
            xi, yi = x[i], y[i]
            zero = xi.dtype.type(0)
            total = zero
            for j in range(width):
                total += xi[j]
            m = total / xi.dtype.type(width)
            squares = zero
            for j in range(width):
                squares += (xi[j] - m) * (xi[j] - m)
            r = xi.dtype.type(1) / xi.dtype.type(math.sqrt(squares / xi.dtype.type(width) + eps))
            if bias.size:
                for j in range(width):
                    yi[j] = (xi[j] - m) * r * gain[j] + bias[j]
            else:
                for j in range(width):
                    yi[j] = (xi[j] - m) * r * gain[j]
            mean[i], rstd[i] = m, r


@kernel
def _layernorm_backward(dy, x, gain, mean, rstd, dx, dgain, dbias, tasks):
    rows, width = x.shape
    for task in prange(tasks):
        dg, db = dgain[task], dbias[task]
        for i in range(rows * task // tasks, rows * (task + 1) // tasks):
            dyi, xi, dxi, m, r = dy[i], x[i], dx[i], mean[i], rstd[i]
            sum_h = xi.dtype.type(0)
            sum_hx = xi.dtype.type(0)
            for j in range(width):
                h = gain[j] * dyi[j]
                sum_h += h
                sum_hx += h * (xi[j] - m)
            mean_h = sum_h / xi.dtype.type(width)
            mean_hx = sum_hx * r / xi.dtype.type(width)
            for j in range(width):
                normal = (xi[j] - m) * r
                dxi[j] = r * (gain[j] * dyi[j] - mean_h - normal * mean_hx)
                dg[j] += dyi[j] * normal
                db[j] += dyi[j]
