"""From the command to a checkpoint that reaches a validation loss: ours, and PyTorch on nanoGPT's recipe.

    python tests/benchmarks/time_to_loss.py                             --recipe modern, to 1.90
    python tests/benchmarks/time_to_loss.py --recipe quick --loss 1.60 --no-torch
    python tests/benchmarks/time_to_loss.py --ablate --seeds 0 1 2      modern less each idea: a table

Each run is a process of its own, timed by the wall from its start to the moment when an evaluation has
reached the loss and its checkpoint is on disk; ours is examples/train_shakespeare.py itself. Both sides
evaluate the same tokens in the same windows (the whole validation split, and the start of the training split)
at the same --evaluations places of their schedules (by default once, at the end), and pay for it; a run that
ends above the loss says so, and the last line how many of each side reached it. PyTorch's side is
tests/gpt/torch_peer.py with the recipe `classic`, fused AdamW and the same batches. Ours runs with compiled
kernels on disk, and once more, cold, with an empty cache. Prints a JSON line for each run, then the ratio.
"""
import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)                               # `kernels` is the package, not the file beside this one
from gpt.config import RECIPES, Config  # noqa: E402

TINY = ["--layers", "1", "--heads", "1", "--width", "16", "--context", "16", "--steps", "1", "--sample", "0"]
LESS = {
    "all of it": {},
    "learned positions": {"positions": "learned"},
    "no QK-norm": {"qk_norm": False},
    "GELU": {"mlp": "gelu"},
    "AdamW, lr 3e-3": {"optimizer": "adamw", "lr": 3e-3, "min_lr": 3e-4},
}


# ---- ours: the command -------------------------------------------------------------------------------------

def command(out: Path, recipe: str, changes: dict) -> list[str]:
    """The trainer's command line, without a sample at the end."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return [sys.executable, str(ROOT / "examples" / "train_shakespeare.py"), "--recipe", recipe, *flags,
            "--out", str(out), "--sample", "0"]


def evaluations(out: Path) -> list[dict]:
    """What metrics.jsonl holds so far, in whole lines."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def run_ours(recipe: str, changes: dict, loss: float, environment: dict[str, str]) -> dict:
    """Run the command until it has reached the loss, or to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start = time.perf_counter()
        process = subprocess.Popen(command(out, recipe, changes), env={**os.environ, **environment},
                                   stdout=subprocess.DEVNULL)
        while True:
            ended = process.poll() is not None
            found = evaluations(out)
            seconds = time.perf_counter() - start
            if found and found[-1]["val_loss"] <= loss and (out / "checkpoint.safetensors").exists():
                process.terminate()
                process.wait()
                break
            if ended:
                if process.returncode:
                    raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}")
                break
            time.sleep(0.005)
    return dict(seconds=round(seconds, 2), step=found[-1]["step"], val_loss=round(found[-1]["val_loss"], 4),
                train_loss=round(found[-1]["train_loss"], 4), reached=found[-1]["val_loss"] <= loss)


# ---- PyTorch: nanoGPT's recipe -----------------------------------------------------------------------------

def run_torch(changes: dict, loss: float) -> dict:
    """Run `train_torch` in a process; its time counts from the start of the process to its last line."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "--side", "torch", "--loss", str(loss), "--out", folder,
             "--changes", json.dumps(changes)], stdout=subprocess.PIPE, text=True)
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        if process.wait():
            raise SystemExit(f"PyTorch's side ended with {process.returncode}")
    return {"seconds": round(seconds, 2), **json.loads(line)}


def train_torch(config: Config, loss: float, out: Path) -> dict:
    """Train the peer until an evaluation reaches the loss, save it, and say what was reached."""
    import torch

    from gpt.data import batch, find_text, split
    from gpt.tokenizer import CharTokenizer
    from gpt.train import TRAIN_PART
    from minitensor.optim import warmup_cosine
    from tests.gpt import torch_peer
    text = find_text().text
    tokenizer = CharTokenizer.from_text(text)
    train_ids, val_ids = (ids.astype(np.int64) for ids in split(tokenizer.encode(text)))
    torch.manual_seed(config.seed)
    model = torch_peer.build(config, len(tokenizer))
    for name, p in model.named_parameters():                         # as ours, and nanoGPT
        if name.endswith(("projection.weight", "down.weight")):
            torch.nn.init.normal_(p, std=0.02 / (2 * config.layers)**0.5)
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": config.decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    for step in range(config.steps):
        pair = batch(train_ids, config.batch, config.context, config.seed, step)
        x, y = (torch.from_numpy(ids).long() for ids in pair)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, config.steps, config.warmup, config.lr, config.min_lr)
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            train_loss, val_loss = (evaluate_torch(model, config, ids)
                                    for ids in (train_ids[:TRAIN_PART], val_ids))
            torch.save({"model": model.state_dict(), "step": step + 1}, out / "checkpoint.pt")
            found = dict(step=step + 1, val_loss=round(val_loss, 4), train_loss=round(train_loss, 4),
                         reached=val_loss <= loss)
            if found["reached"]:
                break
    return found


def evaluate_torch(model, config: Config, ids: np.ndarray) -> float:
    """As `gpt.train.evaluate`: the same windows, summed in float64."""
    import torch

    from gpt.data import windows
    total = 0.0
    model.eval()
    with torch.no_grad():
        for pair in windows(ids, config.context, batch=max(1, 4096 // config.context)):
            x, y = (torch.from_numpy(tokens).long() for tokens in pair)
            losses = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
            total += losses.double().sum().item()
    model.train()
    return total / (len(ids) - 1)


# ---- ablations ---------------------------------------------------------------------------------------------

def ablate(recipe: str, changes: dict, seeds: list[int]) -> None:
    """A JSON line for each run, then a table: means over the seeds, their spread, and what each idea gave."""
    table: dict[str, list[dict]] = {}
    for name, less in LESS.items():
        for seed in seeds:
            steps = changes.get("steps", RECIPES[recipe].steps)
            all_changes = {**changes, **less, "seed": seed, "eval_every": steps}
            found = run_ours(recipe, all_changes, -1.0, {})
            print(json.dumps({"recipe": recipe, "variant": name, "seed": seed, **found}), flush=True)
            table.setdefault(name, []).append(found)
    print(f"\n| {recipe}, with | validation | {len(seeds)} seeds | train | over {recipe} |")
    print("|---|---|---|---|---|")
    base = statistics.mean(run["val_loss"] for run in table["all of it"])
    for name, runs in table.items():
        values = [run["val_loss"] for run in runs]
        mean, train = statistics.mean(values), statistics.mean(run["train_loss"] for run in runs)
        print(f"| {name} | {mean:.3f} | {min(values):.3f} to {max(values):.3f} | {train:.3f} | "
              f"{mean - base:+.3f} |")


def compare(options: argparse.Namespace, changes: dict) -> None:
    """Both sides, each --repeats times in turn, then ours once with nothing compiled."""
    steps = changes.get("steps", RECIPES[options.recipe].steps)
    ours = {**changes, "eval_every": max(1, steps // options.evaluations)}
    steps = options.torch_steps or RECIPES["classic"].steps
    peers = {"steps": steps, "eval_every": max(1, steps // options.evaluations)}
    with tempfile.TemporaryDirectory() as folder:                    # compile first, for the warm runs
        subprocess.run([*command(Path(folder), options.recipe, {}), *TINY], check=True,
                       stdout=subprocess.DEVNULL)
    runs: dict[str, list[dict]] = {}

    def note(side: str, found: dict) -> None:
        print(json.dumps({"side": side, "loss": options.loss, **found}), flush=True)
        runs.setdefault(side, []).append(found)

    for repeat in range(options.repeats):
        note("ours", run_ours(options.recipe, {**ours, "seed": options.seed + repeat}, options.loss, {}))
        if options.torch:
            note("torch", run_torch({**peers, "seed": options.seed + repeat}, options.loss))
    if options.cold:
        with tempfile.TemporaryDirectory() as cache:
            note("ours, cold", run_ours(options.recipe, {**ours, "seed": options.seed}, options.loss,
                                        {"NUMBA_CACHE_DIR": cache}))
    medians = {side: statistics.median(run["seconds"] for run in found) for side, found in runs.items()}
    reached = {side: sum(run["reached"] for run in found) for side, found in runs.items()}
    ratio = round(medians["torch"] / medians["ours"], 2) if options.torch else None
    print(json.dumps({"recipe": options.recipe, "loss": options.loss, "seconds": medians, "reached": reached,
                      "of": options.repeats, "ratio": ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time runs from the command to a validation loss.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="modern")
    add("--loss", type=float, default=1.90, help="validation loss to reach, nats a character (%(default)s)")
    add("--evaluations", type=int, default=1, help="in a run, evenly, on both sides (%(default)s)")
    add("--repeats", type=int, default=1, help="runs of each side, with seeds from --seed on (%(default)s)")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="of ours, in place of the recipe's")
    add("--torch-steps", type=int, help="of PyTorch's, in place of classic's")
    add("--torch", action=argparse.BooleanOptionalAction, default=True, help="run PyTorch's side")
    add("--cold", action=argparse.BooleanOptionalAction, default=True, help="run ours with nothing compiled")
    add("--ablate", action="store_true", help="take each idea away, over --seeds")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--side", choices=["torch"], help=argparse.SUPPRESS)
    add("--changes", type=json.loads, default={}, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        config = dataclasses.replace(RECIPES["classic"], **options.changes)
        print(json.dumps(train_torch(config, options.loss, options.out)), flush=True)
        return
    changes = {} if options.steps is None else {"steps": options.steps}
    if options.ablate:
        ablate(options.recipe, changes, options.seeds)
    else:
        compare(options, changes)


if __name__ == "__main__":
    main()
