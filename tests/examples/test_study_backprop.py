"""The lesson's sections are doctests; here, that the command prints them all and writes the page."""
import re
from pathlib import Path

import minitensor as mt
from examples import study_backprop


def test_the_lesson_prints_what_it_promises_and_writes_the_page(tmp_path, capsys):
    page = tmp_path / "folder" / "backward.html"
    assert study_backprop.main(["--page", str(page)]) == 0
    printed = capsys.readouterr().out
    expected = "\n".join(re.sub(r"^    ", "", section.__doc__, flags=re.MULTILINE).rstrip()
                         for section in study_backprop.LESSON)
    for line in expected.replace("<BLANKLINE>", "").splitlines():
        assert line in printed
    for number in ("24.7041", "138.8338", "645.5773"):
        assert number in printed
    written = page.read_text()
    assert '"numbers":[0.22819' in written and '"name":"loss"' in written, "the last loss, by its name"
    assert "study_backprop.py" in written and str(page) in printed


def test_the_lessons_lines_are_those_of_its_file(tmp_path, monkeypatch):
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


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study_backprop.run(study_backprop.main, ["--page", str(tmp_path / "file" / "page.html")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
