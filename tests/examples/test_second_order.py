"""Newton's method arrives, and power iteration finds what the whole Hessian has."""
import numpy as np

import minitensor as mt
from examples.second_order import main, newton, rosenbrock, top_eigenvalue
from gpt.config import Config
from gpt.model import GPT


def test_newtons_method_finds_rosenbrocks_minimum_in_few_steps():
    points = newton(rosenbrock, np.array([-1.2, 1.0]), 7)
    np.testing.assert_allclose(points[-1], [1, 1], atol=1e-12)
    errors = [np.linalg.norm(x - 1) for x in points]
    assert errors[6] < errors[5] ** 1.5                         # the digits double near the end


def test_power_iteration_finds_the_hessians_largest_eigenvalue():
    mt.seed(1)
    model = GPT(Config(layers=1, heads=1, width=2, context=3), 5)
    parameters = model.parameters()
    for p in parameters:
        p.data = np.random.default_rng(p.size).normal(0, 0.5, p.shape)      # float64, away from the start
    ids = np.random.default_rng(0).integers(5, size=(4, 4))
    loss = mt.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    *_, found = top_eigenvalue(loss, parameters, 150)
    rows = [np.concatenate([block.numpy().reshape(p.size, -1) for block in row], axis=1)
            for p, row in zip(parameters, mt.hessian(loss, parameters), strict=True)]
    hessian = np.concatenate(rows)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert abs(found - eigenvalues[np.argmax(np.abs(eigenvalues))]) < 1e-6 * abs(found)


def test_the_example_prints_both(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "step 6: ( 1.000000,  1.000000)" in printed
    estimates = [float(line.split(":")[1]) for line in printed.splitlines() if line.startswith("  step") and
                 "f =" not in line]
    assert len(estimates) == 6 and abs(estimates[-1] - estimates[-2]) < 0.01 * estimates[-1]
