"""What tracing costs: off, in a training step and in a single op; on, for a GPT of the default size.

    python tests/benchmarks/tracing.py                      a table
    python tests/benchmarks/tracing.py --rounds 200         of more steps

Off, each op still notes its line and its modules. That is compared with the same engine without the notes, in
turn in one process; the ratio is of medians. The noise is the same comparison of the engine with itself.
"""
import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).parents[2])
import minitensor as mt  # noqa: E402
from gpt.config import Config  # noqa: E402
from gpt.model import GPT  # noqa: E402
from minitensor import nn, tensor  # noqa: E402


@contextlib.contextmanager
def without_notes():
    """The engine as it would be if nodes knew no line and no module, and nobody could watch."""
    node, module = tensor.Node.__init__, nn.Module.__call__

    def plain(self, op, inputs, options, vjp):
        self.op, self.inputs, self.options, self.vjp = op, inputs, options, vjp
        self.serial = next(tensor._serial)

    tensor.Node.__init__, nn.Module.__call__ = plain, lambda self, *inputs, **options: self.forward(
        *inputs, **options)
    try:
        yield
    finally:
        tensor.Node.__init__, nn.Module.__call__ = node, module


def step(config: Config) -> Callable[[], None]:
    """Forward and backward of a GPT on one batch."""
    model = GPT(config, 65)
    ids = np.random.default_rng(0).integers(0, 65, (2, config.batch, config.context))

    def run() -> None:
        mt.cross_entropy(model(ids[0]), ids[1]).backward()
        model.zero_grad()
    return run


def compare(run: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Seconds with the notes, without them, and with them again: medians, all three in turn."""
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for side, context in enumerate((contextlib.nullcontext, without_notes, contextlib.nullcontext)):
            with context():
                start = time.perf_counter()
                run()
                times[side].append(time.perf_counter() - start)
    return tuple(statistics.median(side) for side in times)          # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    mt.seed(0)

    x = mt.Tensor(1.0, requires_grad=True)

    def ops() -> None:
        for _ in range(1000):
            x * x
    tiny = Config(layers=2, heads=2, width=16, context=8, batch=2)
    print(f"{'off':<44}{'with notes':>14}{'without':>14}{'ratio':>8}{'noise':>8}")
    for name, run, repeated in (("one op of scalars", ops, 1000), ("step of a tiny GPT", step(tiny), 1),
                                ("step of a GPT of the default size", step(Config()), 1)):
        run()
        a, b, again = compare(run, rounds)
        print(f"{name:<44}{1e6 * a / repeated:>11.2f} us{1e6 * b / repeated:>11.2f} us"
              f"{a / b:>8.3f}{again / a:>8.3f}")

    print(f"\n{'on, a GPT of the default size':<44}{'backward':>14}{'trace':>14}{'steps':>8}{'page':>12}")
    config = Config()
    model = GPT(config, 65)
    ids = np.random.default_rng(0).integers(0, 65, (2, config.batch, config.context))
    for name, context in (("fused", contextlib.nullcontext), ("unfused", mt.unfused)):
        seconds: dict[str, list[float]] = {"backward": [], "trace": []}
        for _ in range(5):
            for what, times in seconds.items():
                with context():
                    loss = mt.cross_entropy(model(ids[0]), ids[1])
                    start = time.perf_counter()
                    result = mt.trace(loss) if what == "trace" else loss.backward()
                    times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            result.to_html(page := Path(folder) / "backward.html")       # type: ignore[union-attr]
            size = page.stat().st_size
        print(f"{name:<44}" + "".join(f"{1e3 * statistics.median(t):>11.1f} ms" for t in seconds.values())
              + f"{len(result):>8}{size / 1e6:>9.2f} MB")                # type: ignore[arg-type]


if __name__ == "__main__":
    main()
