"""What a run shows and leaves behind: the terminal, metrics, checkpoints, curves and samples."""
from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kernels
from gpt import ahead
from gpt.baselines import baselines
from gpt.checkpoint import LAST, save_run
from gpt.cli import writing
from gpt.corpus import Corpus
from gpt.data import replacing
from gpt.generate import first_ids, generate
from gpt.report import COLOURS, ended, report
from gpt.run import Evaluation, Run

BEST = "best.safetensors"
REPORT = "report.html"
FILES = (LAST, BEST, "metrics.jsonl", REPORT, "loss.png", "sample.txt")
SAVE_EVERY = 300.0                           # seconds, where evaluations are rarer
GLIMPSE = 200                                # characters of the sample at an evaluation


class Results:
    """What a run shows and leaves behind, beside its loop.

    The last checkpoint is the only truth: all else in the folder is made from it again when a run goes on, so
    that an end at any moment leaves nothing that does not fit.
    """

    def __init__(self, folder: Path, run: Run, corpus: Corpus, characters: int, quiet: bool,
                 check_interruption: Callable[[], None]):
        from tqdm import tqdm
        self.folder, self.run, self.corpus = folder, run, corpus
        self.characters, self.check_interruption = characters, check_interruption
        self.tables = baselines(corpus.train, corpus.validation, len(run.tokenizer))
        reached = ", ".join(f"{name} {nats:.4f} ({nats / math.log(2):.4f} bits)"
                            for name, nats in self.tables.items())
        print(f"tables   {reached} nats/character on the validation split", flush=True)
        self.began, self.written, self.saved = run.progress.step, 0, False
        self.saved_at = time.monotonic()
        self.kept = self.place()                                 # of the run, when it was last kept
        self.bar = tqdm(total=run.config.steps, initial=self.began, dynamic_ncols=True,
                        disable=quiet or not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps{postfix}")
        self.compiled = 0
        self.ahead: subprocess.Popen | None = None               # a second process that compiles kernels
        kernels.jit.compiling = self.compiling
        if self.began:
            self.keep_best()
            self.write_metrics()
            self.write_report()

    def compiling(self, name: str) -> None:
        """Say that a kernel is being compiled, which happens once on a machine."""
        if self.run.progress.step == self.began:                 # later it would cut an evaluation in two
            self.check_interruption()
        self.compiled += 1
        if self.compiled == 1:
            self.ahead = ahead.start(self.run.config, len(self.run.tokenizer), kernels.get_matmul_precision())
        if not self.bar.disable:
            self.bar.clear()
            print(f"\rcompiling kernels, once on this machine: {self.compiled:2} {name:<30}",
                  end="", flush=True)
        elif self.compiled == 1:
            print("compiling kernels, once on this machine", flush=True)

    def after_step(self, loss: float, remaining: float) -> None:
        """Move the progress bar, and save once in a while."""
        progress = self.run.progress
        if progress.step == self.began + 1 and self.compiled and not self.bar.disable:
            print("\r\033[K", end="")
        self.check_interruption()
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()
        if not self.bar.disable:
            config = self.run.config
            speed = progress.lap_steps * config.batch * config.context / progress.lap_seconds
            if config.minutes:
                self.bar.total = round(progress.step * (1 + remaining / progress.seconds))
            self.bar.set_postfix_str(f"{duration(remaining)} left, loss {loss:.3f}, {speed:,.0f} tokens/s",
                                     refresh=False)
            self.bar.update()

    def after_evaluation(self, evaluation: Evaluation, remaining: float) -> None:
        """Report an evaluation, and keep the run."""
        self.bar.write(f"step {evaluation.step:6,}   train {evaluation.train_loss:.4f}   validation "
                       f"{evaluation.val_loss:.4f} nats/character ({evaluation.val_bits:.4f} bits)   "
                       f"{evaluation.tokens_per_s:,.0f} tokens/s   {duration(evaluation.seconds)}, "
                       f"{duration(remaining)} left")
        sys.stdout.flush()
        if self.characters:
            text = self.sample(min(self.characters, GLIMPSE), lambda: None)
            self.run.progress.samples.append((evaluation.step, text))
        self.keep()

    def sample(self, characters: int, check: Callable[[], None]) -> str:
        """What the model writes by itself."""
        ids = generate(self.run.model, first_ids(self.run.tokenizer), characters, seed=self.run.config.seed,
                       after_token=lambda token: check())
        return self.run.tokenizer.decode(ids[1:])

    def keep(self) -> None:
        """Write the checkpoint, then what is made from it: the best one's name, metrics and report."""
        self.save()
        self.keep_best()
        self.write_metrics()
        self.write_report()
        self.kept = self.place()

    def place(self) -> tuple[int, int, bool]:
        """How far the run is: steps, evaluations, and whether it is done."""
        progress = self.run.progress
        return progress.step, len(progress.evaluations), progress.done

    def write_report(self) -> None:
        """Write the page, once there is an evaluation to show."""
        if self.run.progress.evaluations:
            with writing(self.folder / REPORT), replacing(self.folder / REPORT) as temporary:
                temporary.write_text(report(self.run, self.corpus, self.tables), encoding="utf-8")

    def end(self, state: str) -> None:
        """Let the page of this run say how it ended."""
        page = self.folder / REPORT
        if (self.saved or self.began) and page.exists():
            text = page.read_text(encoding="utf-8")
            with writing(page), replacing(page) as temporary:
                temporary.write_text(ended(text, state), encoding="utf-8")

    def save(self) -> None:
        """Write the checkpoint."""
        save_run(self.folder / LAST, self.run)
        if not self.began and not self.saved:                    # a new run where there was another
            for name in FILES[1:]:
                (self.folder / name).unlink(missing_ok=True)
        self.saved = True
        self.saved_at = time.monotonic()

    def keep_best(self) -> None:
        """If the checkpoint just written is the best, give it a second name, under which it stays."""
        best, last = self.run.progress.best(), Path(os.path.realpath(self.folder / LAST))
        path = self.folder / BEST
        if best is None or best.step != self.run.progress.step or (path.exists() and path.samefile(last)):
            return                                               # one file cannot be renamed to itself
        with writing(path), replacing(path) as temporary:
            temporary.unlink()
            try:
                os.link(last, temporary)
            except OSError:                                      # not every file system has links
                shutil.copyfile(last, temporary)

    def write_metrics(self) -> None:
        """Append what is new to metrics.jsonl; the first time in a process, write all of it."""
        path = self.folder / "metrics.jsonl"
        evaluations = self.run.progress.evaluations
        lines = "".join(json.dumps(e._asdict()) + "\n" for e in evaluations[self.written:])
        with writing(path):
            if self.written:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(lines)
            elif lines:
                with replacing(path) as temporary:
                    temporary.write_text(lines, encoding="utf-8")
        self.written = len(evaluations)

    def interrupted(self) -> None:
        """Keep what there is."""
        self.bar.close()
        if self.kept != self.place():
            self.keep()
        self.end("interrupted")
        if not self.saved:
            print("interrupted before the first step; nothing was written")
            return
        steps = self.run.progress.step
        print(f"interrupted after {steps:,} steps; --resume goes on from {self.folder / LAST}")

    def finish(self) -> None:
        """Draw the curves, write a sample, and say where everything is."""
        self.bar.close()
        progress = self.run.progress
        if self.kept != self.place():                            # an evaluation keeps it too
            self.keep()
        if not progress.done:
            self.end("stopped")
            print(f"stopped after {progress.step:,} steps; --resume goes on from {self.folder / LAST}")
            return
        best = progress.best()
        if best and best.step < progress.step:
            print(f"best     step {best.step:,}, validation {best.val_loss:.4f}, in {BEST}"
                  + (f"; stopped after {self.run.config.patience} evaluations without a better one"
                     if 0 < self.run.config.patience and progress.step < self.run.config.steps else ""))
        with writing(self.folder / "loss.png"):
            plot(progress.evaluations, self.folder / "loss.png")
        sample = self.sample(self.characters, self.check_interruption)
        with writing(self.folder / "sample.txt"), replacing(self.folder / "sample.txt") as temporary:
            temporary.write_text(sample, encoding="utf-8", newline="")
        if sample:
            print(f"\n{sample}\n")
        print(f"in {self.folder}: {', '.join(FILES)}")

    def close(self) -> None:
        """Let go of the terminal, and end the second process if it still compiles."""
        self.bar.close()
        if self.ahead is not None:
            self.ahead.kill()
            self.ahead.wait()
        kernels.jit.compiling = None


def duration(seconds: float) -> str:
    """A time for people: 42 s, 3:05 min, 2:07 h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    minutes, unit = (whole, "min") if whole < 3600 else (whole // 60, "h")
    return f"{minutes // 60}:{minutes % 60:02} {unit}"


def plot(evaluations: list[Evaluation], path: Path) -> None:
    """Draw training and validation loss over steps to a PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [e.step for e in evaluations]
    curves = {"train": [e.train_loss for e in evaluations], "validation": [e.val_loss for e in evaluations]}
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(steps, values, "o-", color=colour, markersize=3,
                  label=f"{name}, {values[-1]:.3f} at the end")
    axes.set(xlabel="steps", ylabel="loss, nats a character", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
