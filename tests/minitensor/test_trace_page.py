"""The trace's page: what is in it, how its graph is laid out, and that it works in a real browser."""
import base64
import contextlib
import html.parser
import itertools
import json
import re
import time

import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.model import GPT
from minitensor import nn
from minitensor.page import GAP, WIDTH, layout, trace_html
from minitensor.tensor import Tensor

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>\u2028&amp;"


def gpt_trace(layers=4, unfused=True):                       # by default a GPT of the default size
    mt.seed(0)
    model = GPT(Config(layers=layers), 65)
    ids = np.random.default_rng(0).integers(0, 65, (2, 12, 64))
    with mt.unfused() if unfused else contextlib.nullcontext():
        return model, mt.trace(mt.cross_entropy(model(ids[0]), ids[1]))


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Evil(nn.Module):
    def __init__(self):
        self.parts = {EVIL: nn.Linear(2, 2)}

    def forward(self, x):
        return self.parts[EVIL](x)


def evil_trace():
    mt.seed(0)
    names = {"net": Evil(), "x": Tensor([1.0, 2.0]), "np": np}
    exec(compile("loss = np.sum(net(x))", f"/tmp/{EVIL}.py", "exec"), names)
    return mt.trace(names["loss"])


# ---- the file ----------------------------------------------------------------------------------------------

class Tags(html.parser.HTMLParser):
    """Counts tags, and collects whatever would be loaded from elsewhere."""
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "action")]


def test_page_is_self_contained_and_escaped():
    trace = evil_trace()
    page = trace_html(trace)
    tags = Tags()
    tags.feed(page)
    assert tags.tags.count("script") == 2 and "img" not in tags.tags and not tags.links
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", page) and "@import" not in page
    steps = data_of(page)["steps"]
    assert steps[1]["module"] == f"parts.{EVIL}" and steps[0]["file"] == f"/tmp/{EVIL}.py"


@pytest.mark.parametrize("unfused", [False, True])
def test_page_of_a_default_gpt_is_below_5_mb(tmp_path, unfused):
    _, trace = gpt_trace(unfused=unfused)
    start = time.perf_counter()
    trace.to_html(tmp_path / "backward.html")
    assert time.perf_counter() - start < 3
    assert (tmp_path / "backward.html").stat().st_size < 5e6
    data = data_of((tmp_path / "backward.html").read_text())
    assert Config().layers == 4 and len(data["steps"]) == len(trace) == (284 if unfused else 68)
    for step, written in zip(trace, data["steps"], strict=True):
        array = data["arrays"][written["gradient"]]
        assert array["mean"] == pytest.approx(step.gradient.mean, rel=1e-6)
        assert array["shape"] == list(step.shape)


def test_numbers_that_are_not_finite():
    x = Tensor(np.array([[0.0, np.inf, np.nan]]), True)
    many = Tensor(np.full((9, 9), -np.inf), True)
    data = data_of(trace_html(mt.trace(np.sum(x * 2) + np.sum(many))))
    arrays = {tuple(a["shape"]): a for a in data["arrays"] if a["nonfinite"]}
    assert arrays[1, 3]["numbers"] == [0, "inf", "nan"] and arrays[1, 3]["nonfinite"] == 2
    assert arrays[9, 9]["nonfinite"] == 81 and arrays[9, 9]["min"] is None
    levels = np.frombuffer(base64.b64decode(arrays[9, 9]["levels"]), np.int8)
    assert levels.tolist() == [-127] * 81                    # of finite numbers, at the most 126


def test_notebooks():
    x = Tensor([[1.0, -2.0], [0.0, np.nan]], True)
    loss = np.sum(x[0] * 3)
    text = loss._repr_html_()
    assert "() float32, made by sum" in text and ">-3</td>" in text
    trace = mt.trace(loss)
    text = x._repr_html_()
    for part in ("requires a gradient", "gradient</div>", ">nan</td>", ">3</td>"):
        assert part in text
    assert "32 of 40 columns" in Tensor(np.ones((3, 40)))._repr_html_()
    frame = trace._repr_html_()
    assert frame.count("<") == 2 and 'sandbox="allow-scripts"' in frame
    assert evil_trace()._repr_html_().count("<") == 2


# ---- the layout --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unfused", [False, True])
def test_boxes_do_not_overlap_and_edges_go_down(unfused):
    _, trace = gpt_trace(unfused=unfused)
    x, layer, buses = layout(trace.steps)
    rows = {}
    for i, (step, bus) in enumerate(zip(trace, buses, strict=True)):
        rows.setdefault(layer[i], []).append((x[i], WIDTH))
        for k, at in enumerate(bus):
            rows.setdefault(layer[i] - len(bus) + k, []).append((at, 0))
        assert all(layer[flow.step] > layer[i] for flow in step.sent)
        reach = max((layer[i] - layer[flow.step] for flow in step.received), default=1)
        assert len(bus) == reach - 1                         # every edge goes from a layer to the next
    for row in rows.values():
        for (a, wide_a), (b, wide_b) in itertools.pairwise(sorted(row)):
            assert b - a >= (wide_a + wide_b) / 2 + GAP - 0.2


def test_layers_are_longest_ways():
    x = Tensor(np.float64(2.0), True)
    y = np.exp(x)
    _, layer, buses = layout(mt.trace(y * np.sin(np.cos(y))).steps)
    assert layer == [0, 1, 2, 3, 4]
    assert [len(bus) for bus in buses] == [0, 0, 0, 2, 0]    # y's gradient from the product passes two layers


def test_a_deep_chain_is_laid_out_soon():
    x, w = Tensor(np.float64(1.0), True), Tensor(np.float64(0.999), True)
    y, total = x, 0.0
    for _ in range(1500):
        y = y * w
        total = total + y                                    # as lines these would have millions of points
    trace = mt.trace(total)
    start = time.perf_counter()
    assert len(data_of(trace_html(trace))["steps"]) == 3002
    assert time.perf_counter() - start < 20


# ---- the page in Chromium ----------------------------------------------------------------------------------

@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a trace's page; at the end nothing may have been complained of, or asked of a network."""
    complaints, pages = [], []

    def open_it(trace, width=1280, height=800, **options):
        trace.to_html(tmp_path / "backward.html")
        page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce",
                                **options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto((tmp_path / "backward.html").as_uri())
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert not complaints


def shown(x, digits=4):
    """A number as the page writes it."""
    if x and (abs(x) < 1e-3 or abs(x) >= 1e6):
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{float(f'{x:.{digits}g}'):.10g}"
    return text.replace("-", "\N{MINUS SIGN}")


@pytest.mark.browser
def test_steps_through_a_gpt_by_key(open_page):
    """All steps by key, and at three of them the gradient that grad computes."""
    model, trace = gpt_trace(layers=3)
    page = open_page(trace)
    assert page.locator(".node").count() == len(trace) == 219
    for i, step in enumerate(trace):
        counter, op, lit, done, inside = page.evaluate("""() => {
            const text = what => document.querySelector(what).textContent;
            const of = what => document.querySelector(what).getBoundingClientRect();
            const box = of(".node.now"), graph = of("#graph");
            return [text("#counter"), text("#op"), text(".node.now .number"),
                    document.querySelectorAll(".node.done").length, graph.left <= box.left &&
                    box.right <= graph.right && graph.top <= box.top && box.bottom <= graph.bottom];
        }""")
        assert (counter, lit, done, inside) == (f"{i} / 218", str(i), i + 1, True)
        assert op.startswith(step.name if step.op == "leaf" else step.op)
        page.keyboard.press("ArrowRight")
    assert page.locator("#counter").inner_text() == "218 / 218"

    ids = np.random.default_rng(0).integers(0, 65, (2, 12, 64))
    with mt.unfused():
        logits = model(ids[0])
        loss = mt.cross_entropy(logits, ids[1])
    qkv, positions = model.blocks[2].attention.qkv.weight, model.positions
    wanted = dict(zip(("head", "blocks.2.attention.qkv.weight", "positions"),
                      mt.grad(loss, (logits, qkv, positions)), strict=True))
    for name, g in wanted.items():
        i = next(i for i, step in enumerate(trace) if name in (step.name, step.module))
        page.locator("#jump").fill(str(i))
        text = page.locator("#gradient").inner_text()
        g = g.numpy()
        for what in (f"mean {shown(g.mean(dtype=float))}", f"{shown(g.min())} to {shown(g.max())}",
                     f"std {shown(g.std(dtype=float))}"):
            assert what in text.replace("\n", " "), (name, what, text)


@pytest.mark.browser
def test_buttons_keys_search_and_play(open_page):
    a, b = Tensor(np.float64(-4.0), True), Tensor(np.float64(2.0), True)
    c = a * b
    d = c + b ** 3
    trace = mt.trace(np.exp(d * 0.125))
    page = open_page(trace)
    counter, last = page.locator("#counter"), len(trace) - 1
    for button, step in (("#forward", 1), ("#forward", 2), ("#back", 1), ("#last", last), ("#first", 0)):
        page.click(button)
        assert counter.inner_text() == f"{step} / {last}"
    for key, step in (("End", last), ("ArrowRight", last), ("ArrowLeft", last - 1), ("Home", 0),
                      ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert counter.inner_text() == f"{step} / {last}"

    page.keyboard.press(" ")                                 # plays, and stops at the end
    assert page.get_attribute("#play", "aria-label") == "Pause"
    page.wait_for_selector(f"text='2 / {last}'")
    page.keyboard.press(" ")
    assert page.get_attribute("#play", "aria-label") == "Play"
    page.wait_for_timeout(700)
    assert counter.inner_text() == f"2 / {last}"

    page.keyboard.press("/")
    page.keyboard.type("power")
    assert page.locator("#op").inner_text() == "power" and page.locator("#hits").inner_text() == "1 of 1"
    page.fill("#search", "test_trace_page.py ()")
    assert page.locator("#hits").inner_text() == f"4 of {last - 1}"
    page.keyboard.press("Enter")
    assert page.locator("#hits").inner_text() == f"5 of {last - 1}"
    page.keyboard.press("ArrowRight")                        # moves in the text, not in the trace
    page.keyboard.press("Shift+Enter")
    assert page.locator("#hits").inner_text() == f"4 of {last - 1}"
    page.fill("#search", "nothing like it")
    assert page.locator("#hits").inner_text() == "no match"
    page.keyboard.press("Escape")
    assert page.locator("#hits").inner_text() == "" and page.locator(".node.dim").count() == 0

    product = next(i for i, step in enumerate(trace) if step.name == "c")
    page.locator(".node").nth(product).click()
    assert page.locator("#op").inner_text() == "multiply c"
    assert page.locator("#expression").inner_text() == "a * b"
    page.locator("#sent .go").first.click()                  # to a
    assert page.locator("#op").inner_text() == "a" and "grad 0.25" in page.locator(".node.now").text_content()
    assert page.locator("#gradient .cells").inner_text() == "0.25"
    page.locator("#graph").hover()
    page.mouse.wheel(0, -300)
    assert float(re.search(r"scale\((.*)\)", page.get_attribute("#scene", "transform"))[1]) > 1
    page.keyboard.press("0")
    boxes = [page.locator(".node").nth(i).bounding_box() for i in (0, last)]
    assert all(54 <= box["y"] <= 800 for box in boxes)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_nothing_overflows_or_fades(open_page, width, scheme):
    """No sideways scrolling at desktop and phone width, no cut number, and text that can be read."""
    mt.seed(0)
    x, net = Tensor(np.linspace(-1, 1, 24).reshape(4, 6).astype(np.float32)), nn.Linear(6, 8)
    trace = mt.trace(np.mean(np.tanh(net(x) * 1e-5)[:, :4] ** 2))
    page = open_page(trace, width=width, height=844, color_scheme=scheme)
    for _ in trace:
        too_wide = page.evaluate("""() => ["html", "#panel", ".cells span"].flatMap(what =>
            [...document.querySelectorAll(what)].filter(e => e.scrollWidth > e.clientWidth + 1)
                                                .map(e => `${what} ${e.clientWidth} ${e.textContent}`))""")
        assert not too_wide
        page.keyboard.press("ArrowRight")
    contrast = page.evaluate("""() => {
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = text => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(v => linear(v / 255));
            return .2126 * r + .7152 * g + .0722 * b + .05;
        };
        const of = (what, ground) => {
            const a = light(getComputedStyle(document.querySelector(what)).color);
            const b = light(getComputedStyle(document.querySelector(ground)).backgroundColor);
            return Math.max(a, b) / Math.min(a, b);
        };
        const cells = [...document.querySelectorAll(".cells span")].map(cell => {
            const a = light(getComputedStyle(cell).color), b = light(cell.style.backgroundColor);
            return Math.max(a, b) / Math.min(a, b);
        });
        return [...["h2", "#kicker", ".statistics", ".go"].map(what => of(what, "#panel")), ...cells];
    }""")
    assert min(contrast) >= 4.5


@pytest.mark.browser
def test_evil_names_stay_names(open_page):
    page = open_page(evil_trace())
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.title() == "Backward pass" and page.locator("img").count() == 0
    assert "</script>" in page.locator("#op").inner_text() + page.locator("#kicker").inner_text()


@pytest.mark.browser
def test_in_a_notebooks_frame(open_page, browser, tmp_path):
    a = Tensor(np.float64(3.0), True)
    frame = mt.trace(a * a)._repr_html_()
    page = browser.new_page()
    page.set_content(frame)
    inner = page.frame_locator("iframe")
    inner.locator("#forward").click()
    assert inner.locator("#counter").inner_text() == "1 / 1"
    page.close()
