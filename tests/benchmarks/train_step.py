"""A training step (forward, backward, clip, AdamW), timed, and the same step in PyTorch.

    python tests/benchmarks/train_step.py --config cpu lecture8 --versus torch

Prints a JSON line for each process. With --versus torch the two sides run in turn, each --repeats times and
each in a process of its own, and a last line for each config gives the medians and their ratio: the time of
PyTorch's fastest mode over ours. The peer is tests/gpt/torch_peer.py: the same model from the same config,
with fused AdamW. --torch-mode: eager in float32 (the default); compile, under torch.compile; medium, with
products in bfloat16 where the CPU has them; bf16, under autocast.
"""
import argparse
import json
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
STEPS = {"cpu": 40, "lecture8": 8, "long": 15, "gpt2": 5}
WARM_UP = 3


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


def measure(name: str, side: str, mode: str, steps: int) -> dict:
    """Time steps of one side in this process, after a warm-up."""
    config, vocabulary = CONFIGS[name], VOCABULARY.get(name, 65)
    step, parameters = (ours if side == "ours" else peer)(config, vocabulary, mode)
    shape = (8, config.batch, config.context + 1)
    batches = np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32)
    times, loss = [], 0.0
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        loss = step(batches[i % len(batches)])
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARM_UP:])
    return dict(config=name, mode=mode if side == "ours" else f"torch {mode}", params=parameters,
                step_ms_min=round(min(times[WARM_UP:]) * 1e3, 2), step_ms_median=round(median * 1e3, 2),
                tokens_per_s=round(config.batch * config.context / median),
                peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, loss=round(loss, 4))


def in_a_process(name: str, side: str, mode: str, steps: int) -> dict:
    """`measure` in a new process; its line is printed."""
    command = [sys.executable, __file__, "--config", name, "--side", side, "--steps", str(steps),
               "--precision" if side == "ours" else "--torch-mode", mode]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    line = run.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def compare(name: str, precision: str, torch_modes: list[str], steps: int, repeats: int) -> dict:
    """Both sides in turn, and the medians: the ratio is that of PyTorch's fastest mode."""
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(repeats):
        for side, mode in [("ours", precision), *(("torch", mode) for mode in torch_modes)]:
            line = in_a_process(name, side, mode, steps)
            times.setdefault(line["mode"], []).append(line["step_ms_median"])
            memory[line["mode"]] = line["peak_rss_mb"]
    medians = {mode: round(statistics.median(values), 2) for mode, values in times.items()}
    fastest = min((mode for mode in medians if mode != precision), key=lambda mode: medians[mode])
    ratios = [round(theirs / ours, 3) for ours, theirs in zip(times[precision], times[fastest], strict=True)]
    return dict(config=name, step_ms=medians, fastest=fastest, ratios=ratios, peak_rss_mb=memory,
                ratio=round(medians[fastest] / medians[precision], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step.")
    parser.add_argument("--config", nargs="+", default=["cpu"], choices=CONFIGS)
    parser.add_argument("--precision", choices=["highest", "bf16"], default="highest", help="of our products")
    parser.add_argument("--steps", type=int, help="steps to time in each process, after 3 of warm-up")
    parser.add_argument("--versus", choices=["torch"], help="run the PyTorch peer in turn with ours")
    parser.add_argument("--torch-mode", nargs="+", choices=["eager", "compile", "medium", "bf16"],
                        default=["eager"])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--side", choices=["ours", "torch"], help="measure this side in this very process")
    options = parser.parse_args()
    for name in options.config:
        steps = options.steps or STEPS[name]
        if options.side:
            mode = options.precision if options.side == "ours" else options.torch_mode[0]
            print(json.dumps(measure(name, options.side, mode, steps)), flush=True)
        elif options.versus:
            print(json.dumps(compare(name, options.precision, options.torch_mode, steps, options.repeats)))
        else:
            in_a_process(name, "ours", options.precision, steps)


if __name__ == "__main__":
    main()
