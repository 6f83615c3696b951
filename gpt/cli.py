"""What all commands share: errors of one line, exit codes, and an orderly end at Ctrl-C."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from gpt.errors import BadInput, Diverged

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; --help lists the options")


def run(command: Callable[[list[str] | None], int], arguments: list[str] | None = None) -> int:
    """A command's exit code: its own, or after one line that says why, one of those above."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")        # a text in symbols that the terminal lacks
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except BadInput as error:
        return _end(f"error: {error}", BAD_INPUT)
    except MemoryError as error:
        return _end(f"error: the memory does not hold this: {error or 'choose smaller sizes'}", BAD_INPUT)
    except Diverged as error:
        return _end(f"error: {error}", DIVERGED)
    except KeyboardInterrupt:
        return _end("interrupted", INTERRUPTED)
    except BrokenPipeError:                                      # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _end(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt, at a place of choice, once Ctrl-C or SIGTERM came.

    An exception at any moment would be lost in a destructor or a callback, or cut a save in two. The second
    signal ends the process at once. In a thread other than the main one nothing changes.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            os._exit(INTERRUPTED)
        pressed.append(number)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, of a full disk say, into BadInput that names the file."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
