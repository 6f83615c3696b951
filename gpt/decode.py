"""The next token's logits, one token at a time: keys and values of earlier ones are kept, not made again.

A token's row of a layer depends on itself and on the keys and values of the tokens before it. So a step takes
the row of the new token alone through the layers, and attends to what is kept:

    s_j = q · k_j / √D for each kept j and itself,   o = Σ_j softmax(s)_j v_j

The model is that of gpt/model.py, and tests hold the two together; here products are numpy's, on plain
arrays, as a single row is done before an op and its kernel have been set up.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

import minitensor as mt
from gpt.model import GPT, Attention, Block
from minitensor import nn

ACTIVATIONS = {"gelu": mt.gelu, "relu2": mt.relu2}               # as the config calls them


class Decoder:
    """A model without dropout, and the tokens that it has seen: up to the context."""

    def __init__(self, model: GPT):
        config = model.config
        self.model = model
        shape = (config.layers, config.heads, config.context, config.width // config.heads)
        self.keys, self.values = (np.empty(shape, model.head.weight.dtype) for _ in range(2))  # (L, H, T, D)
        self.seen = 0
        self.weights: list[np.ndarray] = []          # of attention in the last call, (H, N, T) for each layer

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The logits (V,) for the token after ids (N,), which follow what was seen; N is at least 1."""
        first, self.seen = self.seen, self.seen + len(ids)
        model, self.weights = self.model, []
        x = model.tokens.weight.data[ids]                                                   # (N, C)
        if model.config.positions == "learned":
            x = x + model.positions.data[first:self.seen]
        for block, keys, values in zip(model.blocks, self.keys, self.values, strict=True):
            x = self._block(x, block, keys, values, first)
        return linear(normalised(x[-1:], model.norm), model.head)[0]

    def _block(self, x: np.ndarray, block: Block, keys: np.ndarray, values: np.ndarray,
               first: int) -> np.ndarray:
        x = x + self._attention(normalised(x, block.norm1), block.attention, keys, values, first)
        hidden = linear(normalised(x, block.norm2), block.mlp.up)
        activated = ACTIVATIONS[block.mlp.activation](hidden)
        return x + linear(activated, block.mlp.down)

    def _attention(self, x: np.ndarray, attention: Attention, keys: np.ndarray, values: np.ndarray,
                   first: int) -> np.ndarray:
        """Attention of the rows x (N, C), whose keys and values join those (H, T, D) of the tokens before."""
        heads, _, depth = keys.shape
        qkv = attention.placed(linear(x, attention.qkv)[None], start=first)
        q, k, v = qkv.reshape(len(x), 3, heads, depth).transpose(1, 2, 0, 3)                       # (H, N, D)
        end = first + len(x)
        keys[:, first:end], values[:, first:end] = k, v
        scores = np.matmul(q * q.dtype.type(1 / math.sqrt(depth)), keys[:, :end].swapaxes(1, 2))   # (H, N, T)
        if len(x) > 1:
            scores[:, np.tri(len(x), end, first, dtype=bool) == 0] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        self.weights.append(weights)
        y = np.matmul(weights, values[:, :end])                                                    # (H, N, D)
        return linear(y.swapaxes(0, 1).reshape(len(x), heads * depth), attention.projection)


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    """x weightᵀ + bias."""
    y = np.matmul(x, layer.weight.data.T)
    return y if layer.bias is None else np.add(y, layer.bias.data, out=y)


def normalised(x: np.ndarray, layer: nn.LayerNorm) -> np.ndarray:
    """Layernorm of each row."""
    x = x - np.add.reduce(x, axis=-1, keepdims=True) / x.dtype.type(x.shape[-1])
    variance: Any = np.einsum("nc,nc->n", x, x)[:, None] / x.dtype.type(x.shape[-1])
    x *= 1 / np.sqrt(variance + x.dtype.type(layer.eps))
    x *= layer.weight.data
    return x if layer.bias is None else np.add(x, layer.bias.data, out=x)
