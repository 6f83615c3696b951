"""How a run starts: anew, from the weights of another (--init-from), or where it stopped (--resume)."""
from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import minitensor as mt
from gpt.checkpoint import load_model, load_run
from gpt.config import DEFAULT, RECIPES, Config
from gpt.corpus import Corpus, open_corpus
from gpt.data import check_length
from gpt.errors import BadInput
from gpt.results import BEST
from gpt.run import Run

# What a model computes; the other fields may change when training goes on from one.
OF_MODEL = {"layers", "heads", "width", "context", "bias", "positions", "qk_norm", "mlp"}


def begin(given: dict[str, Any], data: list[str] | None, precision: str,
          init_from: Path | None) -> tuple[Run, Corpus]:
    """A run at its first step, and its text.

    init_from: a checkpoint that gives weights, vocabulary and the config's defaults (but for --minutes); the
    optimizer is fresh.
    """
    config, model, tokenizer = dataclasses.replace(RECIPES[DEFAULT], **given), None, None
    if init_from is not None:
        model, tokenizer = load_model(init_from)
        refused = _differences({k: v for k, v in given.items() if k in OF_MODEL}, model.config)
        if refused:
            raise BadInput(f"--init-from: {str(init_from)!r} is another model: {'; '.join(refused)}; "
                           "leave these options out")
        config = dataclasses.replace(model.config, **{"minutes": 0.0, **given})
    corpus = open_corpus(data, tokenizer)
    check_length(corpus.train, corpus.validation, config.context)
    mt.seed(config.seed)
    run = Run.new(config, corpus.tokenizer, _source(corpus, data, precision))
    if model is not None:
        run.model.load_state_dict(model.state_dict())
    return run, corpus


def take_up(path: Path, given: dict[str, Any], data: list[str] | None,
            precision: str | None) -> tuple[Run, Corpus]:
    """The run in a checkpoint, where it stopped, and its text; BadInput lists what is asked otherwise.

    Options that are not given (precision: None) are the run's.
    """
    try:
        run = load_run(path)
    except BadInput as error:
        if not (path.exists() and path.with_name(BEST).exists()):
            raise
        raise BadInput(f"{error}; {BEST} beside it holds the run at its best evaluation: --resume takes that "
                       f"up once it is renamed to {path.name}") from error
    corpus = open_corpus(data or _paths(run.source), run.tokenizer)
    kept = run.source.setdefault("precision", "highest")
    asked = _source(corpus, data, precision or kept)
    differ = _differences(given, run.config)
    if asked["sha256"] != run.source.get("sha256"):
        differ.append(f"the text is {asked['name']} (sha256 {asked['sha256'][:12]}), the run has "
                      f"{run.source.get('name')} (sha256 {run.source.get('sha256', '')[:12]})")
    if asked["precision"] != kept:
        differ.append(f"--precision is {asked['precision']}, the run has {kept}")
    if differ:
        raise BadInput(f"--resume: this is not the run in {str(path.parent)!r}: {'; '.join(differ)}; give "
                       "the run's own values, or leave --resume out to start anew")
    return run, corpus


def _differences(given: dict[str, Any], config: Config) -> list[str]:
    """How the fields given differ from a config's, one phrase each."""
    return [f"--{name.replace('_', '-')} is {value}, the run has {getattr(config, name)}"
            for name, value in given.items() if value != getattr(config, name)]


def _paths(source: dict[str, str]) -> list[str]:
    """The --data of a run, as `_source` wrote it; BadInput for anything else."""
    try:
        paths = json.loads(source["data"])
    except (KeyError, ValueError, RecursionError) as error:
        raise BadInput(f"--resume: the checkpoint does not say where its text is: {error!r}") from error
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadInput(f"--resume: the checkpoint's text is {source['data']!r:.100}; give --data")
    return paths


def _source(corpus: Corpus, data: list[str] | None, precision: str) -> dict[str, str]:
    paths = json.dumps([os.path.abspath(path) for path in data or ()])
    return {"data": paths, "name": corpus.name, "sha256": corpus.sha256, "precision": precision}
