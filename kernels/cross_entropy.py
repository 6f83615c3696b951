"""Cross-entropy of logits against class numbers, fused with the softmax, on (N, V).

    loss_n = logsumexp(x_n) - x_n[target_n]              dx_nv = dloss_n (softmax(x_n)_v - [v = target_n])

The forward pass keeps only logsumexp, in two parts (see `softmax.log_sum_exp`): the softmax is made again
where it is needed.
"""
from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check, check_integers, check_range
from kernels.elementary import exp_below
from kernels.jit import exact, helper, kernel, launch, row_tasks
from kernels.softmax import log_share, log_sum_exp


def cross_entropy_forward(logits: np.ndarray, targets: np.ndarray,
                          ignore_index: int = -100) -> tuple[np.ndarray, np.ndarray]:
    """logits (N, V), targets (N,) -> losses (N,) in nats, 0 for the target ignore_index; norms (N, 2).

    norms: the largest logit of a row, and logsumexp less it.
    """
    check("cross_entropy_forward", "logits", logits, (None, None))
    check_integers("cross_entropy_forward", "targets", targets, logits.shape[:1])
    check_range("cross_entropy", "targets", targets[targets != ignore_index], logits.shape[1])
    losses, norms = memory.empty(len(logits), logits.dtype), memory.empty((len(logits), 2), logits.dtype)
    launch(_cross_entropy_forward, row_tasks(logits), logits, targets, ignore_index, losses, norms)
    return losses, norms


def cross_entropy_backward(dlosses: np.ndarray, logits: np.ndarray, targets: np.ndarray, norms: np.ndarray,
                           ignore_index: int = -100) -> np.ndarray:
    """dlogits (N, V), from dlosses (N,) and what the forward pass was given and gave."""
    check("cross_entropy_backward", "logits", logits, (None, None))
    check("cross_entropy_backward", "dlosses", dlosses, logits.shape[:1], like=logits)
    check("cross_entropy_backward", "norms", norms, (len(logits), 2), like=logits)
    check_integers("cross_entropy_backward", "targets", targets, logits.shape[:1])
    check_range("cross_entropy", "targets", targets[targets != ignore_index], logits.shape[1])
    dlogits = memory.empty(logits.shape, logits.dtype)
    launch(_cross_entropy_backward, row_tasks(logits), dlosses, logits, targets, norms, ignore_index, dlogits)
    return dlogits


@kernel
def _cross_entropy_forward(logits, targets, ignore_index, losses, norms, tasks):
    rows = len(logits)
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(rows * task // tasks, rows * (task + 1) // tasks):
            losses[i] = cross_entropy_row(logits[i], targets[i], ignore_index, norms[i])


@exact
def cross_entropy_row(x, target, ignore_index, norm):
    top, log_total = log_sum_exp(x)
    norm[0], norm[1] = top, log_total
    return -log_share(x[target], top, log_total) if target != ignore_index else x.dtype.type(0)


@kernel
def _cross_entropy_backward(dlosses, logits, targets, norms, ignore_index, dlogits, tasks):
    rows = len(logits)
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(rows * task // tasks, rows * (task + 1) // tasks):
            cross_entropy_row_backward(dlosses[i], logits[i], targets[i], norms[i], ignore_index, dlogits[i])


@helper
def cross_entropy_row_backward(dloss, x, target, norm, ignore_index, dx):
    if target == ignore_index:
        dx[:] = 0
    else:
        for j in range(x.size):
            dx[j] = dloss * exp_below(log_share(x[j], norm[0], norm[1]))
        dx[target] -= dloss
