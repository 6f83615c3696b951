"""Modules: what they own, how they save, load and switch, and their values and gradients against torch.nn."""
import numpy as np
import pytest

import minitensor
from minitensor import nn
from minitensor.tensor import Tensor, no_grad


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


class Tied(nn.Module):
    """A little of everything: a parameter, a constant, a list of modules, one weight in two places."""

    def __init__(self):
        self.embedding = nn.Embedding(5, 4)
        self.scale = Tensor([2.0], requires_grad=True)
        self.constant = Tensor([3.0])
        self.layers = [nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4, bias=False), np.tanh, nn.Dropout(0.5))]
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) * self.scale + self.constant
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


PATHS = ["scale", "embedding.weight", "layers.0.weight", "layers.0.bias", "layers.1.steps.0.weight"]


# ---- what a module owns ------------------------------------------------------------------------------------

def test_named_parameters_go_down_and_name_each_once():
    model = Tied()
    named = dict(model.named_parameters())
    assert list(named) == PATHS
    assert named["embedding.weight"] is model.embedding.weight is model.head.weight
    assert named["layers.1.steps.0.weight"] is model.layers[1].steps[0].weight
    assert all(a is b for a, b in zip(model.parameters(), named.values(), strict=True))
    assert [name for name, _ in model.named_modules()] == [
        "", "embedding", "layers.0", "layers.1", "layers.1.steps.0", "layers.1.steps.2", "head"]


def test_a_module_met_twice_gives_its_parameters_once():
    layer = nn.Linear(3, 3)
    named = dict(nn.Sequential(layer, np.tanh, layer).named_parameters())
    assert list(named) == ["steps.0.weight", "steps.0.bias"]


def test_constants_and_absent_biases_are_no_parameters():
    assert list(nn.Linear(2, 3, bias=False).state_dict()) == ["weight"]
    assert list(nn.LayerNorm(2, bias=False).state_dict()) == ["weight"]
    assert nn.Dropout(0.5).parameters() == nn.Sequential().parameters() == []


def test_zero_grad_forgets_all_gradients():
    model = Tied()
    np.sum(model(np.array([1, 2]))).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_tied_weight_gets_both_gradients():
    model = Tied().eval()
    ids = np.array([[1, 0, 3]])
    np.sum(np.tanh(model(ids))).backward()
    both, parts = model.embedding.weight.grad.numpy().copy(), 0
    for module in (model.embedding, model.head):
        tied, module.weight = module.weight, Tensor(module.weight.data, requires_grad=True)
        np.sum(np.tanh(model(ids))).backward()
        parts, module.weight = parts + module.weight.grad.numpy(), tied
    np.testing.assert_allclose(both, parts, rtol=1e-5, atol=1e-7)


# ---- saving and loading ------------------------------------------------------------------------------------

def test_state_goes_from_one_module_to_another():
    minitensor.seed(1)
    source, target = Tied(), Tied()
    ids = np.array([[1, 0, 3]])
    assert [name for name in source.state_dict() if name != "constant"] == PATHS
    before = target.layers[0].weight
    array = before.data
    assert not np.array_equal(source.eval()(ids).numpy(), target.eval()(ids).numpy())
    target.load_state_dict(source.state_dict())
    np.testing.assert_array_equal(source(ids).numpy(), target(ids).numpy())
    assert target.layers[0].weight is before and before.data is array       # what others hold stays valid
    assert not np.shares_memory(array, source.layers[0].weight.data)
    assert target.head.weight is target.embedding.weight


def test_state_dict_shares_memory():
    model = nn.Linear(2, 3)
    model.state_dict()["bias"][...] = 7
    assert model.bias.numpy().tolist() == [7, 7, 7]


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    model = Tied()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    del state["scale"]
    state["head.weight"] = state["embedding.weight"]
    state["layers.0.bias"] = np.zeros(3, np.float32)
    state["layers.0.weight"] = np.zeros((4, 4))
    with pytest.raises(ValueError, match=r"^load_state_dict: Tied does not fit: ") as error:
        model.load_state_dict(state)
    for problem in ("missing 'scale'", "unexpected 'head.weight'",
                    "'layers.0.bias' is float32 (3,), it must be float32 (4,)",
                    "'layers.0.weight' is float64 (4, 4), it must be float32 (4, 4)"):
        assert problem in str(error.value)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# ---- training and evaluation -------------------------------------------------------------------------------

def test_train_and_eval_reach_every_module():
    model = Tied()
    modules = [module for _, module in model.named_modules()]
    assert all(module.training for module in modules)
    assert model.eval() is model and not any(module.training for module in modules)
    assert model.train() is model and all(module.training for module in modules)
    assert model.train(False) is model and not any(module.training for module in modules)


def test_dropout_is_on_in_training_only():
    layer, x = nn.Dropout(0.25), np.ones((100, 100), np.float32)
    minitensor.seed(5)
    first, second = layer(x), layer(x)
    assert set(np.unique(first)) == {0, np.float32(4 / 3)} and abs(np.mean(first) - 1) < 0.02
    assert not np.array_equal(first, second)
    assert layer.eval()(x) is x
    minitensor.seed(5)
    np.testing.assert_array_equal(layer.train()(x), first)
    for p in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=rf"Dropout: p is {p}; it must be in \[0, 1\)"):
            nn.Dropout(p)


def test_the_seed_sets_the_initial_weights():
    weights = []
    for n in (1, 1, 2):
        minitensor.seed(n)
        weights.append(nn.Linear(8, 8).weight.numpy())
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_initial_weights_are_pytorchs():
    minitensor.seed(0)
    linear, embedding, norm = nn.Linear(400, 300), nn.Embedding(300, 400), nn.LayerNorm(5)
    for array in (linear.weight.numpy(), linear.bias.numpy()):      # uniform in ±1/√400
        assert np.max(np.abs(array)) <= 0.05 and np.std(array) == pytest.approx(0.05 / np.sqrt(3), rel=0.1)
    assert np.mean(embedding.weight.numpy()) == pytest.approx(0, abs=0.02)
    assert np.std(embedding.weight.numpy()) == pytest.approx(1, rel=0.02)
    assert np.all(norm.weight.numpy() == 1) and np.all(norm.bias.numpy() == 0)
    for module in (linear, embedding, norm):
        assert all(p.dtype == np.float32 and p.requires_grad for p in module.parameters())


# ---- against torch.nn, with the same weights ---------------------------------------------------------------

def linear_pair(t, bias):
    return nn.Linear(6, 4, bias=bias), t.nn.Linear(6, 4, bias=bias), numbers(2, 3, 6)


def layernorm_pair(t, bias):
    return nn.LayerNorm(6, bias, eps=1e-3), t.nn.LayerNorm(6, bias=bias, eps=1e-3), numbers(2, 3, 6)


def embedding_pair(t, bias):
    return nn.Embedding(5, 6), t.nn.Embedding(5, 6), np.array([[4, 0, 4], [1, 4, 3]])


def sequential_pair(t, bias):
    steps = [nn.Linear(6, 8, bias), minitensor.gelu, nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3, bias)]
    torch_steps = [t.nn.Linear(6, 8, bias), t.nn.GELU(), t.nn.LayerNorm(8), t.nn.Dropout(0.5),
                   t.nn.Linear(8, 3, bias)]
    return nn.Sequential(*steps).eval(), t.nn.Sequential(*torch_steps).eval(), numbers(2, 3, 6)


@pytest.mark.parametrize("pair", [linear_pair, layernorm_pair, embedding_pair, sequential_pair])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_modules_are_torch_nns(pair, bias, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    ours, theirs, x = pair(torch, bias)
    theirs.to(torch.float64 if dtype == np.float64 else torch.float32)
    for parameter in ours.parameters():
        parameter.data = parameter.data.astype(dtype)
    state = {name: array.numpy() for name, array in theirs.state_dict().items()}
    prefix = "steps." if pair is sequential_pair else ""
    ours.load_state_dict({prefix + name: array for name, array in state.items()})

    inputs, torch_inputs = x, torch.tensor(x)
    if x.dtype.kind == "f":
        inputs = Tensor(x.astype(dtype), requires_grad=True)
        torch_inputs = torch.tensor(x.astype(dtype), requires_grad=True)
    y, expected = ours(inputs), theirs(torch_inputs)
    weights = np.cos(np.arange(y.size)).reshape(y.shape).astype(dtype)
    y.backward(gradient=weights)
    expected.backward(gradient=torch.tensor(weights))
    pairs = [(y, expected.detach())]
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    if x.dtype.kind == "f":
        pairs.append((inputs.grad, torch_inputs.grad))
    for a, b in pairs:
        a, b = a.numpy(), b.numpy()
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def test_weights_half_loaded_are_noticed():
    layer = nn.Linear(2, 1)
    loss = np.sum(np.square(layer(Tensor([[1.0, 2.0]]))))
    layer.bias.data.flags.writeable = False                  # comes after the weight
    with pytest.raises(ValueError, match="read-only"):
        layer.load_state_dict(nn.Linear(2, 1).state_dict())
    with pytest.raises(RuntimeError, match=r"input of op 'linear', of shape \(1, 2\), "):
        minitensor.grad(loss, layer.weight)


def test_linear_applies_its_activation():
    layer, x = nn.Linear(6, 4), Tensor(numbers(3, 6))
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        y = layer(x, activation=activation).numpy()
        np.testing.assert_allclose(y, minitensor.gelu(layer(x), approximate).numpy(), rtol=1e-5, atol=1e-6)


# ---- attributes, calls and what is shown -------------------------------------------------------------------

def test_a_typo_is_an_attribute_error():
    layer = nn.Linear(2, 3)
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'wieght'"):
        _ = layer.wieght
    with pytest.raises(AttributeError, match="has no attribute 'evla'"):
        layer.evla()


def test_a_module_without_forward_says_so():
    class Empty(nn.Module):
        pass
    with pytest.raises(NotImplementedError, match="Empty has no forward method"):
        Empty()(1)


def test_modules_record_nothing_under_no_grad():
    with no_grad():
        assert not Tied()(np.array([1])).requires_grad


def test_repr_shows_the_tree_and_the_shapes():
    assert repr(nn.Linear(2, 3)) == "Linear(weight (3, 2), bias (3,))"
    assert repr(nn.Linear(2, 3, bias=False)) == "Linear(weight (3, 2))"

    class Model(nn.Module):
        def __init__(self):
            self.embedding = nn.Embedding(5, 4)
            self.scale = Tensor([2.0], requires_grad=True)
            self.blocks = [nn.Sequential(nn.Linear(4, 4)) for _ in range(3)]

    lines = repr(Model()).splitlines()
    assert lines[:2] == ["Model(scale (1,))", "  embedding: Embedding(weight (5, 4))"]
    assert lines[2] == "  blocks: [3 x Sequential()"
    assert lines[3].strip() == "steps: [1 x Linear(weight (4, 4), bias (4,))]]"


def test_frozen_tensors_and_those_in_lists_and_dicts_are_in_the_state():
    class Net(nn.Module):
        def __init__(self):
            self.linear = nn.Linear(2, 3)
            self.scales = [Tensor(np.ones(2, np.float32), requires_grad=True)]
            self.heads = {"a": nn.Linear(2, 1, bias=False)}

    net = Net()
    net.linear.weight.requires_grad = False
    assert list(net.state_dict()) == ["scales.0", "linear.weight", "linear.bias", "heads.a.weight"]
    assert [name for name, _ in net.named_parameters()] == ["scales.0", "linear.bias", "heads.a.weight"]
    assert [name for name, _ in net.named_modules()] == ["", "linear", "heads.a"]


def test_modules_in_nested_containers_are_found():
    class Nested(nn.Module):
        def __init__(self):
            self.parts = {"a": [nn.Linear(1, 1, bias=False)], "b": (nn.Linear(1, 2), [Tensor([1.0], True)])}

    model = Nested()
    assert [name for name, _ in model.named_parameters()] == [
        "parts.b.1.0", "parts.a.0.weight", "parts.b.0.weight", "parts.b.0.bias"]
    model.eval()
    assert not model.parts["a"][0].training
