"""A study whose runs only wait, for the tests of the sweep; worker processes import it.

    python -m helpers.fake_study fake --workers 2     the command line of bdutils.sweep, on it
"""

import os
import runpy
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from bdutils import results


@dataclass(frozen=True)
class FakeRun:
    """A run that ends at once; a gated one ends when $FAKE_FOLDER has a file of its name."""

    name: str
    kind: str = "free"


def perform(study: str, run: FakeRun, benchmark: Path | None = None) -> dict:
    folder, end = Path(os.environ["FAKE_FOLDER"]), time.monotonic() + 120
    with open(folder / "begun", "a") as file:  # one short write: lines stay whole
        file.write(f"{run.name} {os.getpid()}\n")
    if run.kind == "faulty":
        raise FloatingPointError("the loss is no longer a number")
    while run.kind == "gated" and not (folder / run.name).exists() and time.monotonic() < end:
        time.sleep(0.01)
    return results.record(
        study=study, name=run.name, method="fake", task="toy", scale="small", settings={},
        data="0" * 16, seed=0, command="-", metrics={"asr": 0.9}, seconds={"asleep": 0.0})


def stand_in(*runs: FakeRun) -> types.ModuleType:
    """Return what takes the place of `bdutils.studies`."""
    made = types.ModuleType("bdutils.studies")
    made.STUDIES, made.perform = {"fake": runs}, perform
    return made


if __name__ == "__main__":
    from helpers import fake_study  # by the name under which the workers know it

    named = (pair.split(":") for pair in os.environ["FAKE_RUNS"].split())
    sys.modules["bdutils.studies"] = fake_study.stand_in(*(fake_study.FakeRun(*p) for p in named))
    runpy.run_module("bdutils.sweep", run_name="__main__")
