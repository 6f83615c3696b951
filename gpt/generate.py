"""Text from a model, one token after the other."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from gpt.decode import Decoder
from gpt.errors import BadInput
from gpt.model import GPT, evaluating
from gpt.tokenizer import CharTokenizer

LONGEST = 10**9                             # characters: 4 GB of tokens


def first_ids(tokenizer: CharTokenizer) -> np.ndarray:
    """What to go on from without a prompt, (1,): a new line, or the first symbol of a text without any."""
    return tokenizer.encode("\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0])


def generate(model: GPT, ids: np.ndarray, count: int, temperature: float = 1.0, top_k: int | None = None,
             seed: int = 0, after_token: Callable[[int], None] = lambda token: None,
             top_p: float | None = None, cache: bool = True) -> np.ndarray:
    """Go on from ids (N,), N at least 1, by count tokens: (N + count,) of int32.

    Each is drawn from softmax(logits / temperature), cut down to the top_k likeliest and then to the fewest
    whose share reaches top_p (all of them if left out), and sees the tokens from `window_start` on.
    Temperature 0 takes the likeliest. Equal arguments give equal tokens. after_token gets each. cache: keep
    keys and values of earlier tokens; without, all are computed again: the same text, slowly.
    """
    if not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature is {temperature}; it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise BadInput(f"--top-k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"--top-p is {top_p}; it must be above 0, and at most 1")
    if not 0 <= seed < 2**63:
        raise BadInput(f"--seed is {seed}; it must be in 0 to 2**63 - 1")
    if not 0 <= count <= LONGEST:
        raise BadInput(f"the number of characters is {count}; it must be in 0 to {LONGEST:,}")
    draw = np.random.Generator(np.random.Philox(seed))
    result = np.concatenate([np.asarray(ids, np.int32), np.empty(count, np.int32)])
    next_logits = (cached_logits if cache else logits_anew)(model, result, len(ids))
    for n in range(len(ids), len(result)):
        result[n] = choose(next(next_logits).astype(np.float64), temperature, top_k, draw.random(), top_p)
        after_token(int(result[n]))
    return result


def window_start(n: int, context: int) -> int:
    """Where the tokens that the n-th (from 0) sees begin: when the context is full, its older half is let go.

    Positions are learned from the window's start, so a window that slid by one would change every key and
    value; one that moves by half a context at a time lets them be kept in between.
    """
    moved = max(1, context // 2)
    return 0 if n <= context else -(-(n - context) // moved) * moved


def cached_logits(model: GPT, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """The logits (V,) for ids[first], ids[first + 1], ...; each is written before the next is asked for."""
    decoder, start, done = Decoder(model), 0, 0
    for n in range(first, len(ids)):
        if (moved := window_start(n, model.config.context)) != start or not done:
            decoder.seen, start, done = 0, moved, moved
        yield decoder(ids[done:n])
        done = n


def logits_anew(model: GPT, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """As `cached_logits`, by the model itself over the whole window, every time."""
    for n in range(first, len(ids)):
        with evaluating(model):
            logits = model(ids[None, window_start(n, model.config.context):n]).numpy()[0, -1]
        yield logits


def choose(logits: np.ndarray, temperature: float, top_k: int | None, uniform: float,
           top_p: float | None = None) -> int:
    """The token whose share of the cumulative distribution of logits (V,) holds uniform, in [0, 1)."""
    if temperature == 0:
        return int(np.argmax(logits))
    if top_k is not None and top_k < len(logits):
        kept = np.argsort(-logits, kind="stable")[:top_k]
        return int(kept[choose(logits[kept], temperature, None, uniform, top_p)])
    shares = np.exp((logits - logits.max()) / temperature)
    if top_p is not None and top_p < 1:
        kept = np.argsort(-shares, kind="stable")
        reached = np.cumsum(shares[kept]) / shares.sum() >= top_p
        kept = np.sort(kept[:int(reached.argmax()) + 1])
        return int(kept[choose(logits[kept], temperature, None, uniform)])
    cumulative = np.cumsum(shares)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(max=len(logits) - 1))
