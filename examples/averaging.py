"""From an average over the past to self-attention, and why attention divides by √D and networks normalise.

    python examples/averaging.py

The lecture's "mathematical trick" in four versions, its note on the scale of scores, and its two kinds of
normalisation. Each prints the numbers that it is about. Source: Karpathy 2023.
"""
import sys

import numpy as np

import minitensor as mt
from gpt.cli import Parser, run
from minitensor import nn

B, T, C, D, SEED = 4, 8, 32, 16, 0                   # sequences, tokens, width, width of the head


# ---- four versions: each token becomes an average of itself and those before it ----------------------------

def by_loops(x):
    """Token by token: as it is meant, and slow. x (B, T, C) -> (B, T, C)."""
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[b, t] = x[b, :t + 1].mean(axis=0)
    return y


def by_matrix_product(x):
    """The same by one product: row t of the weights has 1 / (t + 1) at 0 to t, and zeros behind."""
    weights = np.tril(np.ones((x.shape[1], x.shape[1]), x.dtype))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ x                               # (T, T) @ (B, T, C)


def by_softmax(x):
    """The same weights as a softmax: scores of 0 share alike, and -inf gets nothing."""
    scores = np.zeros((x.shape[1], x.shape[1]), x.dtype)
    return mt.softmax(masked(scores)) @ x


def by_attention(x, query, key, value):
    """And scores that depend on the data: what a token looks for, times what another offers."""
    q, k, v = query(x), key(x), value(x)             # (B, T, D)
    scores = q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[2])
    return mt.softmax(masked(scores)) @ v            # (B, T, T) @ (B, T, D)


def masked(scores):
    """Scores (..., T, T) with -inf for tokens to come."""
    return np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf).astype(scores.dtype)


def versions(random):
    """Names of pairs that are the same, and the largest difference between the two."""
    x = random.standard_normal((B, T, C), np.float32)
    query, key, value = (nn.Linear(C, D, bias=False) for _ in range(3))
    with mt.no_grad():
        looks_for_nothing = by_attention(mt.Tensor(x), lambda x: query(x) * 0, key, value).numpy()
        attention = by_attention(mt.Tensor(x), query, key, value).numpy()
        values = value(x).numpy()
        packed = np.concatenate([layer(x).numpy() for layer in (query, key, value)], axis=2)
    kernel = mt.attention(packed, 1)
    pairs = {
        "loops and matrix product": (by_loops(x), by_matrix_product(x)),
        "matrix product and softmax": (by_matrix_product(x), by_softmax(x)),
        "softmax of 0 and attention whose queries are 0": (by_softmax(values), looks_for_nothing),
        "attention and the kernel that a GPT uses": (attention, kernel),
        "attention and the plain average: not the same": (attention, by_softmax(values)),
    }
    return {name: float(np.abs(a - b).max()) for name, (a, b) in pairs.items()}


# ---- the scale of scores -----------------------------------------------------------------------------------

def scores(random, scale, tokens=1000, depth=D):
    """Variance of scores of queries and keys from N(0, 1), and the mean of the largest weight of a query."""
    q, k = random.standard_normal((2, tokens, depth), np.float32)
    s = q @ k.T * np.float32(scale)
    return float(s.var()), float(mt.softmax(s[:, :T]).max(axis=1).mean())


# ---- normalising columns or rows ---------------------------------------------------------------------------

def batch_norm(x, eps=1e-5):
    """Each column of x (N, C), a feature, to mean 0 and variance 1 over the batch: rows meet each other."""
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + eps)


def layer_norm(x):
    """Each row of x (N, C), an example, to mean 0 and variance 1 over its features: rows are on their own."""
    return mt.layernorm(x, np.ones(x.shape[1], x.dtype))


def columns_and_rows(x):
    """Mean and standard deviation of the first column, and of the first row."""
    return [float(v) for part in (x[:, 0], x[0]) for v in (part.mean(), part.std())]


def main(arguments=None):
    Parser(description=__doc__.split("\n")[0]).parse_args(arguments)
    mt.seed(SEED)
    random = np.random.default_rng(SEED)
    print(f"Averages over the past, x ({B}, {T}, {C}): the largest difference between")
    for name, difference in versions(random).items():
        print(f"    {name:<50}{difference:10.1e}")

    print(f"\nScores of queries and keys from N(0, 1), width {D}:    variance    largest of {T} weights")
    for name, scale in (("q · k", 1.0), ("q · k / √D", D**-0.5)):
        variance, largest = scores(random, scale)
        print(f"    {name:<46}{variance:10.2f}{largest:17.2f}")
    row = np.array([0.1, -0.2, 0.3, -0.2, 0.5], np.float32)
    print("A sum of D products has D times the variance of one; softmax of large scores all but chooses one:")
    for factor in (1, 8, 64):
        weights = ", ".join(f"{weight:.3f}" for weight in mt.softmax(row * np.float32(factor)))
        print(f"    softmax({factor:2} x [0.1, -0.2, 0.3, -0.2, 0.5]) = [{weights}]")

    x = 3 * random.standard_normal((32, 100), np.float32) + 5
    print("\nx (32, 100), examples by features:       first column         first row")
    print("                                       mean       std      mean       std")
    for name, y in (("x", x), ("batch norm: columns", batch_norm(x)), ("layer norm: rows", layer_norm(x))):
        print(f"    {name:<29}" + "".join(f"{value:10.3f}" for value in columns_and_rows(y)))
    print("Layer norm treats an example the same whatever the batch: nothing to remember between steps.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
