"""The four versions of an average, the scale of scores, and normalising: what the page prints is so."""
import numpy as np
import pytest

import minitensor as mt
from examples import averaging
from gpt.cli import run


def test_versions_that_should_be_equal_are():
    *same, (name, difference) = averaging.versions(np.random.default_rng(1)).items()
    assert len(same) == 4 and all(d < 1e-5 for _, d in same)
    assert "not the same" in name and difference > 0.01


@pytest.mark.parametrize("version", [averaging.by_loops, averaging.by_matrix_product, averaging.by_softmax])
def test_each_version_is_the_mean_so_far(version):
    x = np.random.default_rng(2).standard_normal((3, 5, 2))
    expected = np.cumsum(x, axis=1) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(version(x), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("depth", [4, 16, 64])
def test_scaling_takes_the_variance_back_to_one(depth):
    random = np.random.default_rng(0)
    plain, largest = averaging.scores(random, 1.0, depth=depth)
    scaled, largest_scaled = averaging.scores(random, depth**-0.5, depth=depth)
    assert plain == pytest.approx(depth, rel=0.1) and scaled == pytest.approx(1, rel=0.1)
    assert 1 / averaging.T < largest_scaled < largest < 1


def test_batch_norm_and_layer_norm_are_each_others_transpose():
    x = (np.random.default_rng(0).standard_normal((40, 30)) + 1) * 3
    np.testing.assert_allclose(averaging.batch_norm(x), averaging.layer_norm(x.T.copy()).T, atol=1e-12)
    column_mean, column_std, row_mean, row_std = averaging.columns_and_rows(averaging.layer_norm(x))
    assert abs(row_mean) < 1e-12 and row_std == pytest.approx(1, abs=1e-5)
    assert abs(column_mean) > 0.01 and abs(column_std - 1) > 0.01


def test_the_page(capsys):
    mt.seed(5)
    assert run(averaging.main, []) == 0
    printed = capsys.readouterr().out
    assert "[0.192, 0.143, 0.235, 0.143, 0.287]" in printed            # the lecture's row, as it has it
    assert "[0.033, 0.003, 0.162, 0.003, 0.800]" in printed
