"""Fused ops: one kernel forward and one backward each, beside its reference, the same in primitive ops.

The reference is what the kernel is tested against, and what runs under `create_graph=True` and `unfused()`.
"""
from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

import kernels
from kernels.check import check_range
from minitensor.ops import erf, logsumexp, relu, square, tanh
from minitensor.random import next_seed
from minitensor.tensor import Tensor, fused


def _plain(x: Any) -> np.ndarray:
    """x, or a copy, as an array that is C-contiguous and writeable: what kernels are compiled for."""
    if isinstance(x, np.ndarray) and x.flags.c_contiguous and x.flags.writeable:
        return x
    return np.require(x, requirements=("C", "W"))


def _rows(x: np.ndarray) -> np.ndarray:
    """x as a matrix (N, C) of its last axis."""
    x = _plain(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_axes(op_name: str, x: Any) -> None:
    if x.ndim == 0:
        raise ValueError(f"{op_name}: x has no axes; it must have one or more")


# ---- linear ------------------------------------------------------------------------------------------------

def _check_linear(x, weight):
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: inner sizes differ: x is {x.shape}, weight is {weight.shape}; "
                         "x.shape[-1] must equal weight.shape[1]")


def _linear_reference(x, weight, bias=None, *, activation=None):
    _check_linear(x, weight)
    y = np.matmul(x, np.transpose(weight))
    y = y if bias is None else y + bias
    return y if activation is None else ACTIVATIONS[_known(activation)](y)


@fused(reference=_linear_reference)
def linear(x, weight, bias=None, *, activation=None):
    """x weightᵀ + bias: x (..., K), weight (N, K), bias (N,) or None -> (..., N).

    activation: None, "gelu", "gelu_tanh" or "relu2", applied while the product is still in the cache.

    >>> linear(Tensor([[1, 2]]), Tensor([[1, 0], [0, 1], [1, 1]]), Tensor([0, 0, 0.5]))
    Tensor([[1. , 2. , 3.5]])
    """
    _check_linear(x, weight)
    rows, shape = _rows(x), (*x.shape[:-1], len(weight))
    weight, bias = _plain(weight), None if bias is None else _plain(bias)
    y, kept = kernels.linear_forward(rows, weight, bias, activation and _known(activation))
    last: list[np.ndarray] = []                              # the gradient before the activation, made once

    def dbefore(g: np.ndarray) -> np.ndarray:
        if activation is None:
            return _rows(g)
        if not last or last[0] is not g:
            rows_of_g = _rows(g)
            last[:] = [g, kernels.relu2_backward(rows_of_g, kept) if activation == "relu2" else
                       kernels.gelu_backward(rows_of_g, kept)]
        return last[1]

    return y.reshape(shape), (lambda g: kernels.matmul(dbefore(g), weight).reshape(x.shape),
                              lambda g: kernels.matmul(dbefore(g), rows, transpose_a=True),
                              lambda g: kernels.column_sum(dbefore(g)))


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}; it must be None or one of "
                         f"{', '.join(map(repr, ACTIVATIONS))}")
    return activation


# ---- gelu --------------------------------------------------------------------------------------------------

def _gelu_reference(x, *, approximate=False):
    if approximate:
        return x * (0.5 * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))))
    return x * (0.5 * (1 + erf(x * math.sqrt(0.5))))


@fused(reference=_gelu_reference)
def _gelu(x, *, approximate):
    y, slope = kernels.gelu_forward(_plain(x), approximate)
    return y, lambda g: kernels.gelu_backward(_plain(g), slope)


def gelu(x, approximate="none"):
    """x Φ(x), where Φ is the normal distribution function; approximate: "none" or "tanh", as in GPT-2."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}; it must be 'none' or 'tanh'")
    return _gelu(x, approximate=approximate == "tanh")


# ---- relu2 -------------------------------------------------------------------------------------------------

def _relu2_reference(x):
    return square(relu(x))


@fused(reference=_relu2_reference)
def relu2(x):
    """max(x, 0)², the squared ReLU."""
    y = kernels.relu2_forward(_plain(x))
    return y, lambda g: kernels.relu2_backward(_plain(g), y)


# The activations that `linear` knows, as their references.
ACTIVATIONS = {"gelu": _gelu_reference, "gelu_tanh": functools.partial(_gelu_reference, approximate=True),
               "relu2": _relu2_reference}


# ---- layernorm ---------------------------------------------------------------------------------------------

def _check_layernorm(x, weight, bias):
    _check_axes("layernorm", x)
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.shape != x.shape[-1:]:
            raise ValueError(f"layernorm: {name} is {array.shape}, x is {x.shape}; "
                             f"{name}.shape must equal x.shape[-1:]")


def _layernorm_reference(x, weight, bias=None, *, eps=1e-5):
    _check_layernorm(x, weight, bias)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    normal = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return normal * weight if bias is None else normal * weight + bias


@fused(reference=_layernorm_reference)
def layernorm(x, weight, bias=None, *, eps=1e-5):
    """Normalise the last axis to mean 0 and variance 1, scale and shift: x (..., C), weight and bias (C,).

    >>> np.round(layernorm(Tensor([[1, 2, 3]]), Tensor([1, 1, 1])).numpy(), 4)
    array([[-1.2247,  0.    ,  1.2247]], dtype=float32)
    """
    _check_layernorm(x, weight, bias)
    rows = _rows(x)
    weight, bias = _plain(weight), None if bias is None else _plain(bias)
    y, mean, rstd = kernels.layernorm_forward(rows, weight, bias, eps)

    def vjp(g):
        dx, dweight, dbias = kernels.layernorm_backward(_rows(g), rows, weight, mean, rstd)
        return dx.reshape(x.shape), dweight, dbias
    return y.reshape(x.shape), vjp


# ---- softmax -----------------------------------------------------------------------------------------------

def _softmax_reference(x):
    shift = np.max(x.numpy(), axis=-1, keepdims=True, initial=-np.inf)   # cancels, so it can be a constant
    e = np.exp(x - shift)
    return e / np.sum(e, axis=-1, keepdims=True)


@fused(reference=_softmax_reference)
def _softmax(x):
    y = kernels.softmax_forward(_rows(x))
    return y.reshape(x.shape), lambda g: kernels.softmax_backward(_rows(g), y).reshape(g.shape)


def _log_softmax_reference(x):
    return x - logsumexp(x, axis=-1, keepdims=True)


@fused(reference=_log_softmax_reference)
def _log_softmax(x):
    z = kernels.log_softmax_forward(_rows(x))
    return z.reshape(x.shape), lambda g: kernels.log_softmax_backward(_rows(g), z).reshape(g.shape)


def softmax(x, axis=-1):
    """exp(x) / Σ exp(x) along one axis, without overflow.

    >>> softmax(Tensor([1000, 1000, 0]))
    Tensor([0.5, 0.5, 0. ])
    """
    return _along(_softmax, x, axis)


def log_softmax(x, axis=-1):
    """The logarithm of softmax along one axis, without overflow or underflow."""
    return _along(_log_softmax, x, axis)


def _along(function, x, axis):
    x = x if isinstance(x, Tensor) else np.asarray(x)
    _check_axes(function.__name__, x)
    if axis in (-1, x.ndim - 1):
        return function(x)
    return np.swapaxes(function(np.swapaxes(x, axis, -1)), axis, -1)


# ---- rotary ------------------------------------------------------------------------------------------------

def _rotary_reference(qkv, heads, *, base, eps, start):
    batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * heads)
    parts = np.reshape(qkv, (batch, time, 3, heads, width))
    qk, v = parts[:, :, :2], parts[:, :, 2:]
    if eps is not None:
        qk = qk / np.sqrt(np.mean(qk * qk, axis=-1, keepdims=True) + eps)
    if base is not None:
        cos, sin = (np.reshape(table, (time, 1, 1, width // 2))
                    for table in kernels.rotary_angles(time, width, base, qkv.dtype, start))
        first, second = qk[..., :width // 2], qk[..., width // 2:]
        qk = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return np.reshape(np.concatenate([qk, v], axis=2), qkv.shape)


@fused(reference=_rotary_reference)
def _rotary(qkv, heads, *, base, eps, start):
    y, scales = kernels.rotary_forward(_plain(qkv), heads, base, eps, start)
    return y, lambda g: kernels.rotary_backward(_plain(g), y, scales, heads, base, start)


def rotary(qkv, heads, *, base=10_000.0, eps=None, start=0):
    """Rotate each pair of numbers of queries and keys by an angle that grows with the token's position, so
    that attention sees distances: packed qkv (B, T, 3C), as `attention` takes it -> (B, T, 3C).

    Number j of a head of width D, which is even, is paired with number j + D/2; the angle is t base^(-2j/D).
    eps: if given, queries and keys are normalised first, as `qk_norm` does. start: the first token's t.
    Source: Su et al. 2021.
    """
    _check_qkv("rotary", qkv, heads, 0 if eps is None else eps)
    if qkv.shape[2] // (3 * heads) % 2 or base is None or not 0 < base < math.inf or start < 0:
        raise ValueError(f"rotary: qkv is {qkv.shape}, {heads} heads, base {base}, start {start}; C / heads "
                         "must be even, base above 0, start at least 0")
    return _rotary(qkv, heads, base=base, eps=eps, start=start)


def qk_norm(qkv, heads, *, eps=1e-6):
    """Divide each head's query and key by √(mean(x²) + eps), so that their products stay small:
    packed qkv (B, T, 3C), as `attention` takes it -> (B, T, 3C). Source: Henry et al. 2020.
    """
    _check_qkv("qk_norm", qkv, heads, eps)
    return _rotary(qkv, heads, base=None, eps=eps, start=0)


def _check_qkv(op_name: str, qkv: Any, heads: int, eps: float = 0) -> None:
    if eps is None or not 0 <= eps < math.inf:
        raise ValueError(f"{op_name}: eps is {eps}; it must be 0 or a positive number")
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"{op_name}: qkv is {qkv.shape}; "
                         f"it must be (B, T, 3C) with {heads} heads dividing C")


# ---- attention ---------------------------------------------------------------------------------------------

def _attention_reference(qkv, heads, *, causal, mask, p, seed):
    return _attend(*np.split(qkv, 3, axis=2), heads, causal, mask, p, seed)


def _cross_attention_reference(q, kv, heads, *, causal, mask, p, seed):
    return _attend(q, *np.split(kv, 2, axis=2), heads, causal, mask, p, seed)


def _attend(q, k, v, heads, causal, mask, p, seed):
    (batch, time, width), keys = q.shape, k.shape[1]
    visible = np.tri(time, keys, keys - time, dtype=bool) if causal else np.ones((time, keys), bool)
    if mask is not None:
        k, v = (np.where(mask[:, :, None], x, 0.0) for x in (k, v))     # so that not even a NaN is seen
        visible = visible & mask[:, None, None, :]                      # (B, 1, T, S)
    seeing = visible.any(axis=-1, keepdims=True)
    q, k, v = (np.swapaxes(np.reshape(x, (*x.shape[:2], heads, width // heads)), 1, 2)
               for x in (q, k, v))                                      # (B, H, T or S, D)
    scores = np.matmul(q, np.swapaxes(k, 2, 3)) * (1 / math.sqrt(width // heads))      # (B, H, T, S)
    weights = _softmax_reference(np.where(visible | ~seeing, scores, -np.inf))
    if p:
        kept = kernels.dropout_mask(batch * heads * time, keys, p, seed).reshape(weights.shape)
        weights = np.where(kept, weights * (1 / (1 - p)), 0.0)
    y = np.matmul(weights, v)                                           # (B, H, T, D)
    if not seeing.all():
        y = np.where(seeing, y, 0.0)
    return np.reshape(np.swapaxes(y, 1, 2), (batch, time, width))


@fused(reference=_attention_reference)
def _attention(qkv, heads, *, causal, mask, p, seed):
    qkv = _plain(qkv)
    out, norms = kernels.attention_forward(qkv, heads, causal, p, seed, mask)
    return out, lambda g: kernels.attention_backward(
        _plain(g), qkv, out, norms, heads, causal, p, seed, mask)


@fused(reference=_cross_attention_reference)
def _cross_attention(q, kv, heads, *, causal, mask, p, seed):
    q, kv = _plain(q), _plain(kv)
    out, norms = kernels.cross_attention_forward(q, kv, heads, causal, p, seed, mask)
    return out, lambda g: kernels.cross_attention_backward(
        _plain(g), q, kv, out, norms, heads, causal, p, seed, mask)


def attention(qkv, heads, *, causal=True, mask=None, p=0.0, seed=None):
    """softmax(q kᵀ / √D) v for each head, on packed queries, keys and values: qkv (B, T, 3C) -> (B, T, C).

    heads divides C, and head h has columns h D to (h + 1) D of each third. causal: a token sees itself and
    earlier ones. mask (B, T) of bool: where it is False (padding, say) no query sees the key; a query that
    sees no key at all gets zeros, as in PyTorch. p: dropout of the attention weights; seed: of its mask, by
    default `minitensor.seed`'s next.

    >>> q = k = np.zeros((1, 2, 1))                         # all scores alike: each token takes the mean
    >>> v = np.array([[[1.0], [3.0]]])                      # of the values that it sees
    >>> attention(np.concatenate([q, k, v], axis=2), heads=1)
    array([[[1.],
            [2.]]])
    """
    _check_qkv("attention", qkv, heads)
    mask = _checked_mask("attention", mask, qkv.shape[:2])
    return _attention(qkv, heads, causal=causal, mask=mask, p=p, seed=_dropout_seed(p, seed))


def cross_attention(q, kv, heads, *, causal=False, mask=None, p=0.0, seed=None):
    """As `attention`, with queries from one sequence, and packed keys and values from another.

    q (B, T, C), kv (B, S, 2C) -> (B, T, C); mask (B, S). causal: the queries are those of the last T of S
    tokens, so that query i sees the keys up to i + S - T, as when one goes on with a text whose earlier keys
    and values were kept. (PyTorch's is_causal lets it see those up to i, which is the same where T = S.)
    """
    if q.ndim != 3 or heads < 1 or q.shape[2] % heads:
        raise ValueError(f"cross_attention: q is {q.shape}; "
                         f"it must be (B, T, C) with {heads} heads dividing C")
    if kv.ndim != 3 or kv.shape[0] != q.shape[0] or kv.shape[2] != 2 * q.shape[2]:
        raise ValueError(f"cross_attention: kv is {kv.shape}, q is {q.shape}; kv must be (B, S, 2C), "
                         f"here ({q.shape[0]}, S, {2 * q.shape[2]})")
    if causal and q.shape[1] > kv.shape[1]:
        raise ValueError(f"cross_attention: q holds {q.shape[1]} queries, kv {kv.shape[1]} keys; where "
                         "causal, the queries are the last tokens', so that T must be at most S")
    mask = _checked_mask("cross_attention", mask, kv.shape[:2])
    return _cross_attention(q, kv, heads, causal=causal, mask=mask, p=p, seed=_dropout_seed(p, seed))


def _checked_mask(op_name: str, mask: Any, shape: tuple[int, int]) -> np.ndarray | None:
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray) or mask.dtype != bool:
        given = f"an array of {mask.dtype}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
        raise TypeError(f"{op_name}: mask is {given}; "
                        "it must be an array of bool, True where a key is seen")
    if mask.shape != shape:
        raise ValueError(f"{op_name}: mask is {mask.shape}; it must be {shape}, a place for each key")
    return mask


def _dropout_seed(p: float, seed: int | None) -> int:
    return next_seed() if seed is None and p else seed or 0


# ---- dropout -----------------------------------------------------------------------------------------------

def _dropout_reference(x, *, p, seed):
    return np.where(kernels.flat_mask(x.shape, p, seed), x * (1 / (1 - p)), 0.0)


@fused(reference=_dropout_reference)
def _dropout(x, *, p, seed):
    return (kernels.dropout(_plain(x), p, seed),
            lambda g: kernels.dropout(_plain(g), p, seed))


def dropout(x, p, seed=None):
    """Each element is 0 with probability p, else divided by 1 - p; the mask is a hash of (seed, position).

    seed: the next of `minitensor.seed`'s if left out. ValueError unless 0 <= p < 1.

    >>> y = dropout(np.ones(1000), p=0.2, seed=0)
    >>> np.unique(y), int(np.sum(y == 0))                   # 200 zeros are to be expected
    (array([0.  , 1.25]), 178)
    """
    if p == 0:
        return x
    kernels.keep_below(p)                                            # raises for a p out of range
    return _dropout(x, p=p, seed=next_seed() if seed is None else seed)


# ---- embedding ---------------------------------------------------------------------------------------------

def _embedding_reference(ids, weight):
    check_range("embedding", "ids", ids, len(weight))                # as the kernel does
    return weight[ids]


@fused(reference=_embedding_reference)
def _embedding(ids, weight):
    flat = ids.reshape(-1)
    y = kernels.embedding_forward(flat, _plain(weight))
    return (y.reshape(*ids.shape, weight.shape[1]),
            (lambda g: None,
             lambda g: functools.partial(kernels.embedding_backward, _rows(g), flat, len(weight))))


def embedding(ids, weight):
    """Rows of a table: ids (...) integers, weight (V, C) -> (..., C); IndexError unless 0 <= id < V.

    >>> embedding([2, 0], Tensor([[0, 1], [2, 3], [4, 5]]))
    Tensor([[4., 5.],
            [0., 1.]])
    """
    return _embedding(_integers("embedding", "ids", ids), weight)


def _integers(op_name: str, name: str, ids: Any) -> np.ndarray:
    if isinstance(ids, Tensor):
        raise TypeError(f"{op_name}: {name} is a Tensor of {ids.dtype}; it must hold integers, "
                        f"which no Tensor does: give a list or an array, as np.array([0, 2])")
    ids = np.asarray(ids, order="C")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{op_name}: {name} is an array of {ids.dtype}; it must hold integers, "
                        f"as after {name}.astype(np.int64)")
    return ids if ids.dtype in (np.int32, np.int64) else ids.astype(np.int64)


# ---- cross-entropy -----------------------------------------------------------------------------------------

def _cross_entropy_reference(logits, targets, *, ignore_index, reduction):
    counted = targets != ignore_index
    check_range("cross_entropy", "targets", targets[counted], logits.shape[-1])     # as the kernel does
    safe = np.where(counted, targets, 0)
    picked = _log_softmax_reference(logits)[(*np.indices(targets.shape, sparse=True), safe)]
    losses = np.where(counted, -picked, 0.0)
    if reduction == "none":
        return losses
    return np.sum(losses) * (1.0 if reduction == "sum" else _inverse(counted.sum()))


@fused(reference=_cross_entropy_reference)
def _cross_entropy(logits, targets, *, ignore_index, reduction):
    rows, flat = _rows(logits), targets.reshape(-1)
    losses, norms = kernels.cross_entropy_forward(rows, flat, ignore_index)
    scale = _inverse((flat != ignore_index).sum()) if reduction == "mean" else 1.0

    def vjp(g):
        dlosses = np.broadcast_to(g * logits.dtype.type(scale), targets.shape)
        dlosses = np.require(dlosses, requirements=("C", "W")).reshape(-1)
        return kernels.cross_entropy_backward(dlosses, rows, flat, norms, ignore_index).reshape(logits.shape)

    if reduction == "none":
        return losses.reshape(targets.shape), (vjp,)
    return losses.sum() * logits.dtype.type(scale), (vjp,)


def cross_entropy(logits, targets, *, ignore_index=-100, reduction="mean"):
    """-log softmax(logits)[target], in nats: logits (..., V), targets (...) integers -> a scalar, or (...).

    Targets equal to ignore_index do not count. reduction: "mean" over those that count, "sum" or "none".
    IndexError for any other target outside 0 to V - 1.

    >>> print(f"{cross_entropy(Tensor([[0, 0], [0, 0]]), [0, 1]):.4f}")     # a coin: log 2
    0.6931
    """
    targets = _checked_targets(logits, targets, reduction)
    return _cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def _checked_targets(logits: Any, targets: Any, reduction: str) -> np.ndarray:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    targets = _integers("cross_entropy", "targets", targets)
    if logits.ndim == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: logits are {logits.shape}, targets are {targets.shape}; "
                         "targets.shape must equal logits.shape[:-1]")
    return targets


def _inverse(count: int) -> float:
    return 1 / int(count) if count else math.nan

