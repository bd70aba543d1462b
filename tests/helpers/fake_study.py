"""A study whose runs do next to nothing, for tests of the sweep; worker processes import it.

    python -m helpers.fake_study fake --workers 2     the command line of bdutils.sweep, on it
"""

import os
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from bdutils.experiments import results


@dataclass(frozen=True)
class FakeRun:
    """A run that ends at once; a gated one ends when $FAKE_FOLDER has a file of its name."""

    name: str
    kind: str = "free"


def make_record(study: str, run: FakeRun, benchmark: Path | None = None) -> dict:
    folder, start = Path(os.environ["FAKE_FOLDER"]), time.perf_counter()
    (folder / f"{run.name}-{time.time_ns()}-{os.getpid()}").touch()  # so that tests can count
    if run.kind == "faulty":
        raise FloatingPointError("the loss is no longer a number")
    while run.kind == "gated" and not (folder / run.name).exists() and folder.exists():
        time.sleep(0.01)
    return results.record(
        study=study, name=run.name, method="fake", task="toy", scale="small", settings={},
        data="0" * 16, seed=0, command="-", seconds={},
        metrics={"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    from helpers import fake_study  # by the name under which the workers know it

    runs = [fake_study.FakeRun(*pair.split(":")) for pair in os.environ["FAKE_RUNS"].split()]
    fakes = SimpleNamespace(STUDIES={"fake": runs}, make_record=fake_study.make_record)
    sys.modules |= {f"bdutils.experiments.{name}": fakes for name in ("studies", "run")}
    runpy.run_module("bdutils.sweep", run_name="__main__")
