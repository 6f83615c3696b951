"""Training runs at flat memory, with the garbage collector off, and adds nothing to the recycled buffers.

MINITENSOR_STEPS=10000 makes it a long run, of the default size of model.
"""
import gc
import os
from pathlib import Path

import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.data import batch
from gpt.model import GPT
from kernels import memory
from minitensor.optim import AdamW

STEPS = int(os.environ.get("MINITENSOR_STEPS", "250"))
SIZE = {} if "MINITENSOR_STEPS" in os.environ else {"layers": 2, "width": 64}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size is read from /proc (Linux)")
def test_memory_is_flat_after_the_first_hundred_steps():
    config = Config(**SIZE)
    mt.seed(0)
    model = GPT(config, 65)
    optimizer = AdamW(model.parameters(), config.lr, max_norm=config.clip)
    ids = np.random.default_rng(0).integers(65, size=10_000, dtype=np.int32)
    allocated = []
    gc.collect()
    gc.disable()
    try:
        for step in range(STEPS):
            x, y = batch(ids, config.batch, config.context, 0, step)
            loss = mt.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            if step == 100:
                resident, free = resident_bytes(), memory.free_bytes()
            if step > 100:
                allocated.append(memory.free_bytes())
    finally:
        gc.enable()
    assert set(allocated) == {free}, "every buffer comes back after every step, and none is added"
    assert resident_bytes() - resident <= 2**22, "two huge pages that were begun may be filled"
