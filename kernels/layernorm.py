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
from kernels.add import add_up
from kernels.check import check
from kernels.jit import helper, kernel, launch, row_tasks


def layernorm_forward(x: np.ndarray, gain: np.ndarray, bias: np.ndarray | None = None,
                      eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, C), gain (C,), bias (C,) or None -> y (N, C), mean (N,), rstd (N,)."""
    check("layernorm_forward", "x", x, (None, None))
    check("layernorm_forward", "gain", gain, x.shape[1:], like=x)
    if bias is not None:
        check("layernorm_forward", "bias", bias, x.shape[1:], like=x)
    y = memory.empty(x.shape, x.dtype)
    mean, rstd = memory.empty((2, len(x)), x.dtype)
    launch(_layernorm_forward, row_tasks(x), x, gain, gain[:0] if bias is None else bias, x.dtype.type(eps),
           y, mean, rstd)
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
    partial, sums = memory.empty((tasks, 2 * x.shape[1]), x.dtype), memory.empty(2 * x.shape[1], x.dtype)
    launch(_layernorm_backward, tasks, dy, x, gain, mean, rstd, dx, partial, sums)
    return dx, sums[:x.shape[1]], sums[x.shape[1]:]


@kernel
def _layernorm_forward(x, gain, bias, eps, y, mean, rstd, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(x) * task // tasks, len(x) * (task + 1) // tasks):
            mean[i], rstd[i] = layernorm_row(x[i], gain, bias, eps, y[i])


@helper
def layernorm_row(x, gain, bias, eps, y):
    real, width = x.dtype.type, x.dtype.type(x.size)
    total, squares = real(0), real(0)
    for j in range(x.size):
        total += x[j]
    mean = total / width
    for j in range(x.size):
        squares += (x[j] - mean) * (x[j] - mean)
    rstd = real(1) / real(math.sqrt(squares / width + eps))
    if bias.size:
        for j in range(x.size):
            y[j] = (x[j] - mean) * rstd * gain[j] + bias[j]
    else:
        for j in range(x.size):
            y[j] = (x[j] - mean) * rstd * gain[j]
    return mean, rstd


@kernel
def _layernorm_backward(dy, x, gain, mean, rstd, dx, partial, sums, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        layernorm_rows_backward(dy, x, gain, mean, rstd, dx, len(x) * task // tasks,
                                len(x) * (task + 1) // tasks, partial[task])
    add_up(partial, sums)


@helper
def layernorm_rows_backward(dy, x, gain, mean, rstd, dx, first, last, sums):
    """Rows first to last; their sums are dgain and dbias, side by side."""
    for j in range(sums.size):
        sums[j] = 0
    dgain, dbias = sums[:gain.size], sums[gain.size:]
    for i in range(first, last):
        layernorm_row_backward(dy[i], x[i], gain, mean[i], rstd[i], dx[i], dgain, dbias)


@helper
def layernorm_row_backward(dy, x, gain, mean, rstd, dx, dgain, dbias):
    real = x.dtype.type
    inverse = real(1) / real(x.size)      # LLVM would divide by x.size in the loop
    sum_h, sum_hx = real(0), real(0)
    for j in range(x.size):
        h = gain[j] * dy[j]
        sum_h += h
        sum_hx += h * (x[j] - mean)
    mean_h, mean_hx = sum_h * inverse, sum_hx * rstd * inverse
    for j in range(x.size):
        normal = (x[j] - mean) * rstd
        dx[j] = rstd * (gain[j] * dy[j] - mean_h - normal * mean_hx)
        dgain[j] += dy[j] * normal
        dbias[j] += dy[j]
