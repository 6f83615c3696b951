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
from minitensor.tensor import fused


def _rows(x: np.ndarray) -> np.ndarray:
    """x as a matrix (N, C) of its last axis, C-contiguous and writeable: what kernels are compiled for."""
    x = np.require(x, requirements=("C", "W"))
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
    """
    _check_linear(x, weight)
    rows, shape = _rows(x), (*x.shape[:-1], len(weight))
    weight, bias = np.ascontiguousarray(weight), None if bias is None else np.ascontiguousarray(bias)
    y, before = kernels.linear_forward(rows, weight, bias, activation and _known(activation))
    last: list[np.ndarray] = []                              # the gradient before the activation, made once

    def dbefore(g: np.ndarray) -> np.ndarray:
        if activation is None:
            return _rows(g)
        if not last or last[0] is not g:
            rows_of_g = _rows(g)
            last[:] = [g, kernels.relu2_backward(rows_of_g, before) if activation == "relu2" else
                       kernels.gelu_backward(rows_of_g, before, activation == "gelu_tanh")]
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
    rows = np.asarray(x, order="C")
    return (kernels.gelu_forward(rows, approximate),
            lambda g: kernels.gelu_backward(np.asarray(g, order="C"), rows, approximate))


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
    rows = np.asarray(x, order="C")
    return kernels.relu2_forward(rows), lambda g: kernels.relu2_backward(np.asarray(g, order="C"), rows)


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
    """Normalise the last axis to mean 0 and variance 1, scale and shift: x (..., C), weight and bias (C,)."""
    _check_layernorm(x, weight, bias)
    rows = _rows(x)
    weight, bias = np.ascontiguousarray(weight), None if bias is None else np.ascontiguousarray(bias)
    y, mean, rstd = kernels.layernorm_forward(rows, weight, bias, eps)

    def vjp(g):
        dx, dweight, dbias = kernels.layernorm_backward(_rows(g), rows, weight, mean, rstd)
        return dx.reshape(x.shape), dweight, dbias
    return y.reshape(x.shape), vjp


# ---- softmax -----------------------------------------------------------------------------------------------

def _softmax_reference(x):
    e = np.exp(x - np.max(x.numpy(), axis=-1, keepdims=True))    # the shift cancels, so it can be a constant
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
    """exp(x) / Σ exp(x) along one axis, without overflow."""
    return _along(_softmax, x, axis)


def log_softmax(x, axis=-1):
    """The logarithm of softmax along one axis, without overflow or underflow."""
    return _along(_log_softmax, x, axis)


def _along(function, x, axis):
    _check_axes(function.__name__[1:], x)
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
    y, scales = kernels.rotary_forward(np.ascontiguousarray(qkv), heads, base, eps, start)
    return y, lambda g: kernels.rotary_backward(np.ascontiguousarray(g), y, scales, heads, base, start)


def rotary(qkv, heads, *, base=10_000.0, eps=None, start=0):
    """Rotate each pair of numbers of queries and keys by an angle that grows with the token's position, so
    that attention sees distances: packed qkv (B, T, 3C), as `attention` takes it -> (B, T, 3C).

    Number j of a head of width D, which is even, is paired with number j + D/2; the angle is t base^(-2j/D).
    eps: if given, queries and keys are normalised first, as `qk_norm` does. start: the first token's t.
    Source: Su et al. 2021.
    """
    _check_qkv("rotary", qkv, heads)
    if qkv.shape[2] // (3 * heads) % 2 or not 0 < base < math.inf or start < 0:
        raise ValueError(f"rotary: qkv is {qkv.shape}, {heads} heads, base {base}, start {start}; C / heads "
                         "must be even, base above 0, start at least 0")
    return _rotary(qkv, heads, base=base, eps=eps, start=start)


def qk_norm(qkv, heads, *, eps=1e-6):
    """Divide each head's query and key by √(mean(x²) + eps), so that their products stay small:
    packed qkv (B, T, 3C), as `attention` takes it -> (B, T, 3C). Source: Henry et al. 2020.
    """
    _check_qkv("qk_norm", qkv, heads)
    return _rotary(qkv, heads, base=None, eps=eps, start=0)


def _check_qkv(op_name: str, qkv: Any, heads: int) -> None:
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"{op_name}: qkv is {qkv.shape}; "
                         f"it must be (B, T, 3C) with {heads} heads dividing C")


# ---- attention ---------------------------------------------------------------------------------------------

def _attention_reference(qkv, heads, *, causal, p, seed):
    batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (np.swapaxes(np.reshape(x, (batch, time, heads, width // heads)), 1, 2)
               for x in np.split(qkv, 3, axis=2))                                  # (B, H, T, D)
    scores = np.matmul(q, np.swapaxes(k, 2, 3)) * (1 / math.sqrt(width // heads))  # (B, H, T, T)
    if causal:
        scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    weights = _softmax_reference(scores)
    if p:
        kept = kernels.dropout_mask(batch * heads * time, time, p, seed).reshape(weights.shape)
        weights = np.where(kept, weights * (1 / (1 - p)), 0.0)
    return np.reshape(np.swapaxes(np.matmul(weights, v), 1, 2), (batch, time, width))


@fused(reference=_attention_reference)
def _attention(qkv, heads, *, causal, p, seed):
    qkv = np.ascontiguousarray(qkv)
    out, norms = kernels.attention_forward(qkv, heads, causal, p, seed)
    return out, lambda g: kernels.attention_backward(
        np.ascontiguousarray(g), qkv, out, norms, heads, causal, p, seed)


def attention(qkv, heads, *, causal=True, p=0.0, seed=None):
    """softmax(q kᵀ / √D) v for each head, on packed queries, keys and values: qkv (B, T, 3C) -> (B, T, C).

    heads divides C, and head h has columns h D to (h + 1) D of each third. causal: a token sees itself and
    earlier ones. p: dropout of the attention weights; seed: of its mask, by default `minitensor.seed`'s next.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"attention: qkv is {qkv.shape}; "
                         f"it must be (B, T, 3C) with {heads} heads dividing C")
    return _attention(qkv, heads, causal=causal, p=p, seed=next_seed() if seed is None and p else seed or 0)


# ---- dropout -----------------------------------------------------------------------------------------------

def _dropout_reference(x, *, p, seed):
    return np.where(kernels.flat_mask(x.shape, p, seed), x * (1 / (1 - p)), 0.0)


@fused(reference=_dropout_reference)
def _dropout(x, *, p, seed):
    return (kernels.dropout(np.asarray(x, order="C"), p, seed),
            lambda g: kernels.dropout(np.asarray(g, order="C"), p, seed))


def dropout(x, p, seed=None):
    """Each element is 0 with probability p, else divided by 1 - p; the mask is a hash of (seed, position).

    seed: the next of `minitensor.seed`'s if left out. ValueError unless 0 <= p < 1.
    """
    if p == 0:
        return x
    kernels.keep_below(p)                                            # raises for a p out of range
    return _dropout(x, p=p, seed=next_seed() if seed is None else seed)


# ---- embedding ---------------------------------------------------------------------------------------------

def _embedding_reference(ids, weight):
    ids = _integers("embedding", "ids", ids)
    check_range("embedding", "ids", ids, len(weight))                # as the kernel does
    return weight[ids]


@fused(reference=_embedding_reference)
def embedding(ids, weight):
    """Rows of a table: ids (...) integers, weight (V, C) -> (..., C); IndexError unless 0 <= id < V."""
    ids = _integers("embedding", "ids", ids)
    flat = ids.reshape(-1)
    y = kernels.embedding_forward(flat, np.ascontiguousarray(weight))
    return (y.reshape(*ids.shape, weight.shape[1]),
            (lambda g: None, lambda g: kernels.embedding_backward(_rows(g), flat, len(weight))))


def _integers(op_name: str, name: str, ids: Any) -> np.ndarray:
    ids = np.asarray(ids, order="C")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{op_name}: {name} is an array of {ids.dtype}; it must hold integers")
    return ids if ids.dtype in (np.int32, np.int64) else ids.astype(np.int64)


# ---- cross-entropy -----------------------------------------------------------------------------------------

def _cross_entropy_reference(logits, targets, *, ignore_index=-100, reduction="mean"):
    targets = _checked_targets(logits, targets, reduction)
    counted = targets != ignore_index
    check_range("cross_entropy", "targets", targets[counted], logits.shape[-1])     # as the kernel does
    safe = np.where(counted, targets, 0)
    picked = _log_softmax_reference(logits)[(*np.indices(targets.shape, sparse=True), safe)]
    losses = np.where(counted, -picked, 0.0)
    if reduction == "none":
        return losses
    return np.sum(losses) * (1.0 if reduction == "sum" else _inverse(counted.sum()))


@fused(reference=_cross_entropy_reference)
def cross_entropy(logits, targets, *, ignore_index=-100, reduction="mean"):
    """-log softmax(logits)[target], in nats: logits (..., V), targets (...) integers -> a scalar, or (...).

    Targets equal to ignore_index do not count. reduction: "mean" over those that count, "sum" or "none".
    IndexError for any other target outside 0 to V - 1.
    """
    targets = _checked_targets(logits, targets, reduction)
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

