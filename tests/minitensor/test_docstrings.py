"""Every public name says what it does, and every example in a docstring runs, those of ops as well.

pytest's own doctest collector misses ops, as their wrapper is a function of minitensor/tensor.py.
"""
import doctest
import inspect
import sys

import pytest

import minitensor as mt

PUBLIC = {name: getattr(mt, name) for name in mt.__all__ if not inspect.ismodule(getattr(mt, name))}
PUBLIC |= {f"{module.__name__}.{name}": value for module in (mt.nn, mt.optim)
           for name, value in vars(module).items()
           if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")}
WITH_EXAMPLE = [name for name, value in PUBLIC.items() if ">>>" in (value.__doc__ or "")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_does(name):
    assert PUBLIC[name].__doc__


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_run(name):
    value = inspect.unwrap(PUBLIC[name])
    names = dict(vars(sys.modules[value.__module__]))
    full_name = f"{value.__module__}.{name}"
    found = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, names, full_name, None, None)
    said: list[str] = []
    failures = doctest.DocTestRunner().run(found, out=said.append).failed
    assert failures == 0, "".join(said)


def test_what_a_student_meets_first_has_an_example():
    assert set(WITH_EXAMPLE) >= {
        "Tensor", "grad", "op", "fused", "no_grad", "unfused", "jacobian", "hessian", "hvp", "vjp", "jvp",
        "linear", "layernorm", "softmax", "attention", "dropout", "embedding", "cross_entropy",
        "minitensor.nn.Module", "minitensor.nn.Sequential", "minitensor.optim.SGD", "minitensor.optim.AdamW"}
    assert ">>>" in mt.Tensor.backward.__doc__ and ">>>" in mt.Tensor.detach.__doc__
