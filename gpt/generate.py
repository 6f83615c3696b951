"""Text from a model, one token after the other."""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpt.errors import BadInput
from gpt.model import GPT, evaluating
from gpt.tokenizer import CharTokenizer

LONGEST = 10**9                             # characters: 4 GB of tokens


def first_ids(tokenizer: CharTokenizer) -> np.ndarray:
    """What to go on from without a prompt, (1,): a new line, or the first symbol of a text without any."""
    return tokenizer.encode("\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0])


def generate(model: GPT, ids: np.ndarray, count: int, temperature: float = 1.0, top_k: int | None = None,
             seed: int = 0, after_token: Callable[[], None] = lambda: None) -> np.ndarray:
    """Go on from ids (N,), N at least 1, by count tokens: (N + count,) of int32.

    Each is drawn from softmax(logits / temperature) over the top_k likeliest (all of them if left out), and
    sees the last `context` tokens. Temperature 0 takes the likeliest. Equal arguments give equal tokens.
    after_token is called after each.
    """
    if not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature is {temperature}; it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise BadInput(f"--top-k is {top_k}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise BadInput(f"--seed is {seed}; it must be in 0 to 2**63 - 1")
    if not 0 <= count <= LONGEST:
        raise BadInput(f"the number of characters is {count}; it must be in 0 to {LONGEST:,}")
    draw = np.random.Generator(np.random.Philox(seed))
    result = np.concatenate([np.asarray(ids, np.int32), np.empty(count, np.int32)])
    with evaluating(model):
        for n in range(len(ids), len(result)):
            seen = result[max(0, n - model.config.context):n]
            logits = model(seen[None]).numpy()[0, -1].astype(np.float64)
            result[n] = choose(logits, temperature, top_k, draw.random())
            after_token()
    return result


def choose(logits: np.ndarray, temperature: float, top_k: int | None, uniform: float) -> int:
    """The token whose share of the cumulative distribution of logits (V,) holds uniform, in [0, 1)."""
    if temperature == 0:
        return int(np.argmax(logits))
    if top_k is not None and top_k < len(logits):
        kept = np.argsort(-logits, kind="stable")[:top_k]
        return int(kept[choose(logits[kept], temperature, None, uniform)])
    cumulative = np.cumsum(np.exp((logits - logits.max()) / temperature))
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(max=len(logits) - 1))
