"""The optimizer that a config asks for."""
from __future__ import annotations

from gpt.config import Config
from gpt.model import GPT
from minitensor.optim import AdamW, Muon, Together


def make_optimizer(model: GPT, config: Config) -> AdamW | Together:
    """AdamW, or Muon for the matrices of the blocks, q, k and v apart, beside AdamW for the rest."""
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return AdamW(model.parameters(), config.lr, betas, weight_decay=config.decay, max_norm=config.clip)
    inside = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    muon = Muon(inside.values(), config.muon_lr, config.momentum, config.decay,
                parts=[3 if name.endswith("qkv.weight") else 1 for name in inside])
    rest = [p for name, p in model.named_parameters() if name not in inside]
    return Together([AdamW(rest, config.lr, betas, weight_decay=config.decay), muon], max_norm=config.clip)
