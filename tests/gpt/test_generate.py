"""Sampling with kept keys and values is sampling without, past the context too."""
import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.errors import BadInput
from gpt.generate import cached_logits, choose, generate, logits_anew, window_start
from gpt.model import GPT

VOCABULARY = 19
CONFIGS = {
    "plain": Config(layers=2, heads=2, width=32, context=16),
    "bias and dropout": Config(layers=2, heads=4, width=32, context=9, bias=True, dropout=0.5),
    "one head of odd width": Config(layers=1, heads=1, width=7, context=5, bias=True),
    "modern": Config(layers=2, heads=2, width=32, context=16, positions="rotary", qk_norm=True, mlp="relu2"),
    "normalised": Config(layers=1, heads=2, width=16, context=9, qk_norm=True),
    "a context of one": Config(layers=1, heads=1, width=8, context=1),
    "a context of two": Config(layers=1, heads=1, width=8, context=2),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    mt.seed(1)
    model = GPT(CONFIGS[request.param], VOCABULARY)
    for parameter in model.parameters():                       # away from where all logits are near
        parameter.data += 0.3 * mt.random.generator().standard_normal(parameter.shape, np.float32)
    return model


@pytest.mark.parametrize("prompt", [1, 2, 7, 40])
def test_the_cache_changes_no_logit_by_more_than_rounding(model, prompt):
    ids = np.random.default_rng(3).integers(VOCABULARY, size=prompt + 50).astype(np.int32)
    both = list(zip(cached_logits(model, ids, prompt), logits_anew(model, ids, prompt), strict=True))
    assert len(both) == 50
    for cached, anew in both:
        assert cached.shape == (VOCABULARY,) and cached.dtype == np.float32
        np.testing.assert_allclose(cached, anew, rtol=0, atol=1e-5)


def test_the_text_is_the_same_with_and_without(model):
    ids = np.arange(3, dtype=np.int32)
    for options in ({}, {"temperature": 0}, {"top_k": 5, "temperature": 0.8}, {"top_p": 0.7}):
        cached, anew = (generate(model, ids, 60, seed=5, cache=cache, **options) for cache in (True, False))
        np.testing.assert_array_equal(cached, anew)


@pytest.mark.parametrize("context", [1, 2, 5, 16, 256])
def test_the_window_ends_at_the_token_and_lets_half_go_when_full(context):
    starts = [window_start(n, context) for n in range(1, 5 * context + 3)]
    for n, start in enumerate(starts, 1):
        assert max(1, context - max(1, context // 2)) <= n - start <= context or start == 0
    moves = np.diff(starts)
    assert set(moves[moves > 0]) <= {max(1, context // 2)}
    assert starts[context - 1] == 0


def test_the_logits_are_those_of_the_model(model):
    ids = np.random.default_rng(3).integers(VOCABULARY, size=model.config.context).astype(np.int32)
    with mt.no_grad():
        expected = model.eval()(ids[None]).numpy()[0]
    for n, logits in enumerate(cached_logits(model, np.append(ids, 0), 1)):
        np.testing.assert_allclose(logits, expected[n], rtol=0, atol=1e-5)


def test_each_token_is_shown_as_it_comes(model):
    shown = []
    ids = generate(model, np.zeros(1, np.int32), 20, after_token=shown.append)
    assert shown == ids[1:].tolist() and all(type(token) is int for token in shown)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = np.log([0.1, 0.5, 0.15, 0.25])
    uniforms = (np.arange(600) + 0.5) / 600
    for top_p, counts in [(0.3, [0, 600, 0, 0]), (0.5, [0, 600, 0, 0]), (0.6, [0, 400, 0, 200]),
                          (1.0, [60, 300, 90, 150])]:
        draws = [choose(logits, 1.0, None, u, top_p) for u in uniforms]
        np.testing.assert_array_equal(np.bincount(draws, minlength=4), counts)
    draws = [choose(logits, 1.0, 3, u, 0.8) for u in uniforms]             # of the 3, two reach 0.75 / 0.9
    np.testing.assert_array_equal(np.bincount(draws, minlength=4), [0, 400, 0, 200])
    assert choose(logits, 1e-3, None, 0.999, 0.99) == 1
    equal = [choose(np.zeros(4), 1.0, None, u, 0.5) for u in uniforms]
    np.testing.assert_array_equal(np.bincount(equal, minlength=4), [300, 300, 0, 0])


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.5, float("nan")])
def test_a_top_p_that_cannot_be(top_p, model):
    with pytest.raises(BadInput, match="--top-p is"):
        generate(model, np.zeros(1, np.int32), 1, top_p=top_p)
