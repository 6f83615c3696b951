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
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.empty(config.context, config.width)) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = self.dropout(x if self.positions is None else x + self.positions[:ids.shape[1]])
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
        self.rotary, self.qk_norm = config.positions == "rotary", config.qk_norm
        self.qkv = nn.Linear(config.width, 3 * config.width, config.bias)
        self.projection = nn.Linear(config.width, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        split = (B, T, self.heads, C // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        if self.qk_norm:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-6) for t in (q, k))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.dropout(self.projection(y.transpose(1, 2).reshape(B, T, C)))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x (B, H, T, D), in pairs of numbers that are D/2 apart."""
    T, D = x.shape[2:]
    angles = torch.arange(T, dtype=torch.float64)[:, None] * 10_000.0 ** (torch.arange(0, D, 2) / -D).double()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.relu2 = config.mlp == "relu2"
        self.up = nn.Linear(config.width, 4 * config.width, config.bias)
        self.down = nn.Linear(4 * config.width, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.dropout(self.down(F.relu(x)**2 if self.relu2 else F.gelu(x)))


class Muon(torch.optim.Optimizer):
    """Muon as Jordan et al. write it, without their bfloat16: torch.optim's rounds. parts: as in ours."""

    def __init__(self, parameters: list, parts: list[int], lr: float, momentum: float, weight_decay: float):
        super().__init__(parameters, dict(lr=lr))
        self.parts, self.momentum, self.weight_decay = parts, momentum, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        group, = self.param_groups
        for p, count in zip(group["params"], self.parts, strict=True):
            b = self.state[p].setdefault("momentum", torch.zeros_like(p))
            b.lerp_(p.grad, 1 - self.momentum)
            p.mul_(1 - group["lr"] * self.weight_decay)
            for part, u in zip(p.chunk(count), p.grad.lerp(b, self.momentum).chunk(count), strict=True):
                part.sub_(newton_schulz(u), alpha=group["lr"] * max(1, u.shape[0] / u.shape[1])**0.5)


def newton_schulz(u: torch.Tensor) -> torch.Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u / (u.norm() + 1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def optimizers(module: nn.Module, config: Config, eps: float) -> list[torch.optim.Optimizer]:
    """What `gpt.optimizer` makes, in PyTorch: AdamW, and Muon for the blocks' matrices if it is asked for."""
    named = dict(module.named_parameters())
    inside = {name: p for name, p in named.items()
              if config.optimizer == "muon" and name.startswith("blocks.") and p.dim() == 2}
    rest = [p for name, p in named.items() if name not in inside]
    adamw = torch.optim.AdamW([
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ], lr=config.lr, betas=(config.beta1, config.beta2), eps=eps)
    if not inside:
        return [adamw]
    parts = [3 if name.endswith("qkv.weight") else 1 for name in inside]
    return [adamw, Muon(list(inside.values()), parts, config.muon_lr, config.momentum, config.decay)]
