"""What a run is trained on: the tokens of a text, whence they came, and what was noticed on the way."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpt.data import find_text, split
from gpt.tokenizer import CharTokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokens to train and to validate on, one a character."""
    train: np.ndarray
    validation: np.ndarray
    tokenizer: CharTokenizer
    name: str
    where: str                               # a phrase for people
    sha256: str                              # of the text's bytes
    notes: tuple[str, ...]                   # on characters that somebody should know of


def open_corpus(path: str | None, tokenizer: CharTokenizer | None = None) -> Corpus:
    """The text that `find_text` finds, in tokens: of its own vocabulary, or of the tokenizer given.

    Characters that a given tokenizer lacks are left out, and a note says so.
    """
    text = find_text(path)
    notes = []
    if tokenizer is None:
        tokenizer = CharTokenizer.from_text(text.text)
    ids, unknown = tokenizer.encode_known(text.text)
    if unknown:
        notes.append(f"{sum(unknown.values()):,} characters that the model's vocabulary lacks were left out: "
                     + _shown(unknown))
    train, validation = split(ids)
    seen = np.bincount(train, minlength=len(tokenizer)) > 0
    new = np.bincount(validation[~seen[validation]], minlength=len(tokenizer))
    if new.any():
        notes.append(f"{new.sum():,} characters to validate on never occur where it trains, and count: "
                     + _shown(tokenizer.vocabulary[i] for i in np.flatnonzero(new)))
    digest = hashlib.sha256(text.text.encode()).hexdigest()
    return Corpus(train, validation, tokenizer, text.name, text.source, digest, tuple(notes))


def _shown(characters: Iterable[str]) -> str:
    """At most ten of the characters, as Python writes them."""
    listed = [repr(character) for character in characters]
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")
