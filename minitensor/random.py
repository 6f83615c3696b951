"""Randomness: one seed for this thread's weights and dropout masks."""
from __future__ import annotations

import threading
from typing import Any

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


def get_state() -> dict[str, Any]:
    """Where this thread's random numbers are: numbers, strings and dicts of them, as JSON can hold."""
    return {"generator": _state.generator.bit_generator.state, "seed": _state.seed, "count": _state.count}


def set_state(state: dict[str, Any]) -> None:
    """Go on from where `get_state` was; ValueError, and no change, for anything that it did not give."""
    try:
        bits = np.random.PCG64()
        bits.state = state["generator"]
        seed, count = int(state["seed"]), int(state["count"])
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"set_state: this is not what get_state gave: {error!r}") from error
    _state.generator, _state.seed, _state.count = np.random.Generator(bits), seed, count
