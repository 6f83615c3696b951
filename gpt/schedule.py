"""The learning rate, and when to stop: by steps, by the clock (--minutes), or for want of progress."""
from __future__ import annotations

import math

from gpt.config import Config
from gpt.errors import Diverged
from gpt.run import Evaluation, Progress
from minitensor.optim import trapezoid, warmup_cosine

FORWARD = 3                                 # a step is about so many forward passes: backward is two of them


class Schedule:
    """Warm-up and cosine, or a trapezoid, over config.steps steps, or stretched over config.minutes in their
    place.

    Under --minutes the place in the schedule is the share of the time that has gone, between the first step
    (which may compile kernels) and what the last evaluation will take; --warmup and --hold stay the same
    shares of all.
    """

    def __init__(self, config: Config, progress: Progress, evaluated: int):
        self.config, self.progress = config, progress
        self.passes = evaluated / (FORWARD * config.batch * config.context)     # an evaluation, in steps

    def lr(self) -> float:
        """The learning rate of the next step."""
        config = self.config
        curve = self._position(), config.steps, config.warmup, config.lr, config.min_lr
        return trapezoid(*curve, config.hold * config.steps) if config.hold else warmup_cosine(*curve)

    def over(self) -> bool:
        """Is training done?"""
        return self.progress.done or self._position() >= self.config.steps or self._out_of_patience()

    def evaluation_due(self) -> bool:
        """Is there a step since the last evaluation, and either the turn of the next or the end?"""
        progress = self.progress
        return progress.lap_steps > 0 and (progress.step % self.config.eval_every == 0 or self.over())

    def after_evaluation(self, train_loss: float, val_loss: float, seconds: float) -> Evaluation:
        """Note what an evaluation found, and if it was the last; Diverged if it is not a finite number."""
        for name, loss in (("training", train_loss), ("validation", val_loss)):
            if not math.isfinite(loss):
                raise Diverged(f"the {name} loss after step {self.progress.step} is {loss}")
        last = self.over()                                       # it was due for that
        found = self.progress.after_evaluation(train_loss, val_loss, seconds,
                                               self.config.batch * self.config.context)
        self.progress.done = last or self.over()                 # out of patience, or of time
        return found

    def remaining(self) -> float:
        """An estimate of the seconds still to go, nan as long as there is nothing to go by."""
        progress = self.progress
        if self.over():
            return 0.0
        if self.config.minutes:
            return max(0.0, 60 * self.config.minutes - progress.seconds)
        if not self._step_seconds():
            return math.nan
        evaluations = self.config.steps // self.config.eval_every - len(progress.evaluations)
        return (self.config.steps - progress.step) * self._step_seconds() \
            + max(1, evaluations) * self._evaluation_seconds()

    def _position(self) -> float:
        progress = self.progress
        if not self.config.minutes or not progress.step:
            return progress.step
        kept = min(self._evaluation_seconds(), 30 * self.config.minutes)     # half, if a step was slow once
        whole = 60 * self.config.minutes - kept - progress.first_seconds
        gone = progress.seconds - progress.first_seconds
        return self.config.steps * (min(1.0, gone / whole) if whole > 0 else 1.0)

    def _out_of_patience(self) -> bool:
        if not self.config.patience or (best := self.progress.best()) is None:
            return False
        evaluations = self.progress.evaluations
        return len(evaluations) - 1 - evaluations.index(best) >= self.config.patience

    def _step_seconds(self) -> float:
        """The mean of the steps since the last evaluation, but for the run's first; 0 if there is none."""
        progress = self.progress
        first = 0 if progress.evaluations else 1
        if progress.lap_steps > first:
            return (progress.lap_seconds - first * progress.first_seconds) / (progress.lap_steps - first)
        if progress.evaluations and progress.evaluations[-1].tokens_per_s:
            return self.config.batch * self.config.context / progress.evaluations[-1].tokens_per_s
        return 0.0

    def _evaluation_seconds(self) -> float:
        return self.progress.evaluation_seconds or self.passes * self._step_seconds()
