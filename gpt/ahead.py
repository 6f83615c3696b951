"""A second process for kernels that are not compiled yet.

A first step compiles its kernels in the order in which it needs them, on one core. Meanwhile a process of its
own compiles the same ones, those of attention and then from the last to the first, and the two meet in the
middle: each finds on disk what the other has made, and waits for what it is just making (see `kernels.jit`).
"""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np

import kernels
import minitensor as mt
from gpt.config import Config
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.train import evaluate

LONGEST = "_attention_backward", "_attention_forward"      # but for products, which the first process is at


def start(config: Config, vocabulary: int, precision: str) -> subprocess.Popen | None:
    """The process, for one who goes on to train; None where it would be of no use."""
    if not kernels.jit.shares_work():
        return None
    asked = json.dumps([dataclasses.asdict(config), vocabulary, precision])
    paths, null = os.pathsep.join(filter(None, sys.path)), subprocess.DEVNULL
    try:
        return subprocess.Popen([sys.executable, "-P", "-m", "gpt.ahead", asked], start_new_session=True,
                                stdin=null, stdout=null, stderr=null, env={**os.environ, "PYTHONPATH": paths})
    except OSError:                                                # no more processes: it takes longer
        return None


def compile_step(config: Config, vocabulary: int, precision: str) -> None:
    """Compile what an evaluation and a training step of a run with this config need."""
    kernels.set_matmul_precision(precision)
    one_layer = dataclasses.replace(config, layers=1)
    kernels.jit.compile_backwards(lambda: _step(one_layer, vocabulary), LONGEST)


def _step(config: Config, vocabulary: int) -> None:
    model = GPT(config, vocabulary)
    optimizer = make_optimizer(model, config)
    ids = np.zeros((1, config.context), np.int32)                  # kernels are the same for any batch, but
    kernels.add(np.zeros(1, np.float32), np.zeros(1, np.float32))  # small arrays are added up by none
    if config.positions == "learned":
        kernels.column_sum(np.zeros((1, 1), np.float32))
    evaluate(model, np.zeros(config.context + 2, np.int32))        # a whole window, and one that is cut short
    mt.cross_entropy(model(ids), ids).backward()
    optimizer.step()
    optimizer.max_norm = None                                      # no kernel ran: the norm may be anything,
    optimizer.step()                                               # and the step was not taken


if __name__ == "__main__":
    config, vocabulary, precision = json.loads(sys.argv[1])
    compile_step(Config(**config), vocabulary, precision)
