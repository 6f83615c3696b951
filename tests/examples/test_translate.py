"""Numbers in words, against a way back that was written apart; the encoder-decoder, and a short training."""
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minitensor as mt
from examples import translate
from gpt.cli import BAD_INPUT, run

VALUES = dict(zip(
    ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
     "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety").split(),
    [*range(20), *range(20, 100, 10)], strict=True))


def number(words):
    """The way back: what a listener adds up."""
    total = group = 0
    for word in words:
        if word == "thousand":
            total, group = 1000 * group, 0
        elif word == "hundred":
            group *= 100
        elif word != "and":
            group += VALUES[word]
    return total + group


@given(n=st.integers(0, 999_999))
@example(n=777_777)
def test_words_mean_their_number(n):
    words = translate.in_words(n)
    assert number(words) == n and len(words) <= translate.LONGEST
    assert set(words) <= set(translate.WORDS)


@pytest.mark.parametrize(("n", "words"), [
    (0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety nine"), (100, "one hundred"),
    (207, "two hundred and seven"), (1000, "one thousand"), (1066, "one thousand and sixty six"),
    (1100, "one thousand one hundred"), (342_006, "three hundred and forty two thousand and six"),
    (999_999, "nine hundred and ninety nine thousand nine hundred and ninety nine")])
def test_words_as_they_are_said(n, words):
    assert " ".join(translate.in_words(n)) == words


@given(numbers=st.lists(st.integers(0, 999_999), min_size=1, max_size=5))
def test_encoding(numbers):
    words = translate.encode_words(numbers)
    given, wanted = translate.encode_digits(numbers)
    assert given.shape == wanted.shape
    for n, w, g, y in zip(numbers, words, given, wanted, strict=True):
        assert [translate.WORDS[i] for i in w[w >= 0]] == translate.in_words(n)
        assert "".join(map(str, y[(y >= 0) & (y != translate.END)])) == str(n)
        assert g[0] == translate.END and list(g[1:][g[1:] >= 0]) == list(y[y >= 0][:-1])
        assert y[y >= 0][-1] == translate.END


def test_training_never_meets_what_is_held_out():
    random = np.random.default_rng(0)
    train, test = (translate.draw(random, 500, held_out) for held_out in (False, True))
    assert not {n for n in train if translate.is_held_out(n)}
    assert all(map(translate.is_held_out, test)) and len(train) == len(test) == 500
    assert {len(str(n)) for n in train} == {len(str(n)) for n in test} == set(range(1, 7))


@pytest.fixture
def model():
    mt.seed(1)
    return translate.Translator()


def test_padding_changes_nothing(model):
    """A number alone, beside longer ones, or with padding of its own: the same logits."""
    (given, _), alone = translate.encode_digits([42]), translate.encode_words([42])
    together = translate.encode_words([42, 777_777])
    more = np.pad(alone, ((0, 0), (0, 5)), constant_values=translate.PADDING)
    logits = model(alone, given).numpy()
    for words in (together[:1], more):
        np.testing.assert_allclose(model(words, given).numpy(), logits, atol=1e-5)
    other = model(translate.encode_words([43]), given).numpy()
    assert np.abs(other - logits).max() > 1e-3


def test_a_digit_sees_those_before_it_and_all_words(model):
    words, given = translate.encode_words([123_456]), translate.encode_digits([123_456])[0]
    logits, changed = model(words, given).numpy(), given.copy()
    changed[0, 4:] = 0
    new = model(words, changed).numpy()
    np.testing.assert_array_equal(new[:, :4], logits[:, :4])
    assert (new[:, 4:] != logits[:, 4:]).any()
    for i in range(words.shape[1]):
        other = words.copy()
        other[0, i] = (other[0, i] + 1) % len(translate.WORDS)
        assert (model(other, given).numpy()[:, 0] != logits[:, 0]).any()


def test_every_parameter_has_a_gradient(model):
    numbers = [0, 13, 342_006, 999_999]
    given, wanted = translate.encode_digits(numbers)
    mt.cross_entropy(model(translate.encode_words(numbers), given), wanted,
                     ignore_index=translate.PADDING).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad.data.any(), path


def test_greedy_digits_are_the_likeliest_of_the_whole_model(model):
    words = translate.encode_words([5, 342_006, 70])
    for row, digits in enumerate(translate.translate(model, words)):
        ids = [translate.END, *map(int, digits)]
        logits = model(words[row:row + 1], np.array([ids[:translate.DIGITS + 1]])).numpy()[0]
        expected = [*ids[1:], translate.END][:len(logits)]
        assert list(logits.argmax(axis=1)) == expected


def test_learns(model, monkeypatch):
    """Most numbers of two digits that are held out, after a second or two of the others."""
    monkeypatch.setattr(translate, "DIGITS", 2)
    lines = []
    translate.train(model, 60, 0, lines.append)
    numbers = [n for n in range(100) if translate.is_held_out(n)]                # 14 of them
    results = translate.translate(model, translate.encode_words(numbers))
    assert np.mean([r == str(n) for r, n in zip(results, numbers, strict=True)]) > 0.6, results
    assert lines[-1].startswith("step    60: loss ")


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(translate, "BATCH", 4)
    assert run(translate.main, ["--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "parameters, 2 steps of 4 numbers" in printed and "held-out numbers are exactly right" in printed
    assert run(translate.main, ["--steps", "0"]) == BAD_INPUT
