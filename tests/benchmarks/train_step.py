"""A training step (forward, backward, clip, AdamW), timed, and the same step in PyTorch.

    python tests/benchmarks/train_step.py --config cpu lecture8 --versus torch

Prints a JSON line for each process. With --versus torch each side has a process of its own, and these make a
few steps each in turn, the others asleep, so that all meet alike whatever else the machine is doing. A last
line for each config gives the medians and the ratio: the median, over the turns, of the time of PyTorch's
fastest mode over ours. The peer is tests/gpt/torch_peer.py: the same model from the same config, with fused
AdamW. --torch-mode: eager in float32 (the default); compile, under torch.compile; medium, with products in
bfloat16 where the CPU has them; bf16, under autocast.
"""
import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).parents[2])          # `kernels` is the package, not the file beside this one
from gpt.config import Config  # noqa: E402

VOCABULARY = {"gpt2": 50304}            # 65 for the others
CONFIGS = {
    "cpu": Config(),                                                                      # nanoGPT's for CPUs
    "lecture8": Config(layers=6, heads=6, width=384, context=256, dropout=0.2, batch=8),  # the lecture's
    "long": Config(context=2048, batch=1),
    "gpt2": Config(layers=12, heads=12, width=768, context=64, batch=4),                  # llm.c's, 124M
}
STEPS = {"cpu": 200, "lecture8": 10, "long": 40, "gpt2": 10}
TURN = {"cpu": 10, "lecture8": 1, "long": 2, "gpt2": 1}      # steps: some tenths of a second
WARM_UP = 5                                                  # the fourth step is the first of Replay


def ours(config: Config, vocabulary: int, precision: str):
    """A function that makes one step on ids (B, T + 1) and returns its loss, and the number of parameters."""
    import kernels
    import minitensor as mt
    from gpt.model import GPT
    from gpt.replay import Replay
    from gpt.train import loss_and_gradients
    kernels.set_matmul_precision(precision)
    mt.seed(0)
    model = GPT(config, vocabulary)
    optimizer = mt.optim.AdamW(model.parameters(), config.lr, (config.beta1, config.beta2),
                               weight_decay=config.decay, max_norm=config.clip)

    gradients = Replay(model, lambda x, y: loss_and_gradients(model, x, y, 0))      # as the trainer does

    def step(ids: np.ndarray) -> float:
        loss = gradients(ids[:, :-1], ids[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step, sum(p.size for p in model.parameters())


def peer(config: Config, vocabulary: int, mode: str):
    """As `ours`, in PyTorch."""
    import torch

    from tests.gpt import torch_peer
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium" if mode == "medium" else "highest")
    model = torch_peer.build(config, vocabulary)
    parameters = list(model.parameters())
    run = torch.compile(model) if mode == "compile" else model
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)

    def step(ids: np.ndarray) -> float:
        ids = torch.from_numpy(ids.astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "bf16"):
            logits = run(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step, sum(p.numel() for p in parameters)


def run_side(name: str, side: str, mode: str) -> None:
    """Be one side: make as many steps as each line of stdin says, and answer with a line of their times; at
    the end of stdin, with what else is known."""
    config, vocabulary = CONFIGS[name], VOCABULARY.get(name, 65)
    step, parameters = (ours if side == "ours" else peer)(config, vocabulary, mode)
    shape = (8, config.batch, config.context + 1)
    batches = itertools.cycle(np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32))
    loss = 0.0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step(next(batches))
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps(times), flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(dict(params=parameters, peak_rss_mb=memory, loss=round(loss, 4))), flush=True)


class Process:
    """One side in a process of its own, which sleeps but for its turns."""

    def __init__(self, name: str, side: str, mode: str):
        self.mode = mode if side == "ours" else f"torch {mode}"
        command = [sys.executable, __file__, "--config", name, "--side", side,
                   "--precision" if side == "ours" else "--torch-mode", mode]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps(self, n: int) -> list[float]:
        """The times of n steps, in milliseconds."""
        print(n, file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def end(self) -> dict:
        self._process.stdin.close()
        known = json.loads(self._line())
        self._process.wait()
        return known

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.mode} ended with status {self._process.wait()}")
        return line


def measure(name: str, sides: list[tuple[str, str]], steps: int, repeats: int) -> dict:
    """Time all sides in turn, `repeats` times in new processes."""
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(repeats):
        processes = [Process(name, side, mode) for side, mode in sides]
        for process in processes:
            process.steps(WARM_UP)
        turns: dict[str, list[float]] = {process.mode: [] for process in processes}
        fastest_step = dict.fromkeys(turns, math.inf)
        for _ in range(math.ceil(steps / TURN[name])):
            for process in processes:
                steps_ms = process.steps(TURN[name])
                turns[process.mode].append(statistics.median(steps_ms))
                fastest_step[process.mode] = min(fastest_step[process.mode], *steps_ms)
        for process in processes:
            mode, known = process.mode, process.end()
            memory[mode] = max(memory.get(mode, 0), known["peak_rss_mb"])
            times.setdefault(mode, []).extend(turns[mode])
            median = statistics.median(turns[mode])
            config = CONFIGS[name]
            print(json.dumps(dict(config=name, mode=mode, step_ms_min=round(fastest_step[mode], 2),
                                  step_ms_median=round(median, 2),
                                  tokens_per_s=round(config.batch * config.context / median * 1e3), **known)),
                  flush=True)
    medians = {mode: round(statistics.median(values), 2) for mode, values in times.items()}
    result = dict(config=name, step_ms=medians, peak_rss_mb=memory)
    if len(sides) > 1:
        own, *others = medians
        fastest = min(others, key=lambda mode: medians[mode])
        ratios = [their_ms / own_ms for own_ms, their_ms in zip(times[own], times[fastest], strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        result |= dict(fastest=fastest, ratio=round(middle, 3), quartiles=[round(low, 3), round(high, 3)])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step.")
    parser.add_argument("--config", nargs="+", default=["cpu"], choices=CONFIGS)
    parser.add_argument("--precision", choices=["highest", "bf16"], default="highest", help="of our products")
    parser.add_argument("--steps", type=int, help=f"steps to time in a process, {WARM_UP} of warm-up aside")
    parser.add_argument("--versus", choices=["torch"], help="run the PyTorch peer in turn with ours")
    parser.add_argument("--torch-mode", nargs="+", choices=["eager", "compile", "medium", "bf16"],
                        default=["eager"])
    parser.add_argument("--repeats", type=int, default=3, help="how often to start the processes")
    parser.add_argument("--side", choices=["ours", "torch"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.config:
        if options.side:
            mode = options.precision if options.side == "ours" else options.torch_mode[0]
            run_side(name, options.side, mode)
            continue
        sides = [("ours", options.precision)]
        if options.versus:
            sides += [("torch", mode) for mode in options.torch_mode]
        print(json.dumps(measure(name, sides, options.steps or STEPS[name], options.repeats)), flush=True)


if __name__ == "__main__":
    main()
