"""The command line of the trainer: from arguments to a folder with checkpoint, metrics, plot and sample."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import kernels
import minitensor as mt
from gpt.cli import INTERRUPTED, Parser, interruptible, run, writing
from gpt.config import DEFAULT, RECIPES, Config
from gpt.data import Text, check_length, find_text, split
from gpt.errors import BadInput
from gpt.generate import LONGEST, first_ids, generate
from gpt.model import GPT
from gpt.tokenizer import CharTokenizer
from gpt.train import Evaluation, train
from kernels.cpu import TARGET

FILES = ("checkpoint.safetensors", "metrics.jsonl", "loss.png", "sample.txt")


def parse(arguments: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """The config, from a recipe and the options that change it, and the other options."""
    parser = Parser(description="Train a GPT on Shakespeare, or on a text of your own.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default=DEFAULT,
        help=f"what the other defaults are taken from ({DEFAULT})")
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{field.metadata['help']} ({getattr(RECIPES[DEFAULT], field.name)})"
        if isinstance(field.default, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif choices := field.metadata["choices"]:
            add(flag, choices=choices, default=argparse.SUPPRESS, help=text)
        else:
            add(flag, type=type(field.default), default=argparse.SUPPRESS, help=text,
                metavar="N" if isinstance(field.default, int) else "X")
    add("--data", metavar="FILE", help="text to train on, in UTF-8 (tinyshakespeare)")
    add("--out", metavar="FOLDER", type=Path, default=Path("out/shakespeare"), help="results go here")
    add("--sample", metavar="N", type=int, default=500, help="characters to write at the end (500)")
    add("--threads", metavar="N", type=int, help="threads to compute with (all)")
    add("--precision", choices=["highest", "bf16"], default="highest",
        help="of products: float32, or operands rounded to bfloat16 where the CPU can (highest)")
    options = parser.parse_args(arguments)
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return dataclasses.replace(RECIPES[options.recipe], **given), options


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments (or the process's) say; exit code 0, 2 for bad input, 130 if interrupted."""
    return run(_main, arguments)


def _main(arguments: list[str] | None) -> int:
    config, options = parse(arguments)
    for package in ("tqdm", "matplotlib", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f'the package {package} is missing; pip install -e ".[train]" installs it')
    if not 0 <= options.sample <= LONGEST:
        raise BadInput(f"--sample is {options.sample}; it must be in 0 to {LONGEST:,}")
    if options.threads is not None:
        try:
            kernels.set_num_threads(options.threads)
        except ValueError as error:
            raise BadInput(f"--threads: {error}") from error
    try:
        kernels.set_matmul_precision(options.precision)
    except RuntimeError as error:
        print(f"note: {error}; going on in float32", file=sys.stderr)
    text = find_text(options.data)
    tokenizer = CharTokenizer.from_text(text.text)
    train_ids, val_ids = split(tokenizer.encode(text.text))
    check_length(train_ids, val_ids, config.context)
    mt.seed(config.seed)
    model = GPT(config, len(tokenizer))
    _make_writable(options.out)

    _describe(config, text, tokenizer, model, len(train_ids), len(val_ids))
    with interruptible() as check:
        results = Results(options.out, config, model, tokenizer, options.sample, check)
        try:
            train(model, config, train_ids, val_ids, results.after_step, results.after_evaluation)
            results.finish()
        except KeyboardInterrupt:
            results.interrupted()
            return INTERRUPTED
        finally:
            results.close()
            kernels.set_matmul_precision("highest")
    return 0


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for name in FILES:
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} in it is a folder")
    except OSError as error:
        raise BadInput(f"--out is {str(folder)!r}, which cannot be written: {error.strerror}; "
                       "name another folder") from error


def _describe(config: Config, text: Text, tokenizer: CharTokenizer, model: GPT, train: int, val: int) -> None:
    print(f"data     {text.name}: {train + val:,} characters, {len(tokenizer)} symbols; "
          f"{train:,} to train on, {val:,} to validate on\n         from {text.source}")
    products = {"highest": "float32", "bf16": "bfloat16"}[kernels.get_matmul_precision()]
    print(f"machine  {platform.machine()} with {TARGET.name}, {kernels.get_num_threads()} threads, "
          f"products in {products}")
    print(f"model    {sum(p.size for p in model.parameters()):,} parameters: {config.layers} layers, "
          f"{config.heads} heads, width {config.width}, context {config.context}")
    print(f"run      {config.steps:,} steps of {config.batch} x {config.context} characters, "
          f"seed {config.seed}", flush=True)


class Results:
    """What a run shows and leaves behind, beside its loop."""

    def __init__(self, folder: Path, config: Config, model: GPT, tokenizer: CharTokenizer, characters: int,
                 check_interruption: Callable[[], None]):
        from tqdm import tqdm
        self.folder, self.config, self.model = folder, config, model
        self.tokenizer, self.characters, self.check_interruption = tokenizer, characters, check_interruption
        self.steps, self.evaluations = 0, list[Evaluation]()
        self.bar = tqdm(
            total=config.steps, unit=" steps", dynamic_ncols=True, disable=None,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}")
        self.compiled = 0
        kernels.jit.compiling = self.compiling

    def compiling(self, name: str) -> None:
        """Say that a kernel is being compiled, which happens once on a machine."""
        self.check_interruption()
        self.compiled += 1
        if not self.bar.disable:
            self.bar.clear()
            print(f"\rcompiling kernels, once on this machine: {self.compiled:2} {name:<30}",
                  end="", flush=True)
        elif self.compiled == 1:
            print("compiling kernels, once on this machine", flush=True)

    def after_step(self, steps: int, loss: float) -> None:
        """Move the progress bar."""
        if self.steps == 0:
            if self.compiled and not self.bar.disable:
                print("\r\033[K", end="")
            self.bar.unpause()
        self.steps = steps
        self.check_interruption()
        if not self.bar.disable:
            rate = (self.bar.format_dict["rate"] or 0) * self.config.batch * self.config.context
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update()

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """Report an evaluation, and keep the model."""
        self.evaluations.append(evaluation)
        self.bar.write(f"step {evaluation.step:6,}   train {evaluation.train_loss:.4f}   validation "
                       f"{evaluation.val_loss:.4f} nats/character   {evaluation.seconds:.0f} s   "
                       f"{evaluation.tokens_per_s:,.0f} tokens/s")
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "w" if len(self.evaluations) == 1 else "a") as file:
            file.write(json.dumps(evaluation._asdict()) + "\n")
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        from gpt.checkpoint import save_model
        save_model(self.folder / "checkpoint.safetensors", self.model, self.tokenizer, self.steps)

    def interrupted(self) -> None:
        """Keep what there is."""
        self.bar.close()
        if not self.steps:
            print("interrupted before the first step; nothing was written")
            return
        self.save()
        print(f"interrupted after {self.steps:,} steps; "
              f"the model is in {self.folder / 'checkpoint.safetensors'}")

    def finish(self) -> None:
        """Draw the curves, write a sample, and say where everything is."""
        self.bar.close()
        with writing(self.folder / "loss.png"):
            plot(self.evaluations, self.folder / "loss.png")
        ids = generate(self.model, first_ids(self.tokenizer), self.characters, seed=self.config.seed,
                       after_token=self.check_interruption)
        sample = self.tokenizer.decode(ids[1:])
        with writing(self.folder / "sample.txt"):
            (self.folder / "sample.txt").write_text(sample, encoding="utf-8", newline="")
        print(f"\n{sample}\n")
        print(f"in {self.folder}: {', '.join(FILES)}")

    def close(self) -> None:
        """Let go of the terminal."""
        self.bar.close()
        kernels.jit.compiling = None


def plot(evaluations: list[Evaluation], path: Path) -> None:
    """Draw training and validation loss over steps to a PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [e.step for e in evaluations]
    curves = {"train": [e.train_loss for e in evaluations], "validation": [e.val_loss for e in evaluations]}
    for (name, values), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        axes.plot(steps, values, "o-", color=colour, markersize=3,
                  label=f"{name}, {values[-1]:.3f} at the end")
    axes.set(xlabel="steps", ylabel="loss, nats a character", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
