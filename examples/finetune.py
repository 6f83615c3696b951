"""Fine-tune a trained model on a text of your own, and see what it learned.

    python examples/train_shakespeare.py                pre-training: letters, words, verse
    python examples/finetune.py my.txt                  fine-tuning: the same weights go on with your text

Weights and vocabulary are the trained model's (characters that it does not know are left out, and counted);
the optimizer is fresh, and its steps are a fifth as long, so that what was learned is bent and not lost.
"""
import sys
from pathlib import Path

from gpt import command
from gpt.checkpoint import load_model
from gpt.cli import Parser, run
from gpt.corpus import open_corpus
from gpt.data import check_length
from gpt.generate import first_ids, generate
from gpt.train import evaluate


def main(arguments: list[str] | None) -> int:
    parser = Parser(description="Go on training a model on a text of your own.")
    add = parser.add_argument
    add("text", nargs="+", metavar="PATH", help="your text, in UTF-8: files, folders of .txt files, globs")
    add("--checkpoint", type=Path, default=Path("out/shakespeare/best.safetensors"), metavar="FILE",
        help="the trained model (%(default)s)")
    add("--steps", type=int, default=200, metavar="N", help="steps of training (200)")
    add("--out", type=Path, default=Path("out/tuned"), metavar="FOLDER", help="results go here (%(default)s)")
    options = parser.parse_args(arguments)

    before, tokenizer = load_model(options.checkpoint)
    corpus = open_corpus(options.text, tokenizer)
    check_length(corpus.train, corpus.validation, before.config.context)
    config, steps = before.config, options.steps
    code = command.main(["--init-from", str(options.checkpoint), "--data", *options.text,
                         "--out", str(options.out), "--steps", str(steps), "--warmup", str(steps // 10),
                         "--lr", str(config.lr / 5), "--muon-lr", str(config.muon_lr / 5), "--min-lr", "0",
                         "--eval-every", str(max(1, steps // 4)), "--sample", "0"])
    if code:
        return code
    after, _ = load_model(options.out / "best.safetensors")
    for name, model in (("before", before), ("after", after)):
        loss = evaluate(model, corpus.validation)
        text = tokenizer.decode(generate(model, first_ids(tokenizer), 200))
        print(f"\n---- {name}: {loss:.4f} nats/character on your validation split\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
