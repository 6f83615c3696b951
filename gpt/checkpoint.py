"""Checkpoints: named arrays and a few strings in one safetensors file, whole or not there at all."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config import Config
from gpt.data import replacing
from gpt.errors import BadInput, require
from gpt.model import GPT
from gpt.run import Progress, Run
from gpt.tokenizer import CharTokenizer
from minitensor.random import set_state

Array = NDArray[Any]
FORMAT = {"format": "minitensor-gpt", "version": "1"}
# safetensors' name of each dtype that numpy has too
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def save(path: str | PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays and metadata to path, replacing what was there only once the new file is on disk.

    Raises BadInput when the file cannot be written, for dtypes outside `DTYPES`, and for the metadata keys
    that are ours: format, version, sha256.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    shown = repr(os.fspath(path))
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES.values():
            possible = ", ".join(DTYPES.values())
            raise BadInput(f"{shown}: array {name!r} is {array.dtype}; {possible} can be saved")
        if name == "__metadata__":
            raise BadInput(f"{shown}: array {name!r} has the name of the metadata; choose another name")
    if taken := sorted({*FORMAT, "sha256"} & metadata.keys()):
        raise BadInput(f"{shown}: metadata {taken[0]!r} is the file's own; choose another key")
    # safetensors writes raw memory, so strides and byte order must be plain
    plain = {name: np.asarray(a, a.dtype.newbyteorder("="), order="C") for name, a in arrays.items()}
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, {**metadata, **FORMAT, "sha256": _digest(plain, metadata)})
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{shown}: cannot write the checkpoint: {_line(error)}") from error


def load(path: str | PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and the metadata that `save` wrote, every bit of them checked.

    Raises BadInput for a file that is missing, cut short, changed since, or not a checkpoint of ours.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open
    shown = repr(os.fspath(path))
    arrays: dict[str, Array] = {}
    try:
        with open(path, "rb"):
            pass  # for the system's own words when the file is missing or unreadable
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key, expected in FORMAT.items():
                if metadata.pop(key, None) != expected:
                    raise BadInput(f"{shown}: not a checkpoint of this program ({key} is not {expected!r})")
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise BadInput(f"{shown}: array {name!r} is {dtype}; {', '.join(DTYPES)} can be read")
                arrays[name] = file.get_tensor(name)
    except BadInput:
        raise
    except OSError as error:
        missing = "; train_shakespeare.py makes one" * isinstance(error, FileNotFoundError)
        raise BadInput(f"{shown}: cannot read the checkpoint: {_line(error)}{missing}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise BadInput(f"{shown}: not a whole safetensors file: {_line(error)}") from error
    if metadata.pop("sha256", None) != _digest(arrays, metadata):
        raise BadInput(f"{shown}: damaged: its content does not match its checksum; use an older checkpoint")
    return arrays, metadata


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """The sha256 of everything that `load` returns: names, dtypes, shapes, bytes and metadata."""
    names = sorted(arrays)
    header = [[name, arrays[name].dtype.name, arrays[name].shape] for name in names]
    digest = hashlib.sha256(json.dumps([header, sorted(metadata.items())]).encode())
    for name in names:
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error.strerror if isinstance(error, OSError) and error.strerror else error).split())


# ---- a run, and the model in it ----------------------------------------------------------------------------

LAST = "checkpoint.safetensors"                                  # in a run's folder, the run as last saved
OPTIMIZER = "optimizer."                                         # before the names of the optimizer's arrays


def save_run(path: str | PathLike[str], run: Run) -> None:
    """Write a run as one file, so that its parts always fit together. Raises BadInput as `save`."""
    metadata = {"config": json.dumps(dataclasses.asdict(run.config)), "tokenizer": run.tokenizer.to_json(),
                "progress": run.progress.to_json(), "source": json.dumps(run.source)}
    optimizer = {OPTIMIZER + name: array for name, array in run.optimizer.state_dict().items()}
    save(path, {**run.model.state_dict(), **optimizer}, metadata)


def load_run(path: str | PathLike[str]) -> Run:
    """Return the run that `save_run` wrote; BadInput for anything else. Sets minitensor's random numbers."""
    arrays, metadata = load(path)
    with _described(path):
        config, tokenizer = _config(arrays, metadata)
        source = json.loads(metadata["source"])
        if not isinstance(source, dict) or not all(isinstance(value, str) for value in source.values()):
            raise ValueError(f"source is {metadata['source']!r:.100}")
        run = Run.new(config, tokenizer, source)
        run.progress = Progress.from_json(metadata["progress"])
        run.model.load_state_dict(_of_model(arrays))
        run.optimizer.load_state_dict({name.removeprefix(OPTIMIZER): array for name, array in arrays.items()
                                       if name.startswith(OPTIMIZER)})
        set_state(run.progress.random)
    return run


def load_model(path: str | PathLike[str]) -> tuple[GPT, CharTokenizer]:
    """Return the model and the tokenizer of the run that `save_run` wrote; BadInput for anything else.

    path: a checkpoint, or the folder of a run, for its last.
    """
    path = os.path.join(path, LAST) if os.path.isdir(path) else path
    arrays, metadata = load(path)
    with _described(path):
        config, tokenizer = _config(arrays, metadata)
        model = GPT(config, len(tokenizer))
        model.load_state_dict(_of_model(arrays))
    return model, tokenizer


@contextmanager
def _described(path: str | PathLike[str]) -> Iterator[None]:
    """Turn whatever a checkpoint with content of the wrong kind leads to into BadInput."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError,
            MemoryError) as error:
        raise BadInput(f"{os.fspath(path)!r}: not a run of this program: {_line(error)}") from error


def _config(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[Config, CharTokenizer]:
    """The config and the tokenizer; ValueError if their model would be larger than the file's arrays."""
    tokenizer = CharTokenizer.from_json(metadata["tokenizer"])
    config = Config(**json.loads(metadata["config"]))
    places = config.context if config.positions == "learned" else 0
    least = config.layers * config.width**2 + (len(tokenizer) + places) * config.width
    held = sum(array.size for array in _of_model(arrays).values())
    if least > held:
        raise ValueError(f"its config asks for {least:,} parameters or more, it holds {held:,}")
    return config, tokenizer


def _of_model(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if not name.startswith(OPTIMIZER)}
