"""The command line of the trainer: from arguments to a run, and from a run to its results."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernels
from gpt.checkpoint import LAST
from gpt.cli import INTERRUPTED, Parser, interruptible, run
from gpt.config import DEFAULT, RECIPES, Config
from gpt.corpus import Corpus
from gpt.data import sweep
from gpt.errors import BadInput, Diverged, require
from gpt.generate import LONGEST
from gpt.results import FILES, Results
from gpt.run import Run
from gpt.start import begin, take_up
from gpt.train import train
from kernels.cpu import TARGET


def parse(arguments: list[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The fields of the config that were given, a recipe's among them, and the other options."""
    parser = Parser(description="Train a GPT on Shakespeare, or on a text of your own.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default=argparse.SUPPRESS,
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
    add("--data", metavar="PATH", nargs="+",
        help="text to train on, in UTF-8: files, folders of .txt files, globs (tinyshakespeare)")
    add("--out", metavar="FOLDER", type=Path, default=Path("out/shakespeare"), help="results go here")
    add("--resume", action="store_true", help="go on with the run in --out, as if it had never stopped")
    add("--stop-after", metavar="N", type=int, help="stop when so many steps are done; --resume goes on")
    add("--init-from", metavar="CHECKPOINT", type=Path,
        help="start with the weights and the vocabulary of a trained model")
    add("--sample", metavar="N", type=int, default=500, help="characters to write at the end (500)")
    add("--threads", metavar="N", type=int, help="threads to compute with (all)")
    add("--precision", choices=["auto", "highest", "bf16"], default="auto",
        help="of products: float32 (highest), or of operands rounded to bfloat16; auto: where the CPU can")
    add("--quiet", action="store_true", help="print nothing but notes and errors")
    options = parser.parse_args(arguments)
    given = dataclasses.asdict(RECIPES[options.recipe]) if "recipe" in options else {}
    names = {field.name for field in dataclasses.fields(Config)}
    return given | {name: value for name, value in vars(options).items() if name in names}, options


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments (or the process's) say; exit code 0, 2 for bad input, 3 if the loss diverged,
    130 if interrupted."""
    return run(_main, arguments)


def _main(arguments: list[str] | None) -> int:
    given, options = parse(arguments)
    _check(options)
    with contextlib.ExitStack() as stack:
        if options.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if options.resume:
            asked = None if options.precision == "auto" else _available(options.precision)
            run, corpus = take_up(options.out / LAST, given, options.data, asked)
        else:
            run, corpus = begin(given, options.data, _available(options.precision), options.init_from)
        stack.enter_context(_precision(run.source["precision"]))
        _make_writable(options.out)
        if not options.resume and (options.out / FILES[0]).exists():
            print(f"note: the run in {str(options.out)!r} is replaced when this one is first saved; --resume "
                  "goes on with it, --out names another folder", file=sys.stderr)
        _describe(run, corpus)
        check = stack.enter_context(interruptible())
        results = Results(options.out, run, corpus, options.sample, options.quiet, check)
        stack.callback(results.close)
        try:
            train(run, corpus.train, corpus.validation, results.after_step, results.after_evaluation,
                  options.stop_after or math.inf, check)
            results.finish()
        except KeyboardInterrupt:
            results.interrupted()
            return INTERRUPTED
        except Diverged:
            results.end("diverged")
            raise
    return 0


def _check(options: argparse.Namespace) -> None:
    """BadInput for options that cannot be, before anything is read or written."""
    require("tqdm", "matplotlib", "safetensors")
    if not 0 <= options.sample <= LONGEST:
        raise BadInput(f"--sample is {options.sample}; it must be in 0 to {LONGEST:,}")
    if options.stop_after is not None and options.stop_after < 1:
        raise BadInput(f"--stop-after is {options.stop_after}; it must be at least 1")
    if options.resume and options.init_from:
        raise BadInput("--resume and --init-from: a run that goes on has its weights; give one of them")
    if options.init_from and options.init_from.resolve().parent == options.out.resolve():
        raise BadInput(f"--init-from lies in --out, {str(options.out)!r}, where this run would replace it; "
                       "name another folder for --out")
    if options.threads is not None:
        try:
            kernels.set_num_threads(options.threads)
        except ValueError as error:
            raise BadInput(f"--threads: {error}") from error


def _available(precision: str) -> str:
    """The precision of products to take on this CPU, with a note if it is not the one that was wanted."""
    if precision == "bf16" and not TARGET.bf16:
        print(f"note: this CPU ({TARGET.name}) has no products in bfloat16; going on in float32",
              file=sys.stderr)
    return "bf16" if precision != "highest" and TARGET.bf16 else "highest"


@contextlib.contextmanager
def _precision(precision: str) -> Iterator[None]:
    """Products in this precision until the block ends; BadInput where a run needs what the CPU lacks."""
    before = kernels.get_matmul_precision()
    try:
        kernels.set_matmul_precision(precision)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"--resume: the run has products in {precision}, which cannot be had here; resume it "
                       "where it began, or start from its weights with --init-from") from error
    try:
        yield
    finally:
        kernels.set_matmul_precision(before)


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
    sweep(folder)


def _describe(run: Run, corpus: Corpus) -> None:
    config, train, val = run.config, len(corpus.train), len(corpus.validation)
    print(f"data     {corpus.name}: {train + val:,} characters, {len(run.tokenizer)} symbols; "
          f"{train:,} to train on, {val:,} to validate on\n         from {corpus.where}")
    for note in corpus.notes:
        print(f"         {note}")
    products = {"highest": "float32", "bf16": "bfloat16"}[kernels.get_matmul_precision()]
    print(f"machine  {platform.machine()} with {TARGET.name}, {kernels.get_num_threads()} threads, "
          f"products in {products}")
    print(f"model    {sum(p.size for p in run.model.parameters()):,} parameters: "
          f"{_count(config.layers, 'layer')}, {_count(config.heads, 'head')}, width {config.width}, "
          f"context {config.context}")
    length = _count(config.minutes, "minute") if config.minutes else _count(config.steps, "step")
    print(f"run      {length} of {config.batch} x {config.context} characters, seed {config.seed}"
          + (f", from step {run.progress.step:,} on" if run.progress.step else ""), flush=True)


def _count(n: float, thing: str) -> str:
    return f"{n:,.12g} {thing}{'s' * (n != 1)}"
