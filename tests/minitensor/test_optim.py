"""Optimizers, clipping and the schedule, against torch.optim over ten steps."""
import numpy as np
import pytest

from minitensor.optim import SGD, AdamW, Muon, Together, clip_grad_norm, grad_norm, trapezoid, warmup_cosine
from minitensor.tensor import Tensor

SHAPES = [(5, 3), (3,), (), (2, 3, 4), (1, 1)]
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)],
                                 ids=["float64", "float32"])
WITH_TORCH = {"reason": "PyTorch is the reference"}


def arrays(seed, dtype, scale=1.0):
    random = np.random.default_rng(seed)
    return [(scale * random.standard_normal(shape)).astype(dtype) for shape in SHAPES]


def parameters(dtype=np.float64):
    return [Tensor(x, requires_grad=True) for x in arrays(0, dtype)]


def torch_parameters(torch, dtype):
    return [torch.tensor(x, requires_grad=True) for x in arrays(0, dtype)]


def give_gradients(ours, theirs, torch, step, dtype):
    """The same gradients to both sides: of very different sizes, and some steps of zeros."""
    scale = [1.0, 1e-3, 0.0, 30.0][step % 4]
    for p, q, g in zip(ours, theirs, arrays(1 + step, dtype, scale), strict=True):
        p.grad, q.grad = Tensor(g.copy()), torch.tensor(g)


def assert_alike(ours, theirs, tolerance):
    """Equal, Tensors or torch's, to a tolerance of each one's largest element."""
    for p, q in zip(ours, theirs, strict=True):
        found, expected = p.numpy(), q.detach().numpy()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


# ---- ten steps beside torch.optim --------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum, dtype, tolerance):
    torch = pytest.importorskip("torch", **WITH_TORCH)
    ours, theirs = parameters(dtype), torch_parameters(torch, dtype)
    optimizer = SGD(ours, lr=0.1, momentum=momentum)
    torch_optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=momentum)
    for step in range(10):
        give_gradients(ours, theirs, torch, step, dtype)
        optimizer.step()
        torch_optimizer.step()
        assert_alike(ours, theirs, tolerance)


@dtypes
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.0}, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
])
def test_adamw_is_torchs_with_decay_on_matrices_only(options, dtype, tolerance):
    torch = pytest.importorskip("torch", **WITH_TORCH)
    ours, theirs = parameters(dtype), torch_parameters(torch, dtype)
    optimizer = AdamW(ours, **options)
    decay = options.get("weight_decay", 0.01)
    groups = [{"params": [p for p in theirs if p.ndim > 1], "weight_decay": decay},
              {"params": [p for p in theirs if p.ndim <= 1], "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, **{**options, "weight_decay": decay})
    for step in range(10):
        give_gradients(ours, theirs, torch, step, dtype)
        optimizer.lr *= 0.9
        for group in torch_optimizer.param_groups:
            group["lr"] *= 0.9
        assert optimizer.step() is None
        torch_optimizer.step()
        assert_alike(ours, theirs, tolerance)


@dtypes
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm_is_torchs(max_norm, dtype, tolerance):
    torch = pytest.importorskip("torch", **WITH_TORCH)
    ours, theirs = parameters(dtype), torch_parameters(torch, dtype)
    give_gradients(ours, theirs, torch, 0, dtype)
    ours.append(Tensor(1.0, requires_grad=True))                    # without a gradient: it does not count
    norm = clip_grad_norm(ours, max_norm)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=tolerance)
    assert_alike([p.grad for p in ours[:-1]], [q.grad for q in theirs], tolerance)
    assert ours[-1].grad is None
    assert grad_norm(ours) == pytest.approx(min(norm, max_norm), rel=1e-5)


# ---- AdamW's own clipping ----------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_max_norm_is_clipping_and_then_a_step(max_norm, dtype, tolerance):
    together, apart = parameters(dtype), parameters(dtype)
    first, second = AdamW(together, lr=0.01, max_norm=max_norm), AdamW(apart, lr=0.01)
    for step in range(10):
        for p, q, g in zip(together, apart, arrays(1 + step, dtype), strict=True):
            p.grad, q.grad = Tensor(g.copy()), Tensor(g.copy())
        assert first.step() == clip_grad_norm(apart, max_norm)
        second.step()
        assert_alike(together, apart, tolerance)
        for p, g in zip(together, arrays(1 + step, dtype), strict=True):
            np.testing.assert_array_equal(p.grad.numpy(), g)        # clipped on the way, not in place


@pytest.mark.parametrize("make", [
    lambda ps: SGD(ps, lr=0.1), lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    lambda ps: AdamW(ps), lambda ps: AdamW(ps, max_norm=1.0),
], ids=["SGD", "SGD momentum", "AdamW", "AdamW max_norm"])
def test_parameters_without_a_gradient_are_skipped(make):
    used, unused = parameters()[:2]
    alone, before = Tensor(used.data.copy(), requires_grad=True), unused.data.copy()
    optimizer, optimizer_alone = make([unused, used]), make([alone])
    for step in range(3):
        used.grad, alone.grad = (Tensor(arrays(step, np.float64)[0]) for _ in range(2))
        optimizer.step()
        optimizer_alone.step()
    np.testing.assert_array_equal(unused.data, before)
    np.testing.assert_array_equal(used.data, alone.data)
    optimizer.zero_grad()
    assert used.grad is None


def test_steps_are_taken_in_place():
    """Whoever holds the array of a parameter, such as a state_dict, sees the step."""
    for make in (SGD, AdamW):
        p = Tensor(np.ones((2, 2)), requires_grad=True)
        array = p.data
        np.sum(p * p).backward()
        make([p], lr=0.5).step()
        assert p.data is array and np.all(array != 1)


def test_a_gradient_in_another_layout_counts_the_same():
    plain, turned = (Tensor(np.ones((2, 3)), requires_grad=True) for _ in range(2))
    g = np.arange(6.0).reshape(2, 3)
    plain.grad, turned.grad = Tensor(g), Tensor(np.asfortranarray(g))
    assert clip_grad_norm([plain], 1.0) == clip_grad_norm([turned], 1.0)
    for p in (plain, turned):
        AdamW([p], max_norm=0.5).step()
    np.testing.assert_array_equal(plain.numpy(), turned.numpy())


def test_the_norm_of_huge_gradients_does_not_overflow():
    p = Tensor(np.ones(4, np.float32), requires_grad=True)
    p.grad = Tensor(np.full(4, 1e30, np.float32))
    assert clip_grad_norm([p], 2.0) == pytest.approx(2e30)
    np.testing.assert_allclose(p.grad.numpy(), 1, rtol=1e-6)


def test_descent_reaches_the_minimum():
    for make in (lambda p: SGD([p], lr=0.1, momentum=0.5), lambda p: AdamW([p], lr=0.1, weight_decay=0.0)):
        p = Tensor(np.array([3.0, -2.0]), requires_grad=True)
        optimizer = make(p)
        for _ in range(300):
            optimizer.zero_grad()
            np.sum((p - np.array([1.0, 2.0])) ** 2).backward()
            optimizer.step()
        np.testing.assert_allclose(p.numpy(), [1, 2], atol=1e-3)


def test_no_parameters_is_an_error():
    for make in (SGD, AdamW):
        with pytest.raises(ValueError, match=f"{make.__name__}: there are no parameters"):
            make([], lr=0.1)


# ---- the schedule ------------------------------------------------------------------------------------------

def test_warmup_cosine_at_its_corners():
    def lr(step, warmup=10):
        return warmup_cosine(step, steps=110, warmup=warmup, lr=1.0, min_lr=0.1)
    assert lr(0) == pytest.approx(1 / 11) and lr(9) == pytest.approx(10 / 11)
    assert lr(10) == 1.0
    assert lr(35) == pytest.approx(0.1 + 0.9 * (1 + np.sqrt(0.5)) / 2)
    assert lr(60) == pytest.approx(0.55)
    assert lr(110) == lr(111) == lr(10_000) == pytest.approx(0.1)
    assert lr(0, warmup=0) == 1.0 and lr(55, warmup=0) == pytest.approx(0.55)
    for edge in (109, 110, 200):                                    # a warm-up as long as the run
        assert 0 < lr(109, warmup=edge) <= 1
    rates = [lr(step) for step in range(111)]
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)


def test_trapezoid_at_its_corners():
    def lr(step, hold=60, warmup=10):
        return trapezoid(step, steps=110, warmup=warmup, lr=1.0, min_lr=0.1, hold=hold)
    assert lr(9) == pytest.approx(10 / 11) and lr(10) == lr(35) == lr(60) == 1.0
    assert lr(70) == pytest.approx(0.82) and lr(85) == pytest.approx(0.55)
    assert lr(110) == lr(200) == pytest.approx(0.1)
    assert [lr(step, hold=5) for step in range(111)] == [lr(step, hold=10) for step in range(111)]
    assert lr(109, hold=110) == 1.0 and lr(109, hold=110, warmup=0) == 1.0      # held to the end


def test_a_parameter_that_gets_its_first_gradient_late_starts_then():
    """PyTorch counts the steps of each parameter: a bias correction spent on nothing would overshoot."""
    early, late = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    optimizer = AdamW([early, late], lr=0.1, weight_decay=0.0)
    for step in range(50):
        early.grad = Tensor(np.ones(3))
        late.grad = Tensor(np.ones(3)) if step == 49 else None
        optimizer.step()
    np.testing.assert_allclose(late.numpy(), 0.9)


def test_the_same_parameter_twice_is_an_error():
    p = Tensor(np.ones(3), requires_grad=True)
    for make in (SGD, AdamW):
        with pytest.raises(ValueError, match=f"{make.__name__}: a parameter is listed twice"):
            make([p, p], lr=0.1)


def test_what_cannot_be_trained_is_an_error():
    p = Tensor(np.ones(3), requires_grad=True)
    for wrong, named in ((p, "the result of an op"), ([2 * p], "the result of an op"),
                         ([np.ones(3)], "a ndarray"),
                         ([Tensor(np.ones(3))], "a Tensor without requires_grad")):
        with pytest.raises(TypeError, match=f"AdamW: parameters are a list .* among them is {named}"):
            AdamW(wrong)
    with pytest.raises(TypeError, match="grad_norm: parameters is a Tensor; it must be a list"):
        clip_grad_norm(p, 1.0)
    for lr in (-1, "a", np.inf, np.nan):
        with pytest.raises(ValueError, match=r"SGD: lr is .*; it must be 0 or a positive number"):
            SGD([p], lr)
    for betas in ((2, 3), 0.9, (0.9,)):
        with pytest.raises(ValueError, match=r"AdamW: betas is .*; it must be two numbers"):
            AdamW([p], betas=betas)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.1, max_norm=1.0), lambda p: SGD(p, 0.1, momentum=0.9),
                                  lambda p: SGD(p, 0.1)], ids=["AdamW", "momentum", "SGD"])
def test_a_state_that_is_loaded_goes_on_in_every_bit(make):
    def steps(optimizer, ours, first, last):
        for step in range(first, last):
            for i, (p, g) in enumerate(zip(ours, arrays(1 + step, np.float32), strict=True)):
                p.grad = None if i == 1 and step < 2 else Tensor(g)          # one that starts late
            optimizer.step()
    whole, halves = parameters(np.float32), parameters(np.float32)
    steps(make(whole), whole, 0, 6)
    before = make(halves)
    steps(before, halves, 0, 3)
    after, state = make(halves), {name: array.copy() for name, array in before.state_dict().items()}
    after.load_state_dict(before.state_dict())
    steps(after, halves, 3, 6)
    for p, q in zip(whole, halves, strict=True):
        assert p.data.tobytes() == q.data.tobytes()
    for name, array in state.items():
        assert np.array_equal(array, before.state_dict()[name]), "what is loaded is copied"


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: s.pop("first.2"), "missing 'first.2'"),
    (lambda s: s.update({"third.0": np.zeros(1)}), "unexpected 'third.0'"),
    (lambda s: s.update({"second.1": np.zeros(4)}), r"'second.1' is float64 \(4,\), it must be float64 \("),
    (lambda s: s.update({"steps": np.zeros(5)}), r"'steps' is float64 \(5,\), it must be int64 \(5,\)"),
    (lambda s: s.update({"steps": np.full(5, -1)}), "'steps' has a negative number"),
])
def test_a_state_that_does_not_fit_changes_nothing(change, said):
    optimizer = AdamW(parameters(), 0.1)
    state = {name: array + 1 for name, array in optimizer.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"load_state_dict: AdamW does not fit: {said}"):
        optimizer.load_state_dict(state)
    assert not any(array.any() for array in optimizer.state_dict().values())
    with pytest.raises(ValueError, match=r"SGD does not fit: unexpected 'first.0'"):
        SGD(parameters(), 0.1).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    ours = parameters()
    optimizer = AdamW(ours, 0.1, max_norm=1.0)
    for p in ours:
        p.grad = Tensor(np.ones_like(p.data))
    ours[0].grad.data[0, 0] = bad
    assert not np.isfinite(optimizer.step())
    for p, before in zip(ours, parameters(), strict=True):
        np.testing.assert_array_equal(p.data, before.data)
    assert not any(array.any() for array in optimizer.state_dict().values())
# ---- Muon --------------------------------------------------------------------------------------------------

MATRICES = [(6, 6), (18, 6), (24, 6), (6, 24)]


def matrices(seed, dtype=np.float64):
    return [np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype) for shape in MATRICES]


@pytest.mark.parametrize("options", [
    {}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.3},
])
def test_muon_is_torchs_up_to_its_bfloat16(options):
    """PyTorch rounds to bfloat16 all the way; five steps enlarge that where singular values are small.

    tests/gpt/torch_peer.py has the same without rounding: ten steps of a model agree with it to 1e-10.
    """
    torch = pytest.importorskip("torch", **WITH_TORCH)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, **options}
    ours = [Tensor(x, requires_grad=True) for x in matrices(0)]
    theirs = [torch.tensor(x, requires_grad=True) for x in matrices(0)]
    optimizer, torch_optimizer = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(10):
        before = [p.numpy().copy() for p in ours]
        for p, q, g, start in zip(ours, theirs, matrices(1 + step), before, strict=True):
            p.grad, q.grad = Tensor(g.copy()), torch.tensor(g)
            with torch.no_grad():
                q.copy_(torch.tensor(start))
        assert optimizer.step() is None
        torch_optimizer.step()
        for p, q, start in zip(ours, theirs, before, strict=True):
            moved, expected = p.numpy() - start, q.detach().numpy() - start
            assert np.linalg.norm(moved - expected) < 0.1 * np.linalg.norm(expected)


def test_muons_parts_are_parameters_of_their_own():
    packed = Tensor(matrices(0)[1], requires_grad=True)
    apart = [Tensor(x.copy(), requires_grad=True) for x in np.split(packed.data, 3)]
    g = matrices(1)[1]
    packed.grad = Tensor(g)
    for p, part in zip(apart, np.split(g, 3), strict=True):
        p.grad = Tensor(part)
    Muon([packed], parts=[3]).step()
    Muon(apart).step()
    np.testing.assert_array_equal(packed.numpy(), np.concatenate([p.numpy() for p in apart]))


def test_muons_step_has_one_size_whatever_the_gradients():
    """Each update has singular values near 1, times √(rows / columns) where a matrix is tall."""
    for shape in MATRICES:
        p = Tensor(np.zeros(shape), requires_grad=True)
        p.grad = Tensor(1e-5 * matrices(1)[MATRICES.index(shape)])
        Muon([p], lr=1.0).step()
        values = np.linalg.svd(p.numpy(), compute_uv=False) / np.sqrt(max(1, shape[0] / shape[1]))
        assert 0.6 < values.min() and values.max() < 1.25


def test_together_clips_by_one_norm_and_moves_all_rates():
    ours, alone = ([Tensor(x, requires_grad=True) for x in matrices(0)[:3]] for _ in range(2))
    for p, q, g in zip(ours, alone, matrices(1)[:3], strict=True):
        p.grad, q.grad = Tensor(g), Tensor(g.copy())
    max_norm = (grad_norm(ours) + 1e-6) / 4                           # a factor of 1/4, which rounds nothing
    adamw, muon, sgd = AdamW(ours[:1], 0.01), Muon(ours[1:2], 0.04), SGD(ours[2:], 0.1, momentum=0.9)
    together = Together([adamw, muon, sgd], max_norm=max_norm)
    together.lr = 0.005
    assert (adamw.lr, muon.lr, sgd.lr, together.lr) == (0.005, 0.02, 0.05, 0.005)
    norm = clip_grad_norm(alone, max_norm)
    assert together.step() == norm > max_norm
    AdamW(alone[:1], 0.005).step()
    Muon(alone[1:2], 0.02).step()
    SGD(alone[2:], 0.05, momentum=0.9).step()
    for p, q, g in zip(ours, alone, matrices(1)[:3], strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())
        np.testing.assert_array_equal(p.grad.numpy(), g)              # scaled on their way, not in place
    together.zero_grad()
    assert all(p.grad is None for p in ours)


@pytest.mark.parametrize("make", [
    lambda ps: Muon(ps, max_norm=1.0),
    lambda ps: Together([AdamW(ps[:1], 0.01), Muon(ps[1:], 0.02)], max_norm=1.0),
], ids=["Muon", "Together"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_muon_and_adamw_together_change_nothing_at_a_norm_that_is_not_finite(make, bad):
    parameters = [Tensor(x, requires_grad=True) for x in matrices(0)]
    optimizer = make(parameters)
    for p, g in zip(parameters, matrices(1), strict=True):
        p.grad = Tensor(g)
    parameters[2].grad.data[0, 0] = bad
    gradients = [p.grad.numpy().copy() for p in parameters]
    state = {name: array.copy() for name, array in optimizer.state_dict().items()}
    assert not np.isfinite(optimizer.step())
    for p, x, g in zip(parameters, matrices(0), gradients, strict=True):
        np.testing.assert_array_equal(p.numpy(), x)
        np.testing.assert_array_equal(p.grad.numpy(), g)
    assert all(np.array_equal(array, state[name]) for name, array in optimizer.state_dict().items())


def test_muon_and_together_go_on_from_their_state():
    """Three steps, the state into a new optimizer, three more: the bits of six steps."""
    def make():
        parameters = [Tensor(x, requires_grad=True) for x in matrices(0)]
        return parameters, Together([AdamW(parameters[:2], 0.01), Muon(parameters[2:], 0.02)])

    def steps(parameters, optimizer, numbers):
        for step in numbers:
            for p, g in zip(parameters, matrices(1 + step), strict=True):
                p.grad = Tensor(g)
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, range(6))
    half, optimizer = make()
    steps(half, optimizer, range(3))
    rest, another = make()
    assert set(another.state_dict()) == {"0.first.0", "0.first.1", "0.second.0", "0.second.1", "0.steps",
                                         "1.momentum.0", "1.momentum.1"}
    another.load_state_dict(optimizer.state_dict())
    for p, q in zip(rest, half, strict=True):
        p.data[...] = q.data
    steps(rest, another, range(3, 6))
    for p, q in zip(rest, whole, strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())
    state = optimizer.state_dict()
    square = np.zeros((2, 2))
    for wrong in ({}, {**state, "1.momentum.1": square}, {**state, "1.momentum.2": square},
                  {**state, "2.momentum.0": square}):
        with pytest.raises(ValueError, match="load_state_dict"):
            another.load_state_dict(wrong)


def test_what_muon_and_together_cannot_take_is_an_error():
    p, q = (Tensor(x, requires_grad=True) for x in matrices(0)[:2])
    vector = Tensor(np.ones(3), requires_grad=True)
    for make, said in ((lambda: Muon([vector]), r"Muon: a parameter is \(3,\); it must be a matrix"),
                       (lambda: Muon([p], parts=[4]), r"is \(6, 6\); it must be a matrix, or 4 of them"),
                       (lambda: Muon([p, q], parts=[1]), "parts holds 1 numbers; there are 2"),
                       (lambda: Muon([p], momentum=1.0), r"momentum is 1.0; it must be in \[0, 1\)"),
                       (lambda: Together([]), "there must be an optimizer"),
                       (lambda: Together([Muon([p], max_norm=1.0)]), "has a max_norm of its own"),
                       (lambda: Together([Muon([p], 0.0)]), "the first one's lr above 0"),
                       (lambda: Together([Muon([p]), AdamW([q, p])]), "have the same parameter")):
        with pytest.raises(ValueError, match=said):
            make()


def test_together_takes_all_of_a_state_or_nothing():
    parameters = [Tensor(x, requires_grad=True) for x in matrices(0)]
    both = Together([AdamW(parameters[:1], 0.01), Muon(parameters[1:], 0.02)])
    state = {name: np.ones_like(array) for name, array in both.state_dict().items()}
    state["1.momentum.0"] = np.ones((1, 1))
    with pytest.raises(ValueError, match=r"Muon does not fit: 'momentum\.0' is"):
        both.load_state_dict(state)
    assert not any(array.any() for array in both.state_dict().values())


@pytest.mark.parametrize("optimizer", [AdamW, Muon, SGD])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_parameter_of_a_step_is_noted(optimizer, number):
    """A graph of its old values does not go on."""
    parameters = [Tensor(np.ones((2, 3), np.float32), requires_grad=True) for _ in range(3)]
    np.sum(parameters[0] * parameters[1] * parameters[2]).backward()
    later = np.sum(np.square(parameters[number]))
    optimizer(parameters, lr=0.1).step()
    with pytest.raises(RuntimeError, match="backward: the input of op 'square'"):
        later.backward()
