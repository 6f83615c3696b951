"""Text from a trained model.

    python examples/sample.py --prompt "ROMEO:" --temperature 0.8 --top-k 20
    python examples/sample.py out/shakespeare/best.safetensors --top-p 0.9 --stream
"""
import sys
from pathlib import Path

from gpt.checkpoint import load_model
from gpt.cli import Parser, interruptible, run
from gpt.generate import first_ids, generate


def main(arguments: list[str] | None) -> int:
    parser = Parser(description="Write text with a model that train_shakespeare.py has trained.")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=Path("out/shakespeare/checkpoint.safetensors"),
        help="a run's folder, or a checkpoint in it (%(default)s)")
    add("--prompt", help="text to go on from (a new line)")
    add("--count", type=int, default=500, metavar="N", help="characters to write (500)")
    add("--temperature", type=float, default=1.0, metavar="X",
        help="below 1 more likely text, above 1 wilder, 0 always the likeliest (1)")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest characters (all)")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest whose share is P together (all)")
    add("--seed", type=int, default=0, metavar="N", help="another seed, another text (0)")
    add("--stream", action="store_true", help="show each character as soon as it is there")
    options = parser.parse_args(arguments)
    if options.prompt == "":
        parser.error("--prompt is empty; give at least one character")
    model, tokenizer = load_model(options.checkpoint)
    start = first_ids(tokenizer) if options.prompt is None else tokenizer.encode(options.prompt)
    shown: list[int] = []
    with interruptible() as check:
        def show(token: int) -> None:
            check()
            if options.stream:
                new = [token] if shown else [*start, token]
                print(tokenizer.decode(new), end="", flush=True)
                shown.extend(new)

        ids = generate(model, start, options.count, options.temperature, options.top_k, options.seed, show,
                       options.top_p)
    print(tokenizer.decode(ids[len(shown):]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
