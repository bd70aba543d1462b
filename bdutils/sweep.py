"""Recorded studies: grids of runs that are too long for a page.

Commands::

    python -m bdutils.sweep                        list the studies and what is missing
    python -m bdutils.sweep attacks rates          run what is missing of two studies
    python -m bdutils.sweep attacks --workers 2    in two processes
    python -m bdutils.sweep attacks --dask tcp://HOST:8786    on a Dask cluster
    python -m bdutils.sweep attacks --only badnets-rate0.1-seed0    one run, even if it is there
    python -m bdutils.sweep sst2 --benchmark FOLDER     files instead of the hub

Each run writes one JSON to data/results, whole or not at all; a run that is there is skipped.
Processes and clusters are joblib's and Dask's. What is ours: no run is kept twice, none is lost
with the worker, the scheduler or the sweep that it ran in, and a damaged record is redone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from joblib import Parallel, delayed, parallel_config
from tqdm.auto import tqdm

from . import scale, use_scale
from .experiments import results

if TYPE_CHECKING:  # `studies` imports every attack and defense, which only real runs need
    from .experiments.studies import Run

ATTEMPTS = 5  # passes in a row in which nothing got finished, before a sweep gives up
PAUSE = 1.0  # seconds before the second of them; then twice as long each time
# A process has one random state and one number of threads: never two runs in it at once.
_ONE_RUN = threading.Lock()


class Outcome(NamedTuple):
    """What became of a run: `state` is done, there, elsewhere or failed; `note` says why."""

    study: str
    """Name of the study."""
    run: Run
    """Cell of its grid."""
    state: str
    """`done`, `there`, `elsewhere` or `failed`."""
    record: dict | None = None
    """What was made, if anything."""
    note: str = ""
    """Why."""

    @property
    def label(self) -> str:
        """Return the run's place among the results."""
        return f"{self.study}/{self.run.name}"


def missing(study: str, only: str | None = None, folder: Path | None = None) -> Iterator[Run]:
    """Yield the runs of a study that have no valid record yet.

    Args:
        study: Its name.
        only: One run's name, yielded in any case.
        folder: Of the results.

    Raises:
        ValueError: For an unknown study or run.
    """
    from .experiments.studies import STUDIES

    if study not in STUDIES:
        raise ValueError(f"unknown study {study!r}: there are {sorted(STUDIES)}")
    runs = [run for run in STUDIES[study] if only in (None, run.name)]
    if not runs:
        raise ValueError(f"study {study!r} has no run {only!r}")
    yield from (run for run in runs if only or not _kept(results.place(study, run.name, folder)))


def _kept(path: Path) -> dict | None:
    try:
        return results.read(path)
    except (FileNotFoundError, ValueError):  # not there, or damaged: either way to be made
        return None


def finish(study: str, run: Run, benchmark: Path | None = None, folder: Path | None = None, *,
           perform: Callable[..., dict], redo: bool = False, worker: str = "") -> Outcome:
    """Perform one run and keep its record, unless that has been done or is being done.

    Args:
        study, run, benchmark: See `studies.perform`.
        folder: Of the results.
        perform: Makes the record.
        redo: Perform it even if there is a record.
        worker: In a worker process, the scale to work at; empty in the sweep's own process.

    Returns:
        What became of it, with the record, which may be the only copy that is left.
    """
    path, note = results.place(study, run.name, folder), ""
    if worker:  # as many workers as cores: with more threads they would wait for each other
        torch.set_num_threads(1)
        use_scale(worker)
        os.environ["BDUTILS_QUIET"] = "1"
    with _ONE_RUN, results.claimed(path) as ours:
        if not ours:
            return Outcome(study, run, "elsewhere")
        # Another sweep may have finished it since this one made its list.
        if not redo and (made := _kept(path)):
            return Outcome(study, run, "there", made)
        try:
            made = perform(study, run, benchmark)
        except Exception:  # the other runs go on
            return Outcome(study, run, "failed", note=traceback.format_exc())
        try:
            made = results.read(results.save(made, folder))  # here: it must outlive the sweep
        except OSError as error:
            note = str(error)  # the sweep's own process will try
        return Outcome(study, run, "done", made, note)


def _outcomes(tasks: Iterable, workers: int, dask: str | None) -> Iterator:
    """Yield the outcome of each task as it ends, or an error in place of those that are lost."""
    options = {"backend": "loky", "inner_max_num_threads": 1} if workers > 1 else {}
    with contextlib.ExitStack() as stack:
        try:
            if dask:
                from .cluster import connected

                options = {"backend": stack.enter_context(connected(dask))}
            stack.enter_context(parallel_config(**options))
            yield from Parallel(n_jobs=-1 if dask else workers, return_as="generator_unordered",
                                batch_size=1, pre_dispatch="all")(tasks)
        except (ImportError, ValueError):  # will not get better
            raise
        except Exception as error:  # `finish` raises none: it is the pool or the connection
            yield error


def carry_out(todo: Iterable[tuple[str, Run]], *, perform: Callable[..., dict],
              benchmark: Path | None = None, folder: Path | None = None, redo: bool = False,
              workers: int = 1, dask: str | None = None) -> list[Outcome]:
    """Perform runs and keep their records, whatever happens to the workers.

    Args:
        todo: Studies and runs.
        perform, benchmark, folder, redo: See `finish`.
        workers: Processes, 1 = this one.
        dask: Address of a scheduler, in place of `workers`.

    Returns:
        The outcomes, in the order in which they came.

    Raises:
        RuntimeError: If workers are lost again and again.
        OSError: If a record cannot be written.
        ConnectionError: If a cluster cannot be used.
        ImportError: If a cluster cannot be used.
        ValueError: If a cluster cannot be used.
    """
    if workers < 1:
        raise ValueError(f"a sweep needs at least 1 worker, not {workers}")
    left, ended, idle, broken = dict.fromkeys(todo), [], 0, False
    worker = scale() if dask or workers > 1 else ""
    bar = tqdm(total=len(left), unit="run", disable=None)  # on a terminal only
    while left:
        before, lost, others = len(left), None, []
        tasks = [delayed(finish)(study, run, benchmark, folder, perform=perform, redo=redo,
                                 worker=worker) for study, run in left]
        for found in _outcomes(tasks, workers, dask):
            if isinstance(found, BaseException):
                lost = found
            elif found.state == "elsewhere":
                others.append(found)
            else:
                # From a worker that does not share our disk. If this fails, so would the rest.
                path = results.place(found.study, found.run.name, folder)
                if found.record and _kept(path) != found.record:
                    results.save(found.record, folder)
                del left[found.study, found.run]
                ended.append(found)
                bar.update()
                bar.write(f"[{len(ended)}/{bar.total}] {_line(found)}")
        if isinstance(lost, ConnectionError) and not broken:
            raise lost  # the scheduler was never there
        broken, idle = broken or bool(lost), 0 if len(left) < before else idle + 1
        # A worker that we lost touch with may still be at it, so that such runs are asked again.
        if not lost and (not broken or idle == ATTEMPTS):
            ended += others
            break
        if idle == ATTEMPTS:
            names = " ".join(f"{study}/{run.name}" for study, run in left)
            raise RuntimeError(f"workers were lost {ATTEMPTS} times while nothing got finished: "
                               f"{lost!r}. See what ends them (often too little memory), then "
                               f"give the same command again. Not done: {names}")
        if left:
            bar.write(f"{len(left)} runs left; " + (f"workers were lost ({type(lost).__name__})"
                                                    if lost else "waiting for some"))
            time.sleep(PAUSE * 2**idle)
            # Those that were under way go last: one that kills its worker must not stop the rest.
            keys = list(left)
            left = dict.fromkeys(keys[max(workers, 2):] + keys[:max(workers, 2)])
    bar.close()
    return ended


def _line(found: Outcome) -> str:
    made = found.record
    if not made:
        return f"{found.label} FAILED\n{found.note}"
    shown = " ".join(f"{name} {results.value(made, name):.3f}" for name in made["metrics"])
    return f"{found.label} {shown} {sum(made['seconds'].values()):.0f} s {found.note}".rstrip()


def main() -> None:
    """Run the command line; see the module's text."""
    from .experiments.studies import STUDIES, perform

    parser = argparse.ArgumentParser(prog="python -m bdutils.sweep")
    parser.add_argument("study", nargs="*", help="leave out to list the studies")
    parser.add_argument("--only", help="name of one run, which is made again if it is there")
    parser.add_argument("--benchmark", type=Path, help="folder with TASK.parquet files")
    parser.add_argument("--results", type=Path, help="folder for the records")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--dask", metavar="ADDRESS", help="of a scheduler, tcp://HOST:PORT")
    chosen = parser.parse_args()
    # Workers may have another working folder.
    folder, benchmark = (p and p.resolve() for p in (chosen.results, chosen.benchmark))
    try:
        if not chosen.study:
            for study, runs in STUDIES.items():
                lacking = len(list(missing(study, None, folder)))
                print(f"{study}: {len(runs)} runs" + (f", {lacking} missing" if lacking else ""))
            return
        todo = [(study, run) for study in chosen.study
                for run in missing(study, chosen.only, folder)]
        ended = carry_out(todo, perform=perform, benchmark=benchmark, folder=folder,
                          redo=bool(chosen.only), workers=chosen.workers, dask=chosen.dask)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    by_state = {state: [found.label for found in ended if found.state == state]
                for state in ("done", "there", "elsewhere", "failed")}
    print(", ".join(f"{state}: {len(names)}" for state, names in by_state.items()))
    if by_state["elsewhere"]:
        print("left to another sweep:", *by_state["elsewhere"])
    if by_state["failed"]:
        sys.exit(f"failed: {' '.join(by_state['failed'])}")


if __name__ == "__main__":
    # Not `main()`: workers must find the functions in a module that they can import.
    from bdutils import sweep

    sweep.main()
