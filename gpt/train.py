"""Training: the loop, and the exact validation loss."""
from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

import minitensor as mt
from gpt.data import batch, windows
from gpt.divergence import explain
from gpt.model import GPT, evaluating
from gpt.replay import Replay
from gpt.run import Evaluation, Run
from gpt.schedule import Schedule

TRAIN_PART = 2**16                          # tokens of the training split that its loss is measured on


def train(run: Run, train_ids: np.ndarray, val_ids: np.ndarray, after_step: Callable[[float, float], None],
          after_evaluation: Callable[[Evaluation, float], None], stop_after: float = math.inf,
          after_window: Callable[[], None] = lambda: None) -> None:
    """Train on train_ids (N,) from where the run is to its end, or until stop_after steps are done.

    A batch depends on the seed and the step alone, and all else that a step needs is in the run: stopped
    anywhere and taken up again, it gives the same bits. after_step gets the batch's loss, after_evaluation
    what was found, and both an estimate of the seconds to go. Raises Diverged, with the weights as they were
    before the step, at the first loss or gradient that is not a finite number. after_window is called once
    in a while during an evaluation: an interruption raised there loses nothing but the evaluation's time.
    """
    model, optimizer, config, progress = run.model, run.optimizer, run.config, run.progress
    train_part = train_ids[:TRAIN_PART]
    schedule = Schedule(config, progress, len(train_part) + len(val_ids))
    clock = Clock()

    def plain(x: np.ndarray, y: np.ndarray) -> float:
        return loss_and_gradients(model, x, y, config.micro_batch)

    step = plain if config.micro_batch else Replay(model, plain)
    model.train()
    while True:
        if schedule.evaluation_due():
            losses = evaluate(model, train_part, after_window), evaluate(model, val_ids, after_window)
            found = schedule.after_evaluation(*losses, clock.lap())
            after_evaluation(found, schedule.remaining())
            progress.seconds += clock.lap()
        progress.done = schedule.over()                          # --minutes may end between two steps
        if progress.done or progress.step >= stop_after:
            return
        x, y = batch(train_ids, config.batch, config.context, config.seed, progress.step)
        loss = step(x, y)
        optimizer.lr = schedule.lr()
        norm = optimizer.step() if math.isfinite(loss) else math.nan     # clips on the way
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise explain(run, x, y, loss_and_gradients, loss)
        optimizer.zero_grad()
        progress.after_step(loss, norm, optimizer.lr, clock.lap())
        after_step(loss, schedule.remaining())


def loss_and_gradients(model: GPT, x: np.ndarray, y: np.ndarray, micro_batch: int) -> float:
    """The mean loss of a batch, and its gradients added to the parameters', micro_batch windows at a time.

    In parts the numbers are those of one pass but for rounding; with dropout each part has masks of its own.
    """
    loss = 0.0
    size = micro_batch or len(x)
    for i in range(0, len(x), size):
        part = mt.cross_entropy(model(x[i:i + size]), y[i:i + size]) * (len(x[i:i + size]) / len(x))
        part.backward()
        loss += part.item()
    return loss


def evaluate(model: GPT, ids: np.ndarray, after_window: Callable[[], None] = lambda: None) -> float:
    """The mean loss over ids (N,), in nats: every token but the first is predicted once, in fixed windows."""
    total = 0.0
    with evaluating(model):
        for x, y in windows(ids, model.config.context, batch=max(1, 4096 // model.config.context)):
            total += mt.cross_entropy(model(x), y, reduction="none").numpy().sum(dtype=np.float64)
            after_window()
    return total / (len(ids) - 1)


class Clock:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last call, or since the start."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before
