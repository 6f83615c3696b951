"""The verse is what its grammar says, parses in one way, and has the entropy rate that is claimed."""

import re
import time
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.verse import GRAMMAR, entropy_rate, verse

CLASSES = {symbol: words for symbol, words in GRAMMAR.items() if symbol not in ("speech", "line", "stop")}
CLASS_OF = {word: symbol for symbol, words in CLASSES.items() for word in words}


def probability(symbol, option):
    """By the grammar's rule: the r-th of n options has weight n - r."""
    n = len(GRAMMAR[symbol])
    return (n - GRAMMAR[symbol].index(option)) / (n * (n + 1) / 2)


def parse_line(line):
    """The draws behind a line, read from its words alone, as (symbol, option) pairs."""
    body = line.rstrip(",.;!:?")
    option = re.sub(r"\w+", lambda word: f"{{{CLASS_OF[word[0]]}}}" if word[0] in CLASS_OF else word[0], body)
    words = [(CLASS_OF[word], word) for word in re.findall(r"\w+", body) if word in CLASS_OF]
    return [("line", option), *words, ("stop", line[len(body) :])]


def parse_speech(speech):
    head, *lines = speech.split("\n")
    assert head.endswith(":")
    draws = [("speech", "{speaker}:\n" + "{line}{stop}\n" * len(lines) + "\n"), ("speaker", head[:-1])]
    return draws + [draw for line in lines for draw in parse_line(line)]


def test_uniquely_decodable():
    words = [word for options in CLASSES.values() for word in options]
    assert len(words) == len(set(words)), "a word in two classes, or twice in one"
    assert all(re.fullmatch("[A-Za-z]+", word) for word in words), "a word that holds a separator"
    literals = {word for line in GRAMMAR["line"] for word in re.findall(r"\w+", re.sub(r"{\w+}", "", line))}
    assert not literals & set(words), "a literal that could have been drawn"
    for symbol in ("speech", "line", "stop"):
        assert len(set(GRAMMAR[symbol])) == len(GRAMMAR[symbol]), "an option twice"
    for option in GRAMMAR["speech"]:
        assert re.fullmatch(r"{speaker}:\n({line}{stop}\n)+\n", option), "a blank line before the end"
    for option in GRAMMAR["line"]:
        assert re.fullmatch(r"({\w+}|\w+)(,? ({\w+}|\w+))*", option), "words that touch, or a stop at the end"
    assert all(re.fullmatch("[,.;!:?]?", stop) for stop in GRAMMAR["stop"])


@pytest.mark.parametrize("seed", [1337, 0, 1])
def test_entropy_rate_is_the_loss_of_the_generator_itself(seed):
    *speeches, _ = verse(1_100_000, seed).split("\n\n")
    loss = np.array([-sum(log(probability(*draw)) for draw in parse_speech(speech)) for speech in speeches])
    length = np.array([len(speech) + 2 for speech in speeches])
    rate = loss.sum() / length.sum()
    # the standard error of a ratio of means
    error = np.std(loss - rate * length) / length.mean() / sqrt(len(speeches))
    assert error < 0.001
    assert abs(rate - entropy_rate()) < 4 * error


def test_entropy_rate_is_worth_learning():
    assert 0.6 < entropy_rate() < 1.2


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 2**32))
def test_so_many_characters_and_a_prefix_of_more(short, more, seed):
    text = verse(short, seed)
    assert len(text) == short
    assert verse(short + more, seed).startswith(text)


def test_seeds_differ_and_repeat():
    assert verse(1000) == verse(1000, 1337) != verse(1000, 1)


def test_the_text_itself():
    assert verse(60) == "OSWIN:\nThough merry night knows green mother:\nMy narrow gard"


def test_a_megabyte_is_quick():
    started = time.perf_counter()
    verse(1_115_394)
    assert time.perf_counter() - started < 5  # 0.4 s on an idle machine
