"""The lecture "Let's build GPT", rung by rung: each model is the one before and one idea more.

    python examples/lecture.py --rung head      one rung: its losses on the way, and a sample
    python examples/lecture.py --rung all       all but the last: a table, and the curves in out/lecture/
    python examples/lecture.py --rung scaled    the GPT at the end: many hours on a CPU (as many as
                                                train_shakespeare.py --recipe lecture, which saves its work)

Read the models from top to bottom; in each, what is new is marked so: # +. Source: Karpathy 2023.
"""
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import minitensor as mt
from gpt.cli import Parser, run, writing
from gpt.data import batch, check_length, find_text, split
from gpt.tokenizer import CharTokenizer
from minitensor import nn

OUT = Path("out/lecture")


class Sizes(NamedTuple):
    """What a rung is made of; the scaled rung changes these numbers and nothing else."""
    width: int = 32
    context: int = 8
    heads: int = 4
    layers: int = 3
    dropout: float = 0.2


# ---- 1: a table of pairs -----------------------------------------------------------------------------------

class Bigram(nn.Module):
    """The next character from this one alone: a table of logits."""

    def __init__(self, vocabulary, sizes):
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids):                                     # (B, T)
        return self.table(ids)                                  # (B, T, V)


# ---- 2: a vector for each character, and one for each place ------------------------------------------------

class Positions(nn.Module):
    """A character and its place become a vector, and a vector becomes logits. Nothing looks back yet."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)                     # +
        self.positions = nn.Embedding(sizes.context, sizes.width)               # +
        self.head = nn.Linear(sizes.width, vocabulary)                          # +

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))          # + (B, T, C)
        return self.head(x)


# ---- 3: tokens talk to each other --------------------------------------------------------------------------

class Head(nn.Module):
    """Self-attention: a query asks, keys answer how much, values say what; nobody sees the future."""

    def __init__(self, width, depth):
        self.query, self.key, self.value = (nn.Linear(width, depth, bias=False) for _ in range(3))

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)                     # (B, T, D)
        scores = q @ np.swapaxes(k, 1, 2) * q.shape[2] ** -0.5                  # (B, T, T)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        return mt.softmax(scores) @ v                                           # (B, T, D)


class OneHead(nn.Module):
    """Positions, with a head between the vectors and the logits."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.attention = Head(sizes.width, sizes.width)                         # +
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.attention(x)                                                   # +
        return self.head(x)


# ---- 4: several conversations at once ----------------------------------------------------------------------

class MultiHead(nn.Module):
    """Narrow heads side by side: all queries, keys and values by one matrix, and attention by one kernel."""

    def __init__(self, width, heads):
        self.heads = heads                                                      # +
        self.qkv = nn.Linear(width, 3 * width, bias=False)                      # +

    def forward(self, x):                                       # as Head does it: see tests/examples
        return mt.attention(self.qkv(x), self.heads)                            # +


class ManyHeads(nn.Module):
    """Four heads of a quarter of the width in the place of one."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.attention = MultiHead(sizes.width, sizes.heads)                    # +
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.attention(x)
        return self.head(x)


# ---- 5: and time to think about what was heard -------------------------------------------------------------

class Thinking(nn.Module):
    """ManyHeads, with a layer after them in which each token is on its own."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.attention = MultiHead(sizes.width, sizes.heads)
        self.feedforward = nn.Sequential(nn.Linear(sizes.width, sizes.width), mt.relu)      # +
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.attention(x)
        x = self.feedforward(x)                                                 # +
        return self.head(x)


# ---- 6: deeper, by adding to what is there -----------------------------------------------------------------

class ResidualBlock(nn.Module):
    """Attention, then feed-forward, four times as wide inside; what each finds is added to the stream."""

    def __init__(self, sizes):
        width = sizes.width
        self.attention = nn.Sequential(MultiHead(width, sizes.heads), nn.Linear(width, width))
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), mt.relu, nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feedforward(x)


class Residual(nn.Module):
    """Blocks of attention and feed-forward, one after the other."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*(ResidualBlock(sizes) for _ in range(sizes.layers)))    # +
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.blocks(x)                                                      # +
        return self.head(x)


# ---- 7: what goes into a layer has mean 0 and variance 1 ---------------------------------------------------

class NormalisedBlock(nn.Module):
    """As ResidualBlock, on the normalised stream."""

    def __init__(self, sizes):
        width = sizes.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)       # +
        self.attention = nn.Sequential(MultiHead(width, sizes.heads), nn.Linear(width, width))
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), mt.relu, nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))                                   # +
        return x + self.feedforward(self.norm2(x))                              # +


class Normalised(nn.Module):
    """Residual, with a layernorm before each layer and before the logits."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*(NormalisedBlock(sizes) for _ in range(sizes.layers)))  # +
        self.norm = nn.LayerNorm(sizes.width)                                   # +
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.blocks(x)
        return self.head(self.norm(x))                                          # +


# ---- 8: and some of it is forgotten, so that nothing is learnt by heart ------------------------------------

class DroppedMultiHead(nn.Module):
    """As MultiHead, with dropout of the attention weights."""

    def __init__(self, width, heads, p):
        self.heads, self.p = heads, p                                           # +
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x):
        return mt.attention(self.qkv(x), self.heads, p=self.p if self.training else 0.0)    # +


class DroppedBlock(nn.Module):
    """As NormalisedBlock, with dropout of the attention weights, and of what is added to the stream."""

    def __init__(self, sizes):
        width, p = sizes.width, sizes.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Sequential(
            DroppedMultiHead(width, sizes.heads, p), nn.Linear(width, width),   # +
            nn.Dropout(p))                                                      # +
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), mt.relu, nn.Linear(4 * width, width),
            nn.Dropout(p))                                                      # +

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class Dropped(nn.Module):
    """Normalised, with dropout: the whole GPT of the lecture."""

    def __init__(self, vocabulary, sizes):
        self.tokens = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*(DroppedBlock(sizes) for _ in range(sizes.layers)))     # +
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(np.arange(ids.shape[1]))
        x = self.blocks(x)
        return self.head(self.norm(x))


# ---- the ladder --------------------------------------------------------------------------------------------

class Rung(NamedTuple):
    """A model, how it is trained, and what it reached in PyTorch with these hyperparameters."""
    model: type[nn.Module]
    reference: float | None                      # nats a character, on validation
    lr: float = 1e-3
    batch: int = 32
    sizes: Sizes = Sizes()
    reference_step: int = 5000                   # after which the reference was measured
    evaluation_batches: int = 200


RUNGS = {
    "bigram": Rung(Bigram, 2.49, lr=1e-2),
    "positions": Rung(Positions, 2.51),
    "head": Rung(OneHead, 2.41),
    "heads": Rung(ManyHeads, 2.29),
    "feedforward": Rung(Thinking, 2.24),
    "residual": Rung(Residual, 2.10),
    "layernorm": Rung(Normalised, 2.10, reference_step=4500),
    "dropout": Rung(Dropped, None),
    "scaled": Rung(Dropped, 1.48, lr=3e-4, batch=64,
                   sizes=Sizes(width=384, context=256, heads=6, layers=6),
                   evaluation_batches=20),       # of 16,384 characters: three times the validation split
}
STEPS, EVALUATE_EVERY, SEED = 5000, 500, 0


class Evaluation(NamedTuple):
    """Losses in nats a character, as the lecture's estimate_loss: means over random batches."""
    step: int
    train: float
    validation: float


def train(rung, vocabulary, train_ids, val_ids, steps, seed, report):
    """A trained model, its evaluations, and the seconds of training alone; report gets each evaluation."""
    mt.seed(seed)
    model = rung.model(vocabulary, rung.sizes)
    optimizer = mt.optim.AdamW(model.parameters(), rung.lr)
    evaluations, seconds = [], 0.0
    for step in range(steps + 1):
        if step % EVALUATE_EVERY == 0 or step == steps:
            losses = (evaluate(model, ids, rung, seed, step) for ids in (train_ids, val_ids))
            evaluations.append(Evaluation(step, *losses))
            report(evaluations[-1])
        if step == steps:
            return model, evaluations, seconds
        start = time.perf_counter()
        x, y = batch(train_ids, rung.batch, rung.sizes.context, seed, step)
        loss = mt.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start


def evaluate(model, ids, rung, seed, step):
    """The mean loss of random batches, new ones after each step."""
    model.eval()
    losses, first = [], rung.evaluation_batches * step
    with mt.no_grad():
        for i in range(first, first + rung.evaluation_batches):
            x, y = batch(ids, rung.batch, rung.sizes.context, seed, i, rank=1)
            losses.append(mt.cross_entropy(model(x), y).item())
    model.train()
    return float(np.mean(losses))


def sample(model, context, count, seed):
    """The ids of count characters, each drawn after the last ones that the context holds."""
    model.eval()
    ids, random = [0], np.random.default_rng(seed)
    for _ in range(count):
        with mt.no_grad():
            probabilities = mt.softmax(model(np.array([ids[-context:]]))[0, -1]).numpy().astype(float)
        ids.append(int(random.choice(len(probabilities), p=probabilities / probabilities.sum())))
    return ids[1:]


def plot(curves, path):
    """Draw the validation loss of each rung over steps to a PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, evaluations in curves.items():
        axes.plot([e.step for e in evaluations], [e.validation for e in evaluations], "o-", markersize=3,
                  label=f"{name}, {evaluations[-1].validation:.2f}")
    last = min(evaluations[-1].validation for evaluations in curves.values())
    axes.set(xlabel="steps", ylabel="validation loss, nats a character", ylim=(last - 0.05, last + 0.8))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments=None):
    parser = Parser(description="Train the models of the lecture \"Let's build GPT\", one idea at a time.")
    add = parser.add_argument
    add("--rung", choices=[*RUNGS, "all"], default="all", help="all is all but scaled")
    add("--data", metavar="FILE", help="text to train on, in UTF-8 (tinyshakespeare)")
    add("--steps", type=int, default=STEPS, metavar="N", help="steps of training (%(default)s)")
    add("--seed", type=int, default=SEED, metavar="N", help="of weights, batches and dropout (%(default)s)")
    add("--out", metavar="FOLDER", type=Path, default=OUT, help="results go here (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seed < 0:
        parser.error(f"--steps is {options.steps}, --seed {options.seed}; give at least 1 and at least 0")
    text = find_text(options.data)
    tokenizer = CharTokenizer.from_text(text.text)
    train_ids, val_ids = split(tokenizer.encode(text.text))
    names = [name for name in RUNGS if name != "scaled"] if options.rung == "all" else [options.rung]
    check_length(train_ids, val_ids, max(RUNGS[name].sizes.context for name in names))
    print(f"{text.name}, from {text.source}")
    print(f"{options.steps} steps, seed {options.seed}; losses are means of "
          f"{RUNGS[names[0]].evaluation_batches} random batches, in nats a character\n")
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)

    curves, rows = {}, []
    for name in names:
        def report(evaluation, name=name):
            print(f"{name:<12} step {evaluation.step:5}: train {evaluation.train:.4f}, "
                  f"validation {evaluation.validation:.4f}", flush=True)
        model, curves[name], seconds = train(RUNGS[name], len(tokenizer), train_ids, val_ids, options.steps,
                                             options.seed, report)
        rows.append(row(name, model, curves[name], seconds, text.comparable))
    print(f"\n{'rung':<12}{'parameters':>11}{'step':>7}{'validation':>12}{'reference':>11}{'seconds':>9}")
    print("\n".join(rows))
    if options.rung != "all":
        print(f"\n{tokenizer.decode(sample(model, RUNGS[name].sizes.context, 300, options.seed))}")
    with writing(options.out):
        (options.out / "losses.json").write_text(json.dumps(curves) + "\n")
        plot(curves, options.out / "losses.png")
    print(f"\nin {options.out}: losses.json, losses.png")
    return 0


def row(name, model, evaluations, seconds, comparable):
    """A line of the table, with the loss after the step of the reference's, or the last one."""
    rung, parameters = RUNGS[name], sum(p.size for p in model.parameters())
    evaluation = next((e for e in evaluations if e.step == rung.reference_step), evaluations[-1])
    reference = f"{rung.reference:.2f}" if rung.reference and comparable else "-"
    return (f"{name:<12}{parameters:>11,}{evaluation.step:>7}{evaluation.validation:>12.3f}{reference:>11}"
            f"{seconds:>9.1f}")


if __name__ == "__main__":
    sys.exit(run(main))
