"""A study whose runs only sleep, for the tests of the sweep; worker processes import it.

    python tests/fake_study.py fake --workers 2     the command line of bdutils.sweep, on it

The file $FAKE_LOG gets a line `begin NAME PID` as a run starts, `end NAME PID START END` as it
ends and `kept NAME PID` as its record is written, by whichever process, so that tests can count.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from bdutils.experiments import results
from bdutils.metrics import wilson


@dataclass(frozen=True)
class FakeRun:
    """A run that takes some seconds; see `perform` for what `trouble` may be."""

    number: int
    seconds: float = 0.2
    trouble: str = ""

    @property
    def name(self) -> str:
        return f"run{self.number:02d}{self.trouble}"


def log(*fields: object) -> None:
    with open(os.environ["FAKE_LOG"], "a") as file:  # one short write: lines stay whole
        file.write(" ".join(map(str, fields)) + "\n")


def lines(path: Path, kind: str) -> list[list[str]]:
    """Return the fields of all lines of a kind."""
    found = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1:] for line in found if line.split()[:1] == [kind]]


_save = results.save


def save(made: dict, folder: Path | None = None) -> Path:
    path = _save(made, folder)
    log("kept", made["name"], os.getpid())
    return path


if "FAKE_LOG" in os.environ and __name__ != "__main__":  # a worker or a command of a test
    results.save = save


def perform(study: str, run: FakeRun, benchmark: Path | None = None) -> dict:
    start, once = time.time(), Path(f"{os.environ['FAKE_LOG']}.{run.name}")
    log("begin", run.name, os.getpid())
    if run.trouble == "error":
        raise FloatingPointError("the loss is no longer a number")
    if run.trouble == "deadly" or run.trouble == "killed" and not once.exists():
        once.touch()
        # Just after another one has begun, so that it is clear that this one has not ended.
        before = len(lines(Path(os.environ["FAKE_LOG"]), "begin"))
        while (len(lines(Path(os.environ["FAKE_LOG"]), "begin")) == before
               and time.time() < start + 1):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(run.seconds)
    log("end", run.name, os.getpid(), start, time.time())
    padding = {"text": "x" * 8000} if run.trouble == "large" else {}
    return results.record(
        study=study, name=run.name, method="fake", task="toy", scale="small", settings=padding,
        data="0" * 16, seed=run.number, command="-", metrics={"asr": wilson(9, 10)},
        seconds={"asleep": run.seconds})


def runs(count: int, seconds: float = 0.2, **trouble: int) -> list[FakeRun]:
    """Return runs; `killed=3` gives number 3 that trouble."""
    of = {number: name for name, number in trouble.items()}
    return [FakeRun(i, seconds, of.get(i, "")) for i in range(count)]


if __name__ == "__main__":
    import fake_study  # by its own name, under which the workers know it

    stand_in = types.ModuleType("bdutils.experiments.studies")  # the real one takes seconds to import
    options = json.loads(os.environ.get("FAKE_RUNS", '{"count": 6}'))
    stand_in.STUDIES = {"fake": fake_study.runs(**options)}
    stand_in.perform = fake_study.perform
    sys.modules["bdutils.experiments.studies"] = stand_in
    atexit.register(lambda: log("dask", "distributed" in sys.modules))
    log("ready", os.getpid())
    while os.path.exists(os.environ.get("FAKE_WAIT", "/nonexistent")):
        time.sleep(0.01)
    runpy.run_module("bdutils.sweep", run_name="__main__")
