"""Training steps without Python between their kernels: the launches of one step, noted and made again.

A kernel of a small model runs for a few tenths of a millisecond, and what Python does before the next one can
take half as long, as kernels leave nothing of it in the caches. Without dropout, batches of one shape lead to
the same launches. So those of one step are kept, with their arrays, and made again for the next batches: once
beside a step as usual, and then alone if every bit of the loss and of the gradients was the same.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np

import kernels
import minitensor as mt
from gpt.model import GPT
from kernels import memory
from kernels.check import check_range
from kernels.jit import launch, noting


class Replay:
    """A batch's loss, and its gradients added to the parameters', as plain(x, y) finds them for ids x and
    targets y (B, T) in one pass through the model: from the fourth call on by replay, where that can be done.

    Gradients are good until the next call, which may write into their arrays.
    """

    def __init__(self, model: GPT, plain: Callable[[np.ndarray, np.ndarray], float]):
        self.model, self.plain = model, plain
        self.parameters = list(model.parameters())
        self.pool: defaultdict = defaultdict(list)           # between launches nobody else gets these arrays
        self.calls = 0
        self.possible = model.config.dropout == 0            # else each step has masks of its own
        self.verified = False

    def __call__(self, x: np.ndarray, y: np.ndarray) -> float:
        if any([p.grad is not None for p in self.parameters]):
            return self.plain(x, y)                          # not in the pool: these may lie there
        self.calls += 1
        with memory.apart(self.pool):
            if self.calls == 1 or not self.possible:
                return self.plain(x, y)                      # the first may compile
            if self.calls == 2:
                return self._note(x, y)
            if not self._fits(x, y):
                return self.plain(x, y)
            return self._replay(x, y) if self.verified else self._verify(x, y)

    def _note(self, x: np.ndarray, y: np.ndarray) -> float:
        """A step as usual, noted."""
        self.possible = False                                # should it raise
        self.tape: list[tuple] = []
        self.x, self.y = x.copy(), y.copy()
        self.arrays, self.precision = [p.data for p in self.parameters], kernels.get_matmul_precision()
        with noting(lambda *entry: self.tape.append(_unleased(entry))):
            losses = mt.cross_entropy(self.model(self.x), self.y, reduction="none")
            self.scale = losses.dtype.type(1 / losses.size)
            losses.backward(np.full(losses.shape, self.scale))
        self.losses, self.gradients = memory.unleased(losses.numpy()), _unleased(self._gradients())
        self.possible = True
        return self._loss()

    def _fits(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Is all as it was when the step was noted?"""
        return (x.shape == self.x.shape and x.dtype == self.x.dtype and y.dtype == self.y.dtype
                and kernels.get_matmul_precision() == self.precision
                and all([p.data is array for p, array in zip(self.parameters, self.arrays, strict=True)]))

    def _replay(self, x: np.ndarray, y: np.ndarray) -> float:
        for name, ids, own in (("x", x, self.x), ("y", y, self.y)):
            check_range("Replay", name, ids, len(self.model.tokens.weight))
            own[...] = ids
        for entry in self.tape:
            launch(*entry)
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = mt.Tensor(gradient)
        return self._loss()

    def _verify(self, x: np.ndarray, y: np.ndarray) -> float:
        """A step by replay, and as usual: if a bit is not the same, no other is replayed."""
        loss = self._replay(x, y)
        bits = self._digests()
        for p in self.parameters:
            p.grad = None
        expected = self.plain(x, y)
        self.verified = self.possible = loss == expected and bits == self._digests()
        return expected

    def _gradients(self) -> list[np.ndarray]:
        return [p.grad.data for p in self.parameters if p.grad is not None]

    def _digests(self) -> list[bytes]:
        return [blake2b(gradient.data).digest() for gradient in self._gradients()]

    def _loss(self) -> float:
        return float(self.losses.sum() * self.scale)


def _unleased(entry: Any) -> Any:
    """A launch whose arrays may be overwritten as soon as the step that made them has no use for them."""
    if isinstance(entry, np.ndarray):
        return memory.unleased(entry)
    return type(entry)(map(_unleased, entry)) if isinstance(entry, (tuple, list)) else entry
