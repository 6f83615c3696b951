"""The lesson's sections are doctests; here, that the command prints them all and writes the page."""
import re
from pathlib import Path

import pytest

import minitensor as mt
from examples import study_backprop


class Page:
    """What `minitensor.trace` gives, as far as the lesson uses it."""

    def __init__(self, loss):
        self.loss = loss

    def to_html(self, path):
        Path(path).write_text(f"<html>{self.loss.item():.4f}")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.setattr(mt, "trace", Page, raising=False)


def test_the_lesson_prints_what_it_promises_and_writes_the_page(pages, tmp_path, capsys):
    page = tmp_path / "folder" / "backward.html"
    assert study_backprop.main(["--page", str(page)]) == 0
    printed = capsys.readouterr().out
    expected = "\n".join(re.sub(r"^    ", "", section.__doc__, flags=re.MULTILINE).rstrip()
                         for section in study_backprop.LESSON)
    for line in expected.replace("<BLANKLINE>", "").splitlines():
        assert line in printed
    for number in ("24.7041", "138.8338", "645.5773"):
        assert number in printed
    assert page.read_text() == "<html>0.2282" and str(page) in printed


def test_the_lessons_lines_are_those_of_its_file(pages, tmp_path, monkeypatch):
    loss = study_backprop.teach(study_backprop.product)["c"]
    assert loss.item() == -6
    source = Path(study_backprop.__file__).read_text().splitlines()
    raised = []
    monkeypatch.setattr(mt, "relu", lambda x: 1 / 0)
    try:
        study_backprop.teach(study_backprop.expression)
    except ZeroDivisionError as error:
        place = error.__traceback__.tb_next.tb_next
        raised = [place.tb_frame.f_code.co_filename, source[place.tb_lineno - 1].strip()]
    assert raised[0] == study_backprop.__file__ and raised[1].startswith(">>> d = d + d * 2 + mt.relu(b + a)")


def test_a_page_that_cannot_be_written_is_one_line(pages, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study_backprop.run(study_backprop.main, ["--page", str(tmp_path / "file" / "page.html")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
