"""Recorded results: one JSON a run, with everything needed to judge and repeat it."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import jsonschema
import numpy
import pandas as pd
import torch
import transformers
from filelock import Timeout

from .. import __version__
from ..assets import disk_trouble, system_lock
from ..metrics import Rate, mean_interval, shows_backdoor, wilson


def shipped() -> Path:
    """Return the folder of the recorded results and of the figures that papers report.

    Returns:
        `data` of the clone that holds this package, else the copy that was installed with it.
    """
    package = Path(__file__).resolve().parent.parent
    clone = package.parent / "data"
    return clone if (clone / "reported.json").is_file() else package / "_data"


FOLDER = shipped() / "results"


def target() -> Path:
    """Return the folder of new records, if none is named.

    Returns:
        `data/results` of the clone, and outside of one that of the current folder, as what was
        installed is not written to.
    """
    return Path("data/results") if FOLDER.parent.name == "_data" else FOLDER


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


def processor() -> str:
    """Name the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.is_file() else []
    return (names or [platform.processor() or "CPU"])[0]


def hardware() -> str:
    """Name the machine: processor or GPU, and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{processor()}, {torch.get_num_threads()} threads"


def record(*, metrics: dict[str, Rate | float], seconds: dict[str, float],
           reported: dict | None = None, **fields: Any) -> dict:
    """Make the record of one run.

    Args:
        metrics: Rates (with n and interval) and plain numbers by name.
        seconds: Wall time by step.
        reported: {"source": ..., "values": ...} if a paper reports the same, else None.
        **fields: study, name, method, task, scale, settings, data, seed, command.

    Returns:
        A dictionary that satisfies `SCHEMA`.

    Raises:
        jsonschema.ValidationError: If it does not.
    """
    fields["settings"] = _finite(fields["settings"])
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


def _finite(value: Any) -> Any:
    """Write numbers that JSON lacks as texts, such as an `alpha` of "inf"."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def place(study: str, name: str, folder: Path | None = None) -> Path:
    """Return where the record of a run is kept.

    Args:
        study, name: Of the run.
        folder: Of all studies, that of `target` if None.
    """
    return (folder or target()) / study / f"{name}.json"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a record while it is made.

    Args:
        path: Of the record.
        wait: Until whoever holds the lock lets go of it.

    Returns:
        A context that gives True, or False if somebody else holds the lock. It is the operating
        system's, so that it ends with the process, however that ends.

    Raises:
        OSError: If the folder cannot be written, so that the record could not be kept.
    """
    lock = system_lock(path.with_name(f".{path.stem}.lock"), wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and disk_trouble(error):  # what is made could not be kept
            raise OSError(error.errno, f"no record can be kept, since {path.parent} "
                          f"{disk_trouble(error)}: choose another folder (--results FOLDER)"
                          ) from error
        yield True  # no locks here, as on some network drives: go on without
        return
    try:
        yield True
    finally:  # whoever opened the file before it goes finds it nameless, and does not get it
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def save(made: dict, folder: Path | None = None) -> Path:
    """Write one record, whole or not at all.

    Args:
        made: From `record`.
        folder: Of all studies, that of `target` if None.

    Returns:
        The file's path.

    Raises:
        OSError: It cannot be written; what was there before stays.
    """
    path, temporary = place(made["study"], made["name"], folder), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf8") as file:
            json.dump(made, file, indent=1, allow_nan=False)
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

    Args:
        path: Of its file, FOLDER/STUDY/NAME.json.

    Returns:
        The record.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another run.
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
        path: See `read`.
    """
    try:
        return read(path)
    except (FileNotFoundError, ValueError):
        return None


def load(study: str, folder: Path | None = None) -> list[dict]:
    """Read all records of a study, in order of their names.

    Args:
        study: Name of its folder.
        folder: Of all studies, the recorded ones of the book if None.

    Raises:
        FileNotFoundError: No such study.
        ValueError: A record is damaged.
    """
    base = folder or FOLDER
    paths = sorted((base / study).glob("*.json"))
    if not paths:
        known = sorted({p.parent.name for p in base.glob("*/*.json")})
        raise FileNotFoundError(f"no recorded study {study!r}: there are {known}")
    return [read(path) for path in paths]


def value(run: dict, metric: str) -> float:
    """Return a metric of a run as a plain number.

    Raises:
        KeyError: If the run does not have it.
    """
    found = run["metrics"][metric]
    return found["value"] if isinstance(found, dict) else found


def is_backdoor(run: dict) -> bool | None:
    """Tell whether a run's attack put a backdoor into its model, before any defense.

    Args:
        run: A record.

    Returns:
        See `metrics.shows_backdoor`; None if the record has no floor.
    """
    metrics = run["metrics"]
    if "floor" not in metrics:
        return None
    attacked = "asr_before" if "asr_before" in metrics else "asr"
    return shows_backdoor(value(run, attacked), value(run, "floor"))


def interval(runs: list[dict], metric: str) -> Rate | None:
    """Return a rate's mean over seeds and its 95% interval; None if no run has the metric.

    See `metrics.mean_interval` and `metrics.wilson`.

    Args:
        runs: The same experiment, one a seed.
        metric: Name of a rate.

    Returns:
        Mean and interval, with n of all runs together. The interval holds both sources of chance,
        as it spans the t interval over seeds and the Wilson interval of all samples together:
        seeds that agree say nothing of the samples.
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
    """Show a rate in percent: its mean over seeds and a 95% interval.

    Args:
        runs, metric: As for `interval`.

    Returns:
        Such as `99.3 [98.1, 100.0]`; an empty string if no run has the metric.
    """
    found = interval(runs, metric)
    if found is None:
        return ""
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(runs: list[dict], by: str | list[str], metrics: list[str]) -> pd.DataFrame:
    """Summarize runs: one row per value of some settings, one column per metric.

    Args:
        runs: Records.
        by: Settings or fields that tell experiments apart.
        metrics: Names.

    Returns:
        A table with the number of seeds and each metric's mean and interval in percent.
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
