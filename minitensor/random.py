"""Randomness: one seed for this thread's weights and dropout masks."""
from __future__ import annotations

import threading

import numpy as np

MASK64 = 2**64 - 1


class _State(threading.local):
    def __init__(self) -> None:
        self.start(0)

    def start(self, n: int) -> None:
        self.generator = np.random.default_rng(n)
        self.seed, self.count = n, 0

_state = _State()


def seed(n: int) -> None:
    """Start this thread's random numbers (initial weights, dropout masks) again from n, at least 0."""
    _state.start(n)


def generator() -> np.random.Generator:
    """This thread's generator, from which layers draw their initial weights."""
    return _state.generator


def next_seed() -> int:
    """The 64-bit seed of the next dropout mask."""
    _state.count += 1
    return (_state.seed * 0x9E3779B97F4A7C15 + _state.count * 0xBF58476D1CE4E5B9) & MASK64
