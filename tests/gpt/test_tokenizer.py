"""Encoding and decoding are inverses, and whatever has no number is named."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import BadInput
from gpt.tokenizer import CharTokenizer

texts = st.text(min_size=1)  # no surrogates: what UTF-8 can hold


@given(texts)
def test_decode_undoes_encode(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert sorted(set(ids.tolist())) == list(range(len(tokenizer)))


@given(texts)
def test_ids_are_places_in_the_sorted_vocabulary(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocabulary == "".join(sorted(set(text)))
    assert tokenizer.encode(text).tolist() == [tokenizer.vocabulary.index(c) for c in text]


@given(texts)
def test_json_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    assert CharTokenizer.from_json(tokenizer.to_json()).vocabulary == tokenizer.vocabulary
    assert "\n" not in tokenizer.to_json()


def test_nothing_to_encode_or_decode():
    tokenizer = CharTokenizer("ab")
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode([]) == ""


@given(st.characters(), st.integers(0, 5))
def test_unknown_character_is_named(character, position):
    tokenizer = CharTokenizer("xyz")
    text = "x" * position + character + "y"
    if character in "xyz":
        return
    with pytest.raises(BadInput) as caught:
        tokenizer.encode(text)
    message = str(caught.value)
    assert repr(character) in message and f"U+{ord(character):04X}" in message
    assert f"position {position} " in message and "'xyz'" in message and "\n" not in message


def test_half_a_surrogate_pair_is_an_unknown_character():
    with pytest.raises(BadInput, match=r"U\+D800"):
        CharTokenizer("ab").encode("a\ud800")


@pytest.mark.parametrize("ids", [[0, 3], [-1], np.array([2**40]), np.array([2**63], np.uint64)])
def test_id_out_of_range_is_named(ids):
    with pytest.raises(BadInput, match=rf"id {ids[-1]} at position {len(ids) - 1} .* 0 to 2"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize("ids", [[0.5], [[0, 1]], ["a"], 1])
def test_ids_that_are_not_a_row_of_integers(ids):
    with pytest.raises(BadInput, match=r"integers of shape \(N,\)"):
        CharTokenizer("abc").decode(ids)


@pytest.mark.parametrize("vocabulary", ["", "ba", "aab", "a\ud800"])
def test_bad_vocabulary(vocabulary):
    with pytest.raises(BadInput, match="vocabulary"):
        CharTokenizer(vocabulary)


@pytest.mark.parametrize(
    "line", ["", "{", "[" * 100_000, "[]", "3", "{}", '{"vocabulary": 3}', '{"vocabulary": "ba"}', "null"]
)
def test_malformed_json(line, tmp_path):
    with pytest.raises(BadInput):
        CharTokenizer.from_json(line)
    file = tmp_path / "tokenizer.json"
    file.write_text(line)
    with pytest.raises(BadInput, match=r"tokenizer\.json") as caught:
        CharTokenizer.load(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_save_and_load(tmp_path):
    file = tmp_path / "tokenizer.json"
    CharTokenizer("\n aé→😀").save(file)
    assert CharTokenizer.load(file).vocabulary == "\n aé→😀"
    with pytest.raises(BadInput, match="no such file"):
        CharTokenizer.load(tmp_path / "absent")
    with pytest.raises(BadInput, match="cannot write"):
        CharTokenizer("ab").save(file / "below a file")


def test_a_megabyte_is_quick():
    text = "the quick brown fox jumps over the lazy dog\n" * 25_000
    tokenizer = CharTokenizer.from_text(text)
    started = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - started < 1


def test_shakespeare():
    named = Path(os.environ.get("MINITENSOR_DATA") or Path(__file__).parents[3] / "shared" / "data")
    file = named / "tinyshakespeare.txt" if named.is_dir() else named
    if not file.is_file():
        pytest.skip(f"tinyshakespeare is not at {file}; $MINITENSOR_DATA names it")
    tokenizer = CharTokenizer.from_text(file.read_bytes().decode())
    assert len(tokenizer) == 65
    assert tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]
