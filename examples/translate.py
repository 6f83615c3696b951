"""An encoder and a decoder: written-out numbers into digits, "forty two thousand and six" -> "42006".

    python examples/translate.py

The encoder reads all words at once, in both directions; the decoder writes a digit after the other, sees
those that it has written, and asks the encoder's vectors by cross-attention. Sentences have different
lengths, so words are padded and masked. A seventh of all numbers is held out, and tells how well it works.
Source: Vaswani et al. 2017, with the norms before the layers.
"""
import sys
import time

import numpy as np

import minitensor as mt
from gpt.cli import Parser, run
from minitensor import nn
from minitensor.optim import warmup_cosine

STEPS, BATCH, LR, SEED = 1000, 64, 2e-3, 0
WIDTH, HEADS, LAYERS = 64, 4, 2
DIGITS = 6                                           # of the longest number
PADDING, END = -1, 10                                # END starts a number as well

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = [*UNITS, *TENS, "hundred", "thousand", "and"]
LONGEST = 13                                         # words: seven hundred and seventy seven thousand ...


# ---- numbers as words --------------------------------------------------------------------------------------

def in_words(n):
    """The words of 0 <= n < 1,000,000, as they are said in Britain."""
    if n >= 1000:
        return [*in_words(n // 1000), "thousand", *_rest(n % 1000, "and" if n % 1000 < 100 else None)]
    if n >= 100:
        return [UNITS[n // 100], "hundred", *_rest(n % 100, "and")]
    if n >= 20:
        return [TENS[n // 10 - 2], *_rest(n % 10, None)]
    return [UNITS[n]]


def _rest(n, joint):
    return [] if n == 0 else in_words(n) if joint is None else [joint, *in_words(n)]


def is_held_out(n):
    """Whether n is for testing: a seventh of all numbers, whose digits say nothing about it."""
    return n % 7 == 3


def draw(random, count, held_out):
    """Random numbers: 1 to 6 digits equally often, so that short ones are not rare."""
    numbers = []
    while len(numbers) < count:
        n = int(random.integers(10 ** random.integers(1, DIGITS + 1)))
        if is_held_out(n) == held_out:
            numbers.append(n)
    return numbers


def encode_words(numbers):
    """Ids of the words (B, S), PADDING behind them."""
    return padded([[WORDS.index(word) for word in in_words(n)] for n in numbers])


def encode_digits(numbers):
    """What the decoder is given, END and the digits, and what it is to say, digits and END: both (B, T)."""
    digits = [[int(d) for d in str(n)] for n in numbers]
    return padded([[END, *d] for d in digits]), padded([[*d, END] for d in digits])


def padded(rows):
    """Rows of different lengths as one array."""
    ids = np.full((len(rows), max(map(len, rows))), PADDING)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
    return ids


# ---- the model ---------------------------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Tokens of one sequence among themselves."""

    def __init__(self, causal):
        self.causal = causal
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        return self.projection(mt.attention(self.qkv(x), HEADS, causal=self.causal, mask=mask))


class CrossAttention(nn.Module):
    """Queries from x (B, T, C), keys and values from the words (B, S, C) that the mask (B, S) lets see."""

    def __init__(self):
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, words, mask):
        return self.projection(mt.cross_attention(self.q(x), self.kv(words), HEADS, mask=mask))


class MLP(nn.Module):
    """Each token on its own."""

    def __init__(self):
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(self.up(x, activation="gelu"))


class EncoderBlock(nn.Module):
    """Words look at words, ahead and back."""

    def __init__(self):
        self.norm1, self.attention = nn.LayerNorm(WIDTH), SelfAttention(causal=False)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Digits look at digits before them, then at the words."""

    def __init__(self):
        self.norm1, self.attention = nn.LayerNorm(WIDTH), SelfAttention(causal=True)
        self.norm2, self.cross_attention = nn.LayerNorm(WIDTH), CrossAttention()
        self.norm3, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x, words, mask):
        x = x + self.attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), words, mask)
        return x + self.mlp(self.norm3(x))


class Encoder(nn.Module):
    """Ids of words (B, S) -> vectors (B, S, C)."""

    def __init__(self):
        self.words, self.positions = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = [EncoderBlock() for _ in range(LAYERS)]
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids):
        mask = ids != PADDING
        x = self.words(np.where(mask, ids, 0)) + self.positions(np.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Decoder(nn.Module):
    """Digits so far (B, T), the encoder's vectors (B, S, C), which to see (B, S) -> logits (B, T, 11)."""

    def __init__(self):
        self.digits, self.positions = nn.Embedding(END + 1, WIDTH), nn.Embedding(DIGITS + 1, WIDTH)
        self.blocks = [DecoderBlock() for _ in range(LAYERS)]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, END + 1)

    def forward(self, ids, words, mask):
        ids = np.where(ids == PADDING, END, ids)                 # what comes of them is not counted
        x = self.digits(ids) + self.positions(np.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, words, mask)
        return self.head(self.norm(x))


class Translator(nn.Module):
    """Ids of words (B, S) and of the digits so far (B, T) -> logits of the next digits (B, T, 11)."""

    def __init__(self):
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, words, digits):
        return self.decoder(digits, self.encoder(words), words != PADDING)


# ---- training, and writing what is likeliest ---------------------------------------------------------------

def train(model, steps, seed, report=print):
    """Train on numbers that are not held out; report gets a line now and then."""
    random = np.random.default_rng(seed)
    optimizer = mt.optim.AdamW(model.parameters(), LR, max_norm=1.0)
    start, tokens = time.perf_counter(), 0
    for step in range(steps):
        numbers = draw(random, BATCH, held_out=False)
        words, (given, wanted) = encode_words(numbers), encode_digits(numbers)
        loss = mt.cross_entropy(model(words, given), wanted, ignore_index=PADDING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.lr = warmup_cosine(step, steps, min(100, steps // 10), LR, LR / 100)
        optimizer.step()
        tokens += np.count_nonzero(words != PADDING) + np.count_nonzero(wanted != PADDING)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            report(f"step {step + 1:5}: loss {loss.item():.4f}, {tokens:,} tokens, "
                   f"{time.perf_counter() - start:.0f} s")


def translate(model, words):
    """The digits of each row of words (B, S), as strings: always the likeliest next, until END."""
    mask = words != PADDING
    digits = np.full((len(words), 1), END)
    with mt.no_grad():
        vectors = model.encoder(words)
        for _ in range(DIGITS + 1):
            following = model.decoder(digits, vectors, mask)[:, -1].argmax(axis=1)
            ended = (digits[:, 1:] == END).any(axis=1)
            digits = np.column_stack([digits, np.where(ended, END, following)])
            if (digits[:, -1] == END).all():
                break
    return ["".join(str(d) for d in row if d != END) for row in digits]


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, metavar="N", help="steps of training (%(default)s)")
    add("--seed", type=int, default=SEED, metavar="N", help="of weights and batches (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seed < 0:
        parser.error(f"--steps is {options.steps}, --seed {options.seed}; give at least 1 and at least 0")
    mt.seed(options.seed)
    model = Translator()
    print(f"{sum(p.size for p in model.parameters()):,} parameters, {options.steps} steps of {BATCH} numbers")
    train(model, options.steps, options.seed)
    numbers = list(dict.fromkeys(draw(np.random.default_rng([options.seed, 1]), 3000, held_out=True)))
    results = translate(model, encode_words(numbers))
    wrong = [i for i, n in enumerate(numbers) if results[i] != str(n)]
    print(f"\n{1 - len(wrong) / len(numbers):.2%} of {len(numbers):,} held-out numbers are exactly right")
    for i in [*range(5), *wrong[:10]]:
        print(f"    {' '.join(in_words(numbers[i]))} -> {results[i]}"
              + (f", but it is {numbers[i]}" if i in wrong else ""))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
