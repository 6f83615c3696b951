"""Training: the loop, and the exact validation loss."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import minitensor as mt
from gpt.config import Config
from gpt.data import batch, windows
from gpt.errors import Diverged
from gpt.model import GPT, evaluating
from gpt.optimizer import make_optimizer
from minitensor.optim import warmup_cosine


class Evaluation(NamedTuple):
    """One line of metrics.jsonl; losses are in nats a token."""
    step: int                # steps done
    train_loss: float        # mean of the batches since the last evaluation
    val_loss: float          # over the whole validation split
    seconds: float           # since the start
    tokens_per_s: float      # of training since the last evaluation


def train(model: GPT, config: Config, train_ids: np.ndarray, val_ids: np.ndarray,
          after_step: Callable[[int, float], None], after_evaluation: Callable[[Evaluation], None]) -> None:
    """Train model on train_ids (N,); a batch depends on the seed and the step alone.

    after_step gets the number of steps done and the batch's loss; after_evaluation what was found on val_ids.
    Raises Diverged at the first loss that is not a finite number.
    """
    optimizer = make_optimizer(model, config)
    start = lap = time.perf_counter()
    losses: list[float] = []
    model.train()
    for step in range(config.steps):
        x, y = batch(train_ids, config.batch, config.context, config.seed, step)
        loss = mt.cross_entropy(model(x), y)
        loss.backward()
        optimizer.lr = warmup_cosine(step, config.steps, config.warmup, config.lr, config.min_lr)
        norm = optimizer.step()                                  # clips on the way
        optimizer.zero_grad()

        losses.append(loss.item())
        if norm is None or not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise Diverged(f"the loss of step {step + 1} is {losses[-1]}, the norm of its gradients {norm}; "
                           "a lower --lr or a longer --warmup may help")
        after_step(step + 1, losses[-1])
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            speed = len(losses) * x.size / (time.perf_counter() - lap)
            val_loss = evaluate(model, val_ids)
            after_evaluation(Evaluation(step + 1, float(np.mean(losses)), val_loss,
                                        time.perf_counter() - start, speed))
            losses, lap = [], time.perf_counter()


def evaluate(model: GPT, ids: np.ndarray) -> float:
    """The mean loss over ids (N,), in nats: every token but the first is predicted once, in fixed windows."""
    total = 0.0
    with evaluating(model):
        for x, y in windows(ids, model.config.context, batch=max(1, 4096 // model.config.context)):
            total += mt.cross_entropy(model(x), y, reduction="none").numpy().sum(dtype=np.float64)
    return total / (len(ids) - 1)
