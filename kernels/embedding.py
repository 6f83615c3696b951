"""Rows of a table by number, and the gradient scattered back.

    y_n = weight[ids_n]                  dweight[v] = Σ over n with ids_n = v of dy_n

The sum runs over n in order for every v: tasks share out columns, not rows, so no two write to one place.
"""
from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check, check_integers, check_range
from kernels.jit import helper, kernel, launch, row_tasks


def embedding_forward(ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ids (N,) of int32 or int64, weight (V, C) -> y (N, C); IndexError for an id outside 0 to V - 1."""
    check("embedding_forward", "weight", weight, (None, None))
    check_integers("embedding_forward", "ids", ids, (None,))
    check_range("embedding", "ids", ids, len(weight))
    y = memory.empty((len(ids), weight.shape[1]), weight.dtype)
    launch(_embedding_forward, row_tasks(y), ids, weight, y)
    return y


def embedding_backward(dy: np.ndarray, ids: np.ndarray, rows: int,
                       total: np.ndarray | None = None) -> np.ndarray:
    """dweight (rows, C), from dy (N, C) and ids (N,); added to total in place, if that is given."""
    check("embedding_backward", "dy", dy, (None, None))
    check_integers("embedding_backward", "ids", ids, dy.shape[:1])
    check_range("embedding", "ids", ids, rows)
    shape = rows, dy.shape[1]
    if total is not None:
        check("embedding_backward", "total", total, shape, like=dy)
    dweight = memory.zeros(shape, dy.dtype) if total is None else total
    launch(_embedding_backward, max(1, min(dy.shape[1] // 32, row_tasks(dy))), dy, ids, dweight)
    return dweight


@kernel
def _embedding_forward(ids, weight, y, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(ids.size * task // tasks, ids.size * (task + 1) // tasks):
            copy_row(weight[ids[i]], y[i])


@helper
def copy_row(x, y):
    for j in range(x.size):
        y[j] = x[j]


@kernel
def _embedding_backward(dy, ids, dweight, tasks):
    width = dy.shape[1]
    for index in prange(tasks):
        task = np.int64(index)
        add_rows(dy, ids, dweight, width * task // tasks, width * (task + 1) // tasks)


@helper
def add_rows(dy, ids, dweight, first, last):
    for i in range(ids.size):
        source, to = dy[i], dweight[ids[i]]
        for j in range(first, last):
            to[j] += source[j]
