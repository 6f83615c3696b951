"""The report is one page that needs nothing else, and shows a text as a text."""
import base64
import itertools
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from gpt import command
from gpt.baselines import baselines
from gpt.checkpoint import load_run
from gpt.corpus import open_corpus
from gpt.errors import Diverged
from gpt.report import chart, png, report, ticks
from gpt.results import Results
from gpt.verse import verse

TINY = ["--recipe", "classic", "--layers", "2", "--heads", "2", "--width", "16", "--context", "16", "--batch",
        "4", "--steps", "60", "--eval-every", "4", "--quiet"]
EVIL = '<script>alert("x")</script>&amp;\x07\'--><b>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "<b>&verse.txt").write_text(verse(2000) + EVIL)
    arguments = ["--data", str(folder / "<b>&verse.txt"), "--out", str(folder / "out"), *TINY]
    assert command.main([*arguments, "--stop-after", "30"]) == 0
    page = (folder / "out" / "report.html").read_text()
    assert 'http-equiv="refresh"' not in page and '<b id="state">stopped</b>' in page
    assert command.main([*arguments, "--resume"]) == 0
    return folder


@pytest.fixture
def train(tmp_path):
    (tmp_path / "verse.txt").write_text(verse(2000))
    data, out = str(tmp_path / "verse.txt"), str(tmp_path / "out")
    return lambda *more: command.main(["--data", data, "--out", out, *TINY, *more])


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The tags of a page, which must nest, and its text."""
    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_it_needs_nothing_else(page):
    tags = Tags(page)
    assert not {tag for tag, *_ in tags.attributes} & {"script", "link", "iframe"}
    for _, name, value in tags.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:image/png;base64,")
    assert "url(" not in page and "@import" not in page and 'http-equiv="refresh"' not in page


def test_everything_is_on_it(folder, page):
    run, text = load_run(folder / "out" / "checkpoint.safetensors"), Tags(page).text
    last = run.progress.evaluations[-1]
    for shown in (f"{last.val_loss:.4f}", f"{last.val_bits:.4f}", "uniform", "unigram", "bigram",
                  "learning rate", "norm of the gradients", "tokens a second", run.source["sha256"],
                  "numpy", "blocks.1", "eval_every", "done"):
        assert shown in text, shown
    assert page.count("<polyline") == 6
    assert page.count("<img") == 4, "an attention map for each head of each layer"
    for step, _ in (run.progress.samples[0], run.progress.samples[-1]):
        assert f"step {step:,}" in text


def test_a_text_is_escaped(folder):
    run = load_run(folder / "out" / "checkpoint.safetensors")
    corpus = open_corpus(json.loads(run.source["data"]), run.tokenizer)
    run.progress.samples.append((60, EVIL))
    page = report(run, corpus, baselines(corpus.train, corpus.validation, len(run.tokenizer)))
    assert "<script" not in page and "<b>&amp;" not in page and "\x07" not in page
    assert EVIL.replace("\x07", "␇") in Tags(page).text
    assert "<b>&verse.txt" in Tags(page).text


def test_it_changes_nothing(folder):
    """Neither the weights, nor the random numbers, nor the gradients."""
    from minitensor.random import get_state
    run = load_run(folder / "out" / "checkpoint.safetensors")
    corpus = open_corpus(json.loads(run.source["data"]), run.tokenizer)
    before, random = {name: a.copy() for name, a in run.model.state_dict().items()}, get_state()
    first, second = (report(run, corpus, {}) for _ in range(2))
    assert first == second and get_state() == random
    for name, p in run.model.named_parameters():
        assert p.grad is None and p.data.tobytes() == before[name].tobytes()


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(5, 1e-30), (9, 3e30)],
                                    [(1, -3.0), (10**9, 4.0)]])
def test_a_chart_of_anything(points):
    drawn = chart("a < b", {"x": points}, {"level": 1.0})
    assert "nan" not in drawn and "inf" not in drawn and "a &lt; b" in drawn
    Tags(drawn)


def test_ticks_are_round_and_few():
    for low, high in [(0, 1), (1.37, 4.2), (0, 2000), (-3, 3), (0.99, 1.01), (0, 1e-9)]:
        found = ticks(low, high)
        assert 3 <= len(found) <= 11 and low <= found[0] and found[-1] <= high
        assert len({round(b - a, 15) for a, b in itertools.pairwise(found)}) <= 2


def test_a_picture_is_a_picture():
    data = base64.b64decode(png(np.array([[0.5, 0.0, 0.25]])).removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    start = data.index(b"IDAT") + 4
    pixels = zlib.decompress(data[start:data.index(b"IEND") - 8])
    assert re.fullmatch(rb"\0\x10\x3c\x82\xff\xff\xff...", pixels, re.DOTALL)


def test_a_page_says_how_its_run_goes(train, tmp_path, monkeypatch):
    """Written during the run, it looks for news by itself; once the run has ended it does not."""
    pages = []
    plain = Results.after_evaluation

    def after_evaluation(self, *arguments):
        plain(self, *arguments)
        pages.append((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
        if len(pages) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(Results, "after_evaluation", after_evaluation)
    assert train() == 130
    assert all('http-equiv="refresh"' in page and '<b id="state">running</b>' in page for page in pages)
    report = tmp_path / "out" / "report.html"
    page = report.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in page and '<b id="state">interrupted</b>' in page
    monkeypatch.setattr(command, "train", lambda *arguments: pages.append(report.read_text(encoding="utf-8")))
    assert train("--resume") == 0
    assert '<b id="state">running</b>' in pages[-1], "a run that goes on says so at once"
    assert '<b id="state">stopped</b>' in report.read_text(encoding="utf-8")

    def diverge(*arguments):
        raise Diverged("the loss is nan")
    monkeypatch.setattr(command, "train", diverge)
    assert train("--resume") == 3 and '<b id="state">diverged</b>' in report.read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows_and_nothing_is_asked_for(browser, folder, width):
    complaints = []
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or
            complaints.append(request.url))
    page.goto((folder / "out" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("[...document.querySelectorAll('svg')]"
                         ".every(svg => svg.getBoundingClientRect().height > 20)")
    page.close()
    assert not complaints
