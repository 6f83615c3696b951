"""The GPT: GPT-2's block as nanoGPT has it. Read from the top down in the order in which data flows.
Sources: Radford et al. 2019; Karpathy, nanoGPT.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

import minitensor as mt
from gpt.config import Config
from minitensor import nn
from minitensor.random import generator


class GPT(nn.Module):
    """Logits for each next token: ids (B, T), T up to the context -> (B, T, V), V the vocabulary's size."""

    def __init__(self, config: Config, vocabulary: int):
        self.config = config
        self.tokens = nn.Embedding(vocabulary, config.width)
        if config.positions == "learned":
            positions = np.empty((config.context, config.width), np.float32)
            self.positions = mt.Tensor(positions, requires_grad=True)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = [Block(config) for _ in range(config.layers)]
        self.norm = nn.LayerNorm(config.width, config.bias)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight                               # tied
        self._initialise()

    def forward(self, ids: np.ndarray) -> Any:
        T = ids.shape[-1]
        if T > self.config.context:
            raise ValueError(f"GPT: ids are {ids.shape}; "
                             f"the context holds {self.config.context} tokens at the most")
        x = self.tokens(ids)                                                # (B, T, C)
        if self.config.positions == "learned":
            x = x + (self.positions if T == self.config.context else self.positions[:T])
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))                                      # (B, T, V)

    def _initialise(self) -> None:
        """Embeddings of tokens from N(0, token_std), other matrices from N(0, 0.02), those into the residual
        stream smaller by √(2 layers); biases 0.
        """
        into_stream = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deviation = (self.config.token_std if parameter is self.tokens.weight else
                             into_stream if name.endswith(("projection.weight", "down.weight")) else 0.02)
                parameter.data[...] = deviation * generator().standard_normal(parameter.shape, np.float32)
            elif name.endswith("bias"):
                parameter.data[...] = 0


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Dropout off and nothing recorded; afterwards the model is in the mode in which it was."""
    training = model.training
    model.eval()
    try:
        with mt.no_grad():
            yield
    finally:
        model.train(training)


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, config: Config):
        self.norm1 = nn.LayerNorm(config.width, config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, config: Config):
        self.heads, self.p = config.heads, config.dropout
        self.rotary, self.eps = config.positions == "rotary", 1e-6 if config.qk_norm else None
        self.qkv = nn.Linear(config.width, 3 * config.width, config.bias)
        self.projection = nn.Linear(config.width, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        qkv = self.placed(self.qkv(x))                                      # (B, T, 3C)
        y = mt.attention(qkv, self.heads, p=self.p if self.training else 0.0)   # (B, T, C)
        return self.dropout(self.projection(y))

    def placed(self, qkv, start=0):
        """Queries and keys normalised, and rotated to positions from start on, as the config has it."""
        if self.rotary:
            return mt.rotary(qkv, self.heads, eps=self.eps, start=start)
        return qkv if self.eps is None else mt.qk_norm(qkv, self.heads, eps=self.eps)


class MLP(nn.Module):
    """Each token on its own: four times as wide, GELU or ReLU², and back."""

    def __init__(self, config: Config):
        self.up = nn.Linear(config.width, 4 * config.width, config.bias)
        self.down = nn.Linear(4 * config.width, config.width, config.bias)
        self.activation = config.mlp
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.down(self.up(x, activation=self.activation)))
