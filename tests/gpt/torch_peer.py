"""The GPT of gpt/model.py in PyTorch, with the same parameter names: ours is tested and timed against it."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from gpt.config import Config

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
F, nn = torch.nn.functional, torch.nn


def build(config: Config, vocabulary: int) -> nn.Module:
    """The model with weights of its own: ids (B, T) -> logits (B, T, V)."""
    return Peer(config, vocabulary)


def load(module: nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Copy the weights of ours, by name; every parameter must be there."""
    own = dict(module.named_parameters())
    assert own.keys() == state.keys(), own.keys() ^ state.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(state[name]))


class Peer(nn.Module):
    def __init__(self, config: Config, vocabulary: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(ids) + self.positions[:ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.p = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, config.bias)
        self.projection = nn.Linear(config.width, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        split = (B, T, self.heads, C // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.dropout(self.projection(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, config.bias)
        self.down = nn.Linear(4 * config.width, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))
