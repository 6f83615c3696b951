"""What went wrong, when a loss or a gradient is not a finite number: found by doing the step once more."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

import minitensor as mt
from gpt.errors import Diverged
from gpt.model import GPT
from gpt.run import Run
from minitensor.random import set_state


def explain(run: Run, x: np.ndarray, y: np.ndarray,
            loss_and_gradients: Callable[[GPT, np.ndarray, np.ndarray, int], float], loss: float) -> Diverged:
    """The error that says the step, the first bad parameter and, from the step done again, the first bad op.

    x, y: the bad step's batch. The gradients are still its own, and the weights those before it.
    """
    step = run.progress.step + 1
    found = f"the loss of step {step} is {loss}" if not np.isfinite(loss) else \
        f"a gradient of step {step} is not a finite number"
    bad = _first_bad(run)
    run.model.zero_grad()
    set_state(run.progress.random)                               # the same dropout masks
    op = "all ops are finite when it is done again"
    try:
        with np.errstate(all="ignore"), mt.detect_nan():
            loss_and_gradients(run.model, x, y, run.config.micro_batch)
    except FloatingPointError as error:
        op = str(error)
    return Diverged(f"{found}; {bad}; {op}; a lower --lr or a longer --warmup may help")


def _first_bad(run: Run) -> str:
    for name, p in run.model.named_parameters():
        if not np.isfinite(p.data).all():
            return f"the weights {name!r} are not finite"
        if p.grad is not None and not np.isfinite(p.grad.data).all():
            return f"the first bad gradient is that of {name!r}"
    return "all parameters and their gradients are finite, one by one"
