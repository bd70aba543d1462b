"""Recorded results: one JSON a run, with everything needed to judge and repeat it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import jsonschema
import numpy
import pandas as pd
import torch
import transformers
from filelock import FileLock, Timeout

from . import __version__
from .metrics import Rate, mean_interval, wilson
from .status import processor

FOLDER = Path(__file__).resolve().parent.parent / "data" / "results"

_RATE = {"type": "object", "required": ["value", "n", "low", "high"],
         "properties": {"value": {"type": "number"}, "n": {"type": "integer", "minimum": 1},
                        "low": {"type": "number"}, "high": {"type": "number"}}}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "one run",
    "type": "object",
    "required": ["study", "name", "method", "task", "scale", "settings", "data", "seed",
                 "metrics", "reported", "seconds", "hardware", "versions", "command", "date"],
    "additionalProperties": False,
    "properties": {
        "study": {"type": "string"}, "name": {"type": "string"}, "method": {"type": "string"},
        "task": {"type": "string"}, "scale": {"enum": ["small", "full"]},
        "settings": {"type": "object"},
        "data": {"type": "string", "description": "fingerprint of the three roles"},
        "seed": {"type": "integer"},
        "metrics": {"type": "object", "minProperties": 1,
                    "additionalProperties": {"anyOf": [_RATE, {"type": "number"}]}},
        "reported": {"description": "the figure a paper reports for this, or null",
                     "anyOf": [{"type": "null"},
                               {"type": "object", "required": ["source", "values"]}]},
        "history": {"type": "array", "items": {"type": "object"},
                    "description": "what was measured after each cycle, if a study keeps it"},
        "seconds": {"type": "object", "additionalProperties": {"type": "number"}},
        "hardware": {"type": "string"},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "command": {"type": "string", "description": "repeats this run"},
        "date": {"type": "string"},
    },
}
_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)  # made once: a sweep reads many records


def hardware() -> str:
    """Name the machine: processor or GPU, and threads.

    Source: ours.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{processor()}, {torch.get_num_threads()} threads"


def record(*, metrics: dict[str, Rate | float], seconds: dict[str, float],
           reported: dict | None = None, **fields) -> dict:
    """Make the record of one run.

    Args:
        metrics: rates (with n and interval) and plain numbers by name.
        seconds: wall time by step.
        reported: {"source": ..., "values": ...} if a paper reports the same, else None.
        fields: study, name, method, task, scale, settings, data, seed, command.
    Returns: a dictionary that satisfies `SCHEMA`.
    Raises: jsonschema.ValidationError if it does not.
    Source: ours.
    """
    made = {
        **fields, "reported": reported, "hardware": hardware(),
        "metrics": {name: vars(m) if isinstance(m, Rate) else m for name, m in metrics.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": {"bdutils": __version__, "python": platform.python_version(),
                     "torch": torch.__version__, "transformers": transformers.__version__,
                     "numpy": numpy.__version__},
        "date": datetime.date.today().isoformat(),
    }
    _VALIDATOR.validate(made)
    return made


def place(study: str, name: str, folder: Path | None = None) -> Path:
    """Return where the record of a run is kept.

    Args: study, name: of the run; folder: of all studies, `data/results` if None.
    Source: ours.
    """
    return (folder or FOLDER) / study / f"{name}.json"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a record while it is made.

    Args:
        path: of the record.
        wait: until whoever holds the lock lets go of it.

    Returns:
        A context that gives True, or False if somebody else holds the lock. It is the operating
        system's, so that it ends with the process, however that ends.

    Source: ours.
    """
    lock = FileLock(path.with_name(f".{path.stem}.lock"), blocking=wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:  # no lock can be had here, as on some network drives: go on without
        yield True
        return
    try:
        yield True
    finally:  # whoever opened the file before it goes finds it nameless, and does not get it
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def save(made: dict, folder: Path | None = None) -> Path:
    """Write one record, whole or not at all.

    Args: made: from `record`; folder: of all studies, `data/results` if None.
    Returns: the file's path.
    Raises: OSError if it cannot be written; what was there before stays.
    Source: ours.
    """
    path, temporary = place(made["study"], made["name"], folder), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf8") as file:
            json.dump(made, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(handle)  # else a power cut could leave an empty file under the right name
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"the record cannot be written ({error.strerror}): make room "
                      "or choose another folder (--results FOLDER)", str(path)) from error
    return path


def read(path: Path) -> dict:
    """Read one record.

    Args: path: of its file, FOLDER/STUDY/NAME.json.
    Returns: the record.
    Raises: FileNotFoundError if there is none; ValueError if it is damaged or of another run.
    Source: ours.
    """
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        _VALIDATOR.validate(found)
        if (found["study"], found["name"]) != (path.parent.name, path.stem):
            raise ValueError(f"it says {found['study']}/{found['name']}")
    except (ValueError, jsonschema.ValidationError) as error:
        raise ValueError(f"{path.name} is not a record of a run: delete it and repeat the "
                         "run") from error
    return found


def kept(path: Path) -> dict | None:
    """Read one record if it is there and whole; else its run is still to be made.

    Args:
        path: see `read`.

    Source: ours.
    """
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def load(study: str, folder: Path | None = None) -> list[dict]:
    """Read all records of a study, in order of their names.

    Args: study: name of its folder; folder: of all studies, `data/results` if None.
    Raises: FileNotFoundError for an unknown study; ValueError for a damaged record.
    Source: ours.
    """
    base = folder or FOLDER
    paths = sorted((base / study).glob("*.json"))
    if not paths:
        known = sorted({p.parent.name for p in base.glob("*/*.json")})
        raise FileNotFoundError(f"no recorded study {study!r}: there are {known}")
    return [read(path) for path in paths]


def value(run: dict, metric: str) -> float:
    """Return a metric of a run as a plain number.

    Raises: KeyError if the run does not have it.
    Source: ours.
    """
    found = run["metrics"][metric]
    return found["value"] if isinstance(found, dict) else found


def interval(runs: list[dict], metric: str) -> Rate | None:
    """Return a rate's mean over seeds and its 95 % interval; None if no run has the metric.

    Args: runs: the same experiment, one a seed; metric: name of a rate.
    Returns: with n of all runs together. The interval holds both sources of chance: it spans
        the t interval over seeds and the Wilson interval of all rows together, since seeds that
        agree say nothing of the rows.
    Source: ours; see `metrics.mean_interval` and `metrics.wilson`.
    """
    found = [run["metrics"][metric] for run in runs if metric in run["metrics"]]
    if not found:
        return None
    values = [rate["value"] for rate in found]
    n = sum(rate["n"] for rate in found)
    pooled = wilson(round(sum(rate["value"] * rate["n"] for rate in found)), n)
    low, high = pooled.low, pooled.high
    if len(found) > 1:
        _, t_low, t_high = mean_interval(values)
        low, high = max(0.0, min(low, t_low)), min(1.0, max(high, t_high))
    return Rate(fmean(values), n, low, high)


def over_seeds(runs: list[dict], metric: str) -> str:
    """Show a rate in per cent: its mean over seeds and a 95 % interval.

    Args: see `interval`.
    Returns: such as `99.3 [98.1, 100.0]`; an empty string if no run has the metric.
    Source: ours.
    """
    found = interval(runs, metric)
    if found is None:
        return ""
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(runs: list[dict], by: str | list[str], metrics: list[str]) -> pd.DataFrame:
    """Summarize runs: one row per value of some settings, one column per metric.

    Args: runs: records; by: settings or fields that tell experiments apart; metrics: names.
    Returns: a table with the number of seeds and each metric's mean and interval in per cent.
    Source: ours.
    """
    keys = [by] if isinstance(by, str) else by
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        found = tuple(run.get(key, run["settings"].get(key)) for key in keys)
        groups.setdefault(found, []).append(run)
    rows = [{**dict(zip(keys, found, strict=True)), "seeds": len(group),
             **{metric: over_seeds(group, metric) for metric in metrics}}
            for found, group in groups.items()]
    return pd.DataFrame(rows).set_index(keys)
