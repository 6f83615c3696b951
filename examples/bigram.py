"""The lecture's baseline: a table of logits, one row for each character, trained to predict the next one.

A character's row is all the model knows, so the best it can do is the statistics of pairs: about 2.49 nats.
"""
import sys

import minitensor as mt
from gpt.cli import Parser, run
from gpt.data import batch, check_length, find_text, split, windows
from gpt.tokenizer import CharTokenizer
from minitensor import nn

STEPS, BATCH, CONTEXT, LR, SEED = 5000, 32, 8, 1e-2, 0


def validate(model, ids):
    """The mean loss over all of ids, in nats a character."""
    with mt.no_grad():
        losses = [mt.cross_entropy(model(x), y, reduction="sum").item()
                  for x, y in windows(ids, CONTEXT, 1024)]
    return sum(losses) / (len(ids) - 1)


def sample(model, start, count, generator):
    """count characters after start, each drawn from the row of the one before."""
    ids = [start]
    for _ in range(count):
        with mt.no_grad():
            probabilities = mt.softmax(model.weight[ids[-1]]).numpy()
        ids.append(generator.choice(len(probabilities), p=probabilities / probabilities.sum()))
    return ids[1:]


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", type=int, nargs="?", default=STEPS, help="steps of training (%(default)s)")
    steps = parser.parse_args(arguments).steps
    text = find_text()
    tokenizer = CharTokenizer.from_text(text.text)
    train, validation = split(tokenizer.encode(text.text))
    check_length(train, validation, CONTEXT)
    mt.seed(SEED)
    model = nn.Embedding(len(tokenizer), len(tokenizer))               # ids (B, T) -> logits (B, T, V)
    optimizer = mt.optim.AdamW(model.parameters(), LR)
    for step in range(steps):
        x, y = batch(train, BATCH, CONTEXT, SEED, step)
        loss = mt.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 1000 == 0:
            print(f"step {step:5}: loss {loss.item():.3f}")
    print(f"validation loss {validate(model, validation):.3f} nats a character on {text.name}\n")
    print(tokenizer.decode(sample(model, 0, 300, mt.random.generator())))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
