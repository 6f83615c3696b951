"""What a run is: one frozen record, from whose fields the command line is made, and the recipes by name."""
from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from gpt.errors import BadInput


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The model, its training and its seed; BadInput names the first field that cannot be."""
    layers: int = _option(4, "blocks of attention and MLP")
    heads: int = _option(4, "attention heads; they divide the width")
    width: int = _option(128, "width of the residual stream, C")
    context: int = _option(64, "tokens that the model sees at once, T")
    dropout: float = _option(0.0, "probability of dropping an activation, in [0, 1)")
    bias: bool = _option(False, "biases in linear layers and layernorms")
    positions: str = _option("learned", "how a token's place is known: added vectors, or rotated pairs",
                             ("learned", "rotary"))
    qk_norm: bool = _option(False, "queries and keys of length √D")
    mlp: str = _option("gelu", "activation of the MLP", ("gelu", "relu2"))
    token_std: float = _option(0.02, "standard deviation of the embeddings of tokens in a new model")
    batch: int = _option(12, "windows in a step, B")
    steps: int = _option(2000, "steps of training")
    optimizer: str = _option("adamw", "of the blocks' matrices; AdamW for the rest", ("adamw", "muon"))
    lr: float = _option(1e-3, "learning rate after the warm-up, AdamW's")
    muon_lr: float = _option(1e-2, "learning rate after the warm-up, Muon's; falls as AdamW's does")
    min_lr: float = _option(1e-4, "learning rate at the end")
    warmup: int = _option(100, "steps over which the learning rate rises")
    hold: float = _option(0.0, "share of the steps after which the rate falls, linearly; 0: as a cosine")
    beta1: float = _option(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = _option(0.99, "AdamW: decay of the mean of their squares")
    decay: float = _option(0.1, "weight decay of matrices")
    momentum: float = _option(0.95, "Muon: decay of the mean of gradients")
    clip: float = _option(1.0, "norm to which gradients are clipped")
    eval_every: int = _option(500, "steps between two evaluations on the whole validation split")
    minutes: float = _option(0.0, "time to train for, over which the schedule is stretched; 0: by steps")
    patience: int = _option(0, "evaluations without a new best after which to stop; 0: never")
    micro_batch: int = _option(0, "windows in a pass; gradients of a batch add up; 0: all at once")
    seed: int = _option(0, "of weights, batches and dropout")

    def __post_init__(self) -> None:
        self._require("layers", 1 <= self.layers <= 2**12, "at least 1, and at most 2**12")
        for name in ("heads", "width", "context", "batch"):
            self._require(name, 1 <= getattr(self, name) <= 2**24, "at least 1, and at most 2**24")
        for name in ("steps", "eval_every"):
            self._require(name, 1 <= getattr(self, name) < 2**53, "at least 1, and below 2**53")
        for name in ("token_std", "lr", "muon_lr", "clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("min_lr", "decay"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or a positive number")
        for name in ("dropout", "beta1", "beta2", "momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("hold", 0 <= self.hold <= 1, "in [0, 1]")
        self._require("minutes", 0 <= self.minutes <= 2**24, "0 or a positive number, at most 2**24")
        for name in ("patience", "micro_batch"):
            self._require(name, 0 <= getattr(self, name) < 2**53, "at least 0, and below 2**53")
        self._require("warmup", 0 <= self.warmup < 2**53, "at least 0, and below 2**53")
        self._require("seed", 0 <= self.seed < 2**63, "in 0 to 2**63 - 1")
        self._require("heads", self.width % self.heads == 0, f"a divisor of the width, {self.width}")
        self._require("heads", self.positions != "rotary" or self.width // self.heads % 2 == 0,
                      f"such that width / heads, {self.width / self.heads:g}, is even, for rotary positions")
        for f in fields(self):
            if choices := f.metadata["choices"]:
                self._require(f.name, getattr(self, f.name) in choices, f"one of {', '.join(choices)}")

    def _require(self, name: str, condition: bool, wanted: str) -> None:
        if not condition:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")


DEFAULT = "quick"
_IDEAS: dict[str, Any] = {"positions": "rotary", "qk_norm": True, "mlp": "relu2", "optimizer": "muon",
                          "min_lr": 0.0}
RECIPES = {
    "quick": Config(                                            # the best validation loss that a minute buys
        context=128, steps=850, lr=1e-2, muon_lr=1.5e-2, momentum=0.9, beta2=0.95, warmup=15, hold=0.35,
        eval_every=425, **_IDEAS),
    "classic": Config(),                                        # nanoGPT's recipe for a CPU
    "modern": Config(                                           # four ideas at classic's size
        token_std=0.15, batch=24, steps=114, lr=1e-2, muon_lr=2.5e-2, momentum=0.75, beta2=0.95, warmup=0,
        hold=0.5, decay=0.0, clip=0.5, eval_every=114, **_IDEAS),
    "lecture": Config(                                          # the scaled-up GPT
        layers=6, heads=6, width=384, context=256, dropout=0.2, batch=64, steps=5000, lr=3e-4,
        min_lr=3e-4, warmup=0, beta2=0.999, decay=0.01, eval_every=500),
    "lecture-modern": Config(                                   # the same with the four ideas
        layers=6, heads=6, width=384, context=256, dropout=0.2, batch=16, steps=1750, lr=3e-3, muon_lr=2e-2,
        momentum=0.9, warmup=100, eval_every=250, **_IDEAS),
}
