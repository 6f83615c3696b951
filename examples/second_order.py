"""Derivatives of derivatives at work: Newton's method, and how sharply a GPT's loss bends.

    python examples/second_order.py
"""
import sys

import numpy as np

import minitensor as mt
from gpt.cli import Parser, run
from gpt.config import Config
from gpt.data import batch
from gpt.model import GPT
from gpt.tokenizer import CharTokenizer
from gpt.verse import verse


def rosenbrock(p):
    """A bent, narrow valley; its lowest point is (1, 1)."""
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def newton(f, x, steps):
    """The points that Newton's method visits: each is where the parabola that fits f best has its bottom."""
    points = [x]
    for _ in range(steps):
        _, slope = mt.vjp(f, mt.Tensor(x))
        bend = mt.hessian(f, mt.Tensor(x))
        x = x - np.linalg.solve(bend.numpy(), slope.numpy())
        points.append(x)
    return points


def top_eigenvalue(loss, parameters, steps, seed=0):
    """The eigenvalue of largest size of the Hessian of loss, by power iteration: v <- H v / |H v|.

    H has a row and a column for every parameter, and is never formed: H v costs two walks back. Yields the
    estimate vᵀ H v of each step.
    """
    random = np.random.default_rng(seed)
    v = [random.standard_normal(p.shape).astype(p.dtype) for p in parameters]
    for _ in range(steps):
        length = np.sqrt(sum(np.sum(part ** 2) for part in v))
        v = [part / length for part in v]
        _, product = mt.hvp(loss, parameters, v)
        product = [part.numpy() for part in product]
        yield float(sum(np.sum(a * b) for a, b in zip(v, product, strict=True)))
        v = product


def small_gpt(config, steps):
    """A GPT after some steps of training on built-in verse, and its loss on another batch."""
    text = verse(10_000, seed=0)
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    mt.seed(0)
    model = GPT(config, len(tokenizer))
    optimizer = mt.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps + 1):
        x, y = batch(ids, config.batch, config.context, seed=0, step=step)
        loss = mt.cross_entropy(model(x), y)
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, loss


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="of power iteration (%(default)s)")
    steps = parser.parse_args(arguments).steps

    print("Newton's method on Rosenbrock's valley, from (-1.2, 1):")
    for step, x in enumerate(newton(rosenbrock, np.array([-1.2, 1.0]), 6)):
        print(f"  step {step}: ({x[0]:9.6f}, {x[1]:9.6f})   f = {rosenbrock(x):.2e}")
    print("Near the bottom the number of right digits doubles with each step.\n")

    model, loss = small_gpt(Config(layers=2, heads=2, width=16, context=16, batch=16), steps=100)
    count = sum(p.size for p in model.parameters())
    print(f"A GPT of {count:,} parameters after 100 steps, loss {loss.item():.3f}. Its Hessian has "
          f"{count ** 2:,} elements;\npower iteration finds its largest eigenvalue without forming it:")
    for step, value in enumerate(top_eigenvalue(loss, model.parameters(), steps)):
        if step % 5 == 4:
            print(f"  step {step + 1:2}: {value:.3f}")
    print("Along its eigenvector the loss bends most: there plain gradient descent overshoots more at each\n"
          f"step if the learning rate is above 2 / {value:.2f} = {2 / value:.3f}.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
