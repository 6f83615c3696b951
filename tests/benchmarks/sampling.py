"""A token of text, timed: with the cache, without, and in PyTorch with a cache on the same weights.

    python tests/benchmarks/sampling.py --config context256 lecture --repeats 5

Prints a JSON line for each config: milliseconds a token over a context from empty to full, medians of the
repeats, in which the three sides run in turn. The likeliest token is taken, so all sides write the same text;
PyTorch's is the peer of tests/gpt/torch_peer.py under inference_mode, with keys and values in place.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).parents[2])          # `kernels` is the package, not the file beside this one
import minitensor as mt  # noqa: E402
from gpt.config import Config  # noqa: E402
from gpt.generate import generate  # noqa: E402
from gpt.model import GPT  # noqa: E402

CONFIGS = {
    "context256": Config(context=256),
    "lecture": Config(layers=6, heads=6, width=384, context=256),
}


def torch_writer(model: GPT, vocabulary: int):
    """A function of the number of tokens that writes them in PyTorch, after token 0."""
    import torch

    from tests.gpt import torch_peer
    F, config = torch.nn.functional, model.config
    peer = torch_peer.build(config, vocabulary).eval()
    torch_peer.load(peer, model.state_dict())
    shape = (1, config.heads, config.context, config.width // config.heads)

    def write(count: int) -> np.ndarray:
        keys, values = ([torch.empty(shape) for _ in range(config.layers)] for _ in range(2))
        tokens = [0]
        with torch.inference_mode():
            for n in range(count):
                x = peer.tokens.weight[tokens[-1]][None, None] + peer.positions[n]
                for block, k, v in zip(peer.blocks, keys, values, strict=True):
                    qkv = block.attention.qkv(block.norm1(x)).view(1, 3, config.heads, 1, -1)
                    q, k[:, :, n:n + 1], v[:, :, n:n + 1] = qkv.unbind(1)
                    y = F.scaled_dot_product_attention(q, k[:, :, :n + 1], v[:, :, :n + 1])
                    x = x + block.attention.projection(y.reshape(1, 1, -1))
                    x = x + block.mlp(block.norm2(x))
                tokens.append(int(peer.head(peer.norm(x)).argmax()))
        return np.array(tokens)
    return write


def measure(name: str, repeats: int) -> dict:
    """Milliseconds a token of each side, and the ratios."""
    config, vocabulary = CONFIGS[name], 65
    mt.seed(0)
    model, start, count = GPT(config, vocabulary), np.zeros(1, np.int32), config.context
    write = torch_writer(model, vocabulary)
    sides = {
        "cached": lambda: generate(model, start, count, temperature=0),
        "anew": lambda: generate(model, start, count, temperature=0, cache=False),
        "torch cached": lambda: write(count),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    texts = {side: run() for side, run in sides.items()}                                # and a warm-up
    for _ in range(repeats):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            times[side].append((time.perf_counter() - started) / count * 1e3)
    ms = {side: statistics.median(values) for side, values in times.items()}
    agree = {side: int((texts[side] == texts["cached"]).sum()) for side in sides}
    return dict(config=name, ms_a_token={side: round(value, 3) for side, value in ms.items()},
                without_cache_over_with=round(ms["anew"] / ms["cached"], 2),
                torch_over_ours=round(ms["torch cached"] / ms["cached"], 2),
                tokens_alike_of=[agree["anew"], agree["torch cached"], count + 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a token.")
    parser.add_argument("--config", nargs="+", default=["context256"], choices=CONFIGS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name in options.config:
        print(json.dumps(measure(name, options.repeats)), flush=True)
