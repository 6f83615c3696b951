"""The second process compiles just what a run needs, and ends with it."""
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kernels
from gpt import ahead, command
from gpt.config import RECIPES
from gpt.verse import verse

ROOT = Path(kernels.__file__).parents[1]
CONFIG = dataclasses.replace(RECIPES["modern"], layers=2, heads=2, width=16, context=16, batch=2, dropout=0.1)
PRECISION = "bf16" if kernels.cpu.TARGET.bf16 else "highest"

TRAIN = """
import sys, json
import numpy as np
import kernels
from gpt.config import Config
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.train import evaluate, loss_and_gradients
config, vocabulary, precision = json.loads(sys.argv[1])
kernels.set_matmul_precision(precision)
config, compiled = Config(**config), []
kernels.jit.compiling = compiled.append
ids = np.arange(100, dtype=np.uint8) % vocabulary
model = GPT(config, vocabulary)
optimizer = make_optimizer(model, config)
evaluate(model, ids)
x = np.tile(np.array(ids[:16], np.int32), (256, 1))       # so many that sums of activations take a kernel
loss_and_gradients(model, x, x, 0)
optimizer.step()
print(json.dumps(compiled))
"""


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_leaves_nothing_of_a_step_to_compile(positions, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    config = dataclasses.replace(CONFIG, positions=positions, qk_norm=positions == "rotary")
    asked = json.dumps([dataclasses.asdict(config), 65, PRECISION])
    subprocess.run([sys.executable, "-m", "gpt.ahead", asked], cwd=ROOT, check=True)
    made = {path.name for path in tmp_path.rglob("*.nbi")}
    run = subprocess.run([sys.executable, "-c", TRAIN, asked], cwd=ROOT, check=True, capture_output=True,
                         text=True)
    assert json.loads(run.stdout) == []
    assert {path.name for path in tmp_path.rglob("*.nbi")} == made       # and nothing but what a step needs
    loaded = subprocess.run([sys.executable, "-c", TRAIN + LOADED, asked], cwd=ROOT, check=True,
                            capture_output=True, text=True)
    assert json.loads(loaded.stdout.splitlines()[-1]) == len(made)


LOADED = """
from numba.core.registry import CPUDispatcher
import gc
print(sum(len(x.stats.cache_hits) for x in gc.get_objects() if isinstance(x, CPUDispatcher)
          and isinstance(x._cache, kernels.jit._Cache)))
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_compiles_has_a_second_process_which_ends_with_it(stopped, tmp_path, monkeypatch):
    started = []

    def start(config, vocabulary, precision):
        assert (config.width, precision) == (16, PRECISION) and vocabulary > 20
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[0]

    def train(*arguments):
        for name in ("_one", "_another"):
            kernels.jit.compiling(name)
        if stopped:
            raise KeyboardInterrupt
    monkeypatch.setattr(ahead, "start", start)
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr("gpt.results.Results.finish", lambda results: None)
    text = tmp_path / "verse.txt"
    text.write_text(verse(6000))
    code = command.main(["--data", str(text), "--out", str(tmp_path / "out"), "--quiet", "--layers", "1",
                         "--width", "16", "--context", "16"])
    assert code == (130 if stopped else 0)
    assert len(started) == 1 and started[0].poll() is not None


def test_start_needs_a_cache_and_a_core(monkeypatch):
    monkeypatch.setattr(kernels.jit, "cache_folder", lambda: None)
    assert ahead.start(CONFIG, 65, "highest") is None
    monkeypatch.undo()
    monkeypatch.setattr(kernels.jit, "max_threads", lambda: 1)
    assert ahead.start(CONFIG, 65, "highest") is None


def test_a_machine_without_room_for_a_process_goes_on(monkeypatch):
    def refuse(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert ahead.start(CONFIG, 65, "highest") is None


def test_start_runs_where_the_trainer_runs(tmp_path, monkeypatch):
    """Files in the folder where the user is are not taken for modules."""
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    process = ahead.start(CONFIG, 65, PRECISION)
    if process is None:
        pytest.skip("one core: there is no second process")
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.lock")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.rglob("*.lock"))
    finally:
        process.kill()
        process.wait()
