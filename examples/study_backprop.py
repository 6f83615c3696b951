"""A lesson: what a gradient is, from a * b to one head of attention, each number worked out and explained.

    python examples/study_backprop.py                        prints the lesson, and runs every line of it
    python examples/study_backprop.py --page backward.html   the last section's backward pass, as a page

Each section is the docstring of a function. The tests run them all: what they promise is what you get.
"""
import ast
import doctest
import sys
import textwrap
from pathlib import Path

import numpy as np

import minitensor as mt
from gpt.cli import Parser, run, writing
from minitensor import nn


def product():
    """1. One product

    A gradient answers one question: if I nudge this number a little, how much does the result move?

    >>> a = mt.Tensor(2.0, requires_grad=True)
    >>> b = mt.Tensor(-3.0, requires_grad=True)
    >>> c = a * b
    >>> c
    Tensor(-6., op=multiply)

    The result remembers the op that made it. Going back from c to a and b is the backward pass.

    >>> c.backward()
    >>> a.grad, b.grad
    (Tensor(-3.), Tensor(2.))

    If a grows by 0.001, c grows by 0.001 * b. So the gradient of a is b, which is -3, and that of b is a,
    which is 2. We need not take this on trust: nudge a, and look.

    >>> nudged = mt.Tensor(2.001) * b
    >>> print(f"{(nudged.item() - c.item()) / 0.001:.3f}")
    -3.000

    Every op knows its own rule, called its vjp. This is the whole of the product, as the library has it:
    its value, then for each input what it does to a gradient g that arrives from above.

    >>> import inspect
    >>> print(inspect.getsource(mt.multiply.body))
    @op(np.multiply)
    def multiply(x, y):
        \"\"\"x y, element by element, with broadcasting.\"\"\"
        return np.multiply(x, y), (lambda g: g * y, lambda g: g * x)
    <BLANKLINE>
    """


def order():
    """2. Why the order of the walk matters

    A number that is used twice is nudged twice. Its gradient is the sum of what comes back along each
    way.

    >>> a = mt.Tensor(3.0, requires_grad=True)
    >>> b = a + a
    >>> c = b + b
    >>> c.backward()
    >>> a.grad                                              # c is 4 a
    Tensor(4.)

    Here is how it goes wrong. c sends 1 to b along its left side. A walk that hurries on from there sends
    that 1 to a, twice: a has 2. Then c's right side brings b its second 1. Now b has 2, and hurries on
    again, sending 2 to a, twice: a has 2 + 4 = 6. The first 1 was sent on twice. So a node must wait
    until all of its gradient has arrived. minitensor numbers the ops as they run, and goes back from the
    highest number to the lowest: whoever uses b ran after b, so on the way back it comes before b.

    >>> c = (a + a) * 1
    >>> c.node.serial > c.node.inputs[0].node.serial        # the product ran last, and is walked first
    True

    Gradients also add up from one backward pass to the next, on purpose: a large batch can be summed in
    pieces. So a training loop forgets the old gradient first.

    >>> (a * 10).backward()
    >>> a.grad                                              # 4 from above, and now 10 more
    Tensor(14.)
    >>> a.grad = None
    """


def expression():
    """3. A longer expression

    This is the example in the README of Karpathy's micrograd. It is contrived, and that is the point: no
    matter how the numbers are tangled, one walk back finds both gradients.

    >>> a = mt.Tensor(-4.0, requires_grad=True)
    >>> b = mt.Tensor(2.0, requires_grad=True)
    >>> c = a + b                                           # -2
    >>> d = a * b + b ** 3                                  # 0
    >>> c = c + c + 1                                       # -3
    >>> c = c + 1 + c + (-a)                                # -1
    >>> d = d + d * 2 + mt.relu(b + a)                      # 0; relu(-2) is 0, and so is its slope
    >>> d = d + 3 * d + mt.relu(b - a)                      # 6
    >>> e = c - d                                           # -7
    >>> f = e ** 2                                          # 49
    >>> g = f / 2.0 + 10.0 / f
    >>> print(f"{g:.4f}")
    24.7041
    >>> g.backward()
    >>> print(f"{a.grad:.4f}")                              # dg/da
    138.8338
    >>> print(f"{b.grad:.4f}")                              # dg/db
    645.5773

    Near these values g moves 138.8 times as much as a does. The first two steps back, by hand: dg/df is
    1/2 - 10/f^2, and f = e^2, so dg/de is that times 2 e.

    >>> df = 0.5 - 10 / 49 ** 2
    >>> de = df * 2 * -7
    >>> print(f"{df:.4f} {de:.4f}")
    0.4958 -6.9417

    From e on there are two ways, through c and through d. c holds a four times, and then takes one away:
    3. d holds a * b twelve times, and b - a once: 12 * 2 - 1 = 23. e = c - d, so e moves 3 - 23 = -20
    times as much as a. For b it is 4 by c and 12 * (a + 3 b^2) + 1 = 97 by d: -93.

    >>> print(f"{de * -20:.4f} {de * -93:.4f}")
    138.8338 645.5773
    """


def arrays():
    """4. Arrays

    A tensor is many numbers with one rule. Where numpy repeats a short array to fit a long one
    (broadcasting), one number is used many times, and by section 2 its gradients add up.

    >>> x = mt.Tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> weight = mt.Tensor([1.0, 0.0, -1.0], requires_grad=True)
    >>> bias = mt.Tensor(0.5, requires_grad=True)
    >>> y = x @ weight + bias
    >>> y
    Tensor([-1.5, -1.5], op=add)
    >>> loss = np.mean(y ** 2)
    >>> loss
    Tensor(2.25, op=mean)

    The loss is the mean of two squares, so each y gets 2 y / 2 = y = -1.5. The bias went into both rows:
    -3. The weight meets each row of x: -1.5 * [1, 2, 3] - 1.5 * [4, 5, 6].

    >>> loss.backward()
    >>> bias.grad
    Tensor(-3.)
    >>> weight.grad
    Tensor([ -7.5, -10.5, -13.5])

    The gradient points uphill. A small step the other way makes the loss smaller: that is all of
    training. By how much? If the slope stayed as it is, by the step times the sum of the squared
    gradients.

    >>> squared = 9 + 7.5 ** 2 + 10.5 ** 2 + 13.5 ** 2
    >>> print(f"{2.25 - 0.001 * squared:.3f}")
    1.892
    >>> weight.data -= 0.001 * weight.grad.data
    >>> bias.data -= 0.001 * bias.grad.data
    >>> print(f"{np.mean((x @ weight + bias) ** 2).item():.3f}")
    1.909

    It got a little less, as the slope flattens on the way down. With a larger step it would get much
    less, or overshoot: hence the small learning rates.
    """


def spirals():
    """5. Two layers learn two spirals

    Two arms wind around each other, 100 points on each. No straight line parts them, so one layer is not
    enough: it takes a hidden layer that bends the plane, here of 24 tanh units, and a second one that
    reads off two scores.

    >>> turn = np.linspace(0.5, 3, 100, dtype=np.float32)
    >>> arm = np.stack([turn * np.cos(3 * turn), turn * np.sin(3 * turn)], axis=1) / 3
    >>> points, labels = np.concatenate([arm, -arm]), np.repeat([0, 1], 100)
    >>> mt.seed(0)
    >>> model = nn.Sequential(nn.Linear(2, 24), np.tanh, nn.Linear(24, 2))
    >>> loss = mt.cross_entropy(model(mt.Tensor(points)), labels)
    >>> print(f"{loss.item():.2f}")
    0.72

    The loss is the mean surprise at the right label, in nats. Whoever tosses a coin has log 2 = 0.69, and
    the random weights we start from are a little worse. Now the loop that trains every network, GPTs too:
    forget the old gradients, go forward, go back, step.

    >>> optimizer = mt.optim.AdamW(model.parameters(), lr=0.05)
    >>> for step in range(301):
    ...     optimizer.zero_grad()
    ...     loss = mt.cross_entropy(model(mt.Tensor(points)), labels)
    ...     loss.backward()
    ...     _ = optimizer.step()
    ...     if step % 100 == 0:
    ...         print(f"step {step}: loss {loss.item():.2f}")
    step 0: loss 0.72
    step 100: loss 0.45
    step 200: loss 0.01
    step 300: loss 0.00
    >>> with mt.no_grad():                                  # nothing to be learned from here on, so no graph
    ...     right = np.argmax(model(mt.Tensor(points)), axis=1) == labels
    >>> int(right.sum()), len(right)                        # every point is on the right side
    (200, 200)

    The gradient of the scores has a form worth knowing: what the model believes, minus what is so, over
    the number of points. The first point has label 0, so its row is (p0 - 1, p1) / 200.

    >>> scores = model(mt.Tensor(points))
    >>> dscores, = mt.grad(mt.cross_entropy(scores, labels), scores)
    >>> p = mt.softmax(scores).numpy()
    >>> bool(np.allclose(dscores.numpy()[0], (p[0] - [1, 0]) / 200, atol=1e-7))
    True
    """


def attention():
    """6. One head of attention

    Four tokens, each a vector of three numbers. In a head each token has a query (what it looks for), a
    key (what it offers) and a value (what it hands out). In a GPT three matrices make them from the
    vector. Here they are the vector itself, so that we can follow the numbers.

    >>> x = mt.Tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], requires_grad=True)
    >>> scores = x @ x.T / np.sqrt(3)                       # (T, T): query i against key j
    >>> seen = np.tri(4, dtype=bool)                        # token i sees itself and those before it
    >>> weights = mt.softmax(np.where(seen, scores, -np.inf))
    >>> print(np.round(weights.numpy(), 3))
    [[1.    0.    0.    0.   ]
     [0.36  0.64  0.    0.   ]
     [0.264 0.264 0.471 0.   ]
     [0.23  0.23  0.129 0.41 ]]

    Each row sums to 1. The first token sees only itself. The last one is like the first and the second,
    so it looks at them more than at the third, and most at itself.

    >>> out = weights @ x                                   # (T, C): each token's mixture of what it sees
    >>> print(np.round(out.numpy(), 3))
    [[1.    0.    0.   ]
     [0.36  0.64  0.   ]
     [0.264 0.264 0.471]
     [0.64  0.64  0.129]]

    What would make the last token's first number, 0.64, larger? Ask for the gradient of that one number.

    >>> dx, = mt.grad(out[3, 0], [x], retain_graph=True)    # the graph is kept, for the next question
    >>> print(np.round(dx.numpy(), 3))
    [[ 0.278  0.048  0.   ]
     [ 0.145 -0.085  0.   ]
     [ 0.081 -0.048  0.   ]
     [ 0.628  0.085 -0.048]]

    Had the weights been fixed, there would be a first column alone, and it would be the last row of the
    weights: 0.23, 0.23, 0.129, 0.41. All the rest comes back through the scores. The first token has a 1
    to give, so more attention to it helps: 0.048 on top, and as much in its second column, as the last
    token's query looks for both. The second and third have a 0 to give, so attention to them hurts.

    A masked token gets no gradient. The second token sees two, so of its first number rows three and four
    get none:

    >>> dx, = mt.grad(out[1, 0], [x])
    >>> print(np.round(dx.numpy(), 3))
    [[ 0.36   0.133  0.   ]
     [ 0.773 -0.266  0.   ]
     [ 0.     0.     0.   ]
     [ 0.     0.     0.   ]]

    The library's attention is all of this in one kernel, on queries, keys and values side by side.

    >>> packed = np.concatenate([x, x, x], axis=1)[None]    # (B, T, 3C)
    >>> bool(np.allclose(mt.attention(packed, 1).numpy()[0], out.numpy(), atol=1e-6))
    True

    Last, a loss for the page that shows its backward pass: each step with its numbers and the code that
    ran.

    >>> with mt.unfused():                                  # no kernels: attention as the ops it is made of
    ...     loss = np.mean(mt.attention(packed, 1) ** 2)
    >>> print(f"{loss.item():.4f}")
    0.2282
    """


LESSON = (product, order, expression, arrays, spirals, attention)


def teach(section):
    """Print a section and run its lines, each under its own line number of this file; returns its names."""
    names = {"np": np, "mt": mt, "nn": nn}
    first = section.__code__.co_firstlineno
    for part in doctest.DocTestParser().parse(textwrap.dedent("    " + section.__doc__)):
        if isinstance(part, str):
            print(part, end="")
            continue
        lines = part.source.splitlines()
        print("\n".join([">>> " + lines[0], *("... " + line for line in lines[1:])]))
        tree = ast.increment_lineno(ast.parse(part.source), first + part.lineno)
        exec(compile(ast.Interactive(tree.body), __file__, "single"), names)
    print()
    return names


def main(arguments=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", type=Path, default=Path("out/backward.html"), metavar="FILE",
                        help="where to write the page of the last backward pass (%(default)s)")
    page = parser.parse_args(arguments).page
    for section in LESSON:
        names = teach(section)
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        exec("mt.trace(loss).to_html(page)", names | {"page": page})     # there, so that it sees their names
    print(f"The backward pass of this last loss, step by step: open {page} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
