"""The lecture's baseline: a table of logits, one row for each character, trained to predict the next one.

A character's row is all the model knows, so the best it can do is the statistics of pairs: about 2.49 nats.
"""
import sys

import minitensor as mt
from gpt.data import batch, find_text, split, windows
from gpt.tokenizer import CharTokenizer
from minitensor import nn

STEPS, BATCH, CONTEXT, LR, SEED = 5000, 32, 8, 1e-2, 1337


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


def main(steps=STEPS):
    text = find_text()
    tokenizer = CharTokenizer.from_text(text.text)
    train, validation = split(tokenizer.encode(text.text))
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
    loss = validate(model, validation)
    print(f"validation loss {loss:.3f} nats a character on {text.name}\n")
    print(tokenizer.decode(sample(model, 0, 300, mt.random.generator())))
    return loss


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
