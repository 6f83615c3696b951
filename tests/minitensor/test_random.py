"""One seed for weights and masks; where it is can be kept and taken up again."""
import json

import numpy as np
import pytest

import minitensor as mt
from minitensor.random import generator, get_state, next_seed, set_state


def draw():
    return [*generator().standard_normal(5).tolist(), next_seed(), generator().integers(2**62), next_seed()]


def test_a_state_is_taken_up_again_also_from_json():
    mt.seed(7)
    draw()
    state = get_state()
    kept = json.dumps(state)
    expected = [draw() for _ in range(3)]
    for again in (state, json.loads(kept)):
        mt.seed(1)
        set_state(again)
        assert [draw() for _ in range(3)] == expected
    assert json.dumps(state) == kept, "a state that was taken does not move"


@pytest.mark.parametrize("change", [
    {"generator": None}, {"generator": {}}, {"seed": "many"}, {"count": None},
    {"generator": {**np.random.PCG64(0).state, "bit_generator": "MT19937"}},
    {"generator": {**np.random.PCG64(0).state, "state": {"state": 2**200, "inc": 1}}},
])
def test_what_is_no_state_changes_nothing(change):
    mt.seed(3)
    before = get_state()
    with pytest.raises(ValueError):
        set_state({**before, **change})
    assert get_state() == before
