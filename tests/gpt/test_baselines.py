"""The tables of counts, beside their definition spelt out."""
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import baselines as module
from gpt.baselines import baselines
from gpt.data import find_text, split
from gpt.tokenizer import CharTokenizer

tokens = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(lambda ids: np.array(ids, np.int32))


@given(tokens, tokens, st.integers(5, 8), st.integers(1, 7))
def test_each_is_its_definition(train, validation, V, piece):
    """Whatever the size of the pieces in which is counted."""
    singles = Counter(train.tolist())
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    firsts = Counter(train[:-1].tolist())
    targets = list(zip(validation[:-1].tolist(), validation[1:].tolist(), strict=True))
    expected = {
        "uniform": math.log(V),
        "unigram": -np.mean([math.log((singles[b] + 1) / (len(train) + V)) for _, b in targets]),
        "bigram": -np.mean([math.log((pairs[a, b] + 1) / (firsts[a] + V)) for a, b in targets]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        assert baselines(train, validation, V) == pytest.approx(expected, rel=1e-12)


def test_a_bigram_table_that_would_be_too_large_is_left_out():
    ids = np.zeros(10, np.int32)
    assert baselines(ids, ids, 2**13 + 1).keys() == {"uniform", "unigram"}


def test_of_shakespeare():
    """The bigram's is what the lecture's bigram model comes near to."""
    text = find_text(download=False)
    if text.name != "tinyshakespeare":
        pytest.skip("the text is not here; $MINITENSOR_DATA names it")
    tokenizer = CharTokenizer.from_text(text.text)
    found = baselines(*split(tokenizer.encode(text.text)), len(tokenizer))
    assert found["uniform"] == pytest.approx(math.log(65))
    assert 3.2 < found["unigram"] < 3.4 and 2.4 < found["bigram"] < 2.5
