"""What tables of counts reach on the validation split: the yardstick beside a model's loss.

Fitted on the training split, over V symbols, with one added to every count (Laplace), so that nothing is
impossible:

    uniform   p(b) = 1 / V
    unigram   p(b) = (n_b + 1) / (N + V)
    bigram    p(b | a) = (n_ab + 1) / (n_a + V)

Losses are the mean of -log p over the validation split, every token but the first, as `evaluate` of
gpt/train.py takes the model's.
"""
from __future__ import annotations

import math

import numpy as np

PIECE = 2**22                                # tokens counted at once
LARGEST_TABLE = 2**26                        # entries


def baselines(train: np.ndarray, validation: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Nats a token of each table by name; no bigram where its table would have over 2**26 entries."""
    found = {"uniform": math.log(vocabulary)}
    singles = counts(train, vocabulary, 1)
    met = counts(validation[1:], vocabulary, 1)
    found["unigram"] = _loss(met, (singles + 1) / (singles.sum() + vocabulary))
    if vocabulary**2 <= LARGEST_TABLE:
        pairs = counts(train, vocabulary, 2).reshape(vocabulary, vocabulary)
        met = counts(validation, vocabulary, 2)
        found["bigram"] = _loss(met, ((pairs + 1) / (pairs.sum(axis=1, keepdims=True) + vocabulary)).ravel())
    return found


def _loss(met: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean of -log p over what was met so many times."""
    return float(-(met @ np.log(probabilities)) / met.sum())


def counts(ids: np.ndarray, vocabulary: int, length: int) -> np.ndarray:
    """How often each token, or for length 2 each pair, occurs in ids; a piece at a time."""
    total = np.zeros(vocabulary**length, np.int64)
    for start in range(0, len(ids), PIECE):
        piece = ids[start:start + PIECE + length - 1].astype(np.int64)
        code = piece if length == 1 else piece[:-1] * vocabulary + piece[1:]
        total += np.bincount(code, minlength=len(total))
    return total
