"""Play-shaped verse from a small grammar, for a day with no network: its entropy rate is known exactly.

Every symbol of the grammar lists what it may turn into, likeliest first: the r-th of n options (r from 0)
has weight n - r. A name in braces stands for a symbol, drawn anew each time; a text is speech after speech.
"""

import re
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from math import log

import numpy as np

_DETERMINERS = "the my thy our her his this that each your no one some".split()

GRAMMAR: dict[str, list[str]] = {
    "speech": ["{speaker}:\n" + "{line}{stop}\n" * lines + "\n" for lines in (3, 2, 4, 1, 5, 6)],
    "speaker": """MARLA OSWIN BRENNA TOLLER YSOLT HARBIN CORWEN DELIA PERRIN WENNA GARRICK LUNE FENWICK ADELA
        MILLER FERRYMAN SEXTON WIDOW TINKER PILGRIM""".split(),
    "line": [
        "{Determiner} {adjective} {noun} {verb} {determiner} {noun}",
        "{Opening} {determiner} {noun} {verb} {determiner} {adjective} {noun}",
        "{Determiner} {noun} {verb} {determiner} {noun} {preposition} {determiner} {noun}",
        "{Opening} {preposition} {determiner} {noun} {determiner} {noun} {verb} {noun}",
        "{Determiner} {noun} {verb} and {verb} {determiner} {adjective} {noun}",
        "{Opening} {adjective} {noun} {verb} {adjective} {noun}",
        "O {adjective} {noun}, {adjective} as {determiner} {noun}",
    ],
    "stop": [",", ".", "", ";", "!", ":", "?"],
    "Determiner": [word.capitalize() for word in _DETERMINERS],
    "determiner": _DETERMINERS,
    "Opening": "And But When Yet So Now If Then How Where Once Still Though Let Since While".split(),
    "preposition": "in by under upon near past with from beyond over against without beside below".split(),
    "adjective": """old cold pale dark sweet wild still green lost quiet idle bright bitter gentle proud
        slow weary hollow silver golden faithful broken narrow secret humble restless merry distant
        brave grey drowsy kind bold rusty mild crooked honest barren tame lucky""".split(),
    "noun": """moon sea night river stone fire wind bell road winter harbour garden candle king mother
        shadow ship crown rain bird brother door orchard hill morning song lamp wolf valley tower anchor
        meadow stranger hand apple kettle clock field lantern sparrow ribbon mill daughter salt
        plough ember goat window""".split(),
    "verb": """keeps finds loves knows holds calls breaks mends sees leaves hears follows hides fears
        wakes carries burns forgets steals answers guards turns seeks crosses greets buries wounds
        gathers mocks blesses haunts drowns scatters weighs feeds paints""".split(),
}


def _choices(options: list[str]) -> tuple[list[list[str]], list[int]]:
    """Each option as [literal, symbol, literal, ..., literal], and the running sum of the weights."""
    return [re.split(r"{(\w+)}", option) for option in options], list(accumulate(range(len(options), 0, -1)))


_CHOICES = {symbol: _choices(options) for symbol, options in GRAMMAR.items()}


def verse(characters: int, seed: int = 1337) -> str:
    """Return so many characters of verse, the same for the same seed; a longer text begins with a shorter."""
    uniform = _uniform(seed)
    speeches: list[str] = []
    missing = characters
    while missing > 0:
        speeches.append(_draw("speech", uniform))
        missing -= len(speeches[-1])
    return "".join(speeches)[: max(characters, 0)]


def _uniform(seed: int) -> Iterator[float]:
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield from generator.random(4096).tolist()


def _draw(symbol: str, uniform: Iterator[float]) -> str:
    options, cumulative = _CHOICES[symbol]
    parts = options[bisect(cumulative, next(uniform) * cumulative[-1])]
    return "".join([_draw(part, uniform) if i % 2 else part for i, part in enumerate(parts)])


def entropy_rate() -> float:
    """Return the entropy of the verse in nats a character: no model can have a lower expected loss.

    Speeches are independent, identically distributed, and a prefix code (a blank line ends each and occurs
    nowhere else), so by the renewal theorem rate = H(speech) / E[characters of a speech]. A text tells every
    draw behind it: the word classes are disjoint, and no two options of a symbol give the same sequence of
    classes. So H is the entropy of all draws together, and by the chain rule, for a symbol s whose option o,
    of probability p(o), holds the symbols t and the literal characters l(o):

        H(s) = sum_o p(o) (-log p(o) + sum_{t in o} H(t))        E(s) = sum_o p(o) (l(o) + sum_{t in o} E(t))
    """
    entropy, characters = _moments("speech")
    return entropy / characters


@cache
def _moments(symbol: str) -> tuple[float, float]:
    """H(s) in nats and E(s) in characters, as `entropy_rate` defines them."""
    options, cumulative = _CHOICES[symbol]
    entropy = characters = 0.0
    for r, parts in enumerate(options):
        p = (len(options) - r) / cumulative[-1]
        inner = [_moments(part) for part in parts[1::2]]
        entropy += p * (-log(p) + sum(h for h, _ in inner))
        characters += p * (sum(map(len, parts[::2])) + sum(e for _, e in inner))
    return entropy, characters
