"""Recorded studies: grids of runs that are too long for a page.

Commands::

    python -m bdutils.sweep                 list the studies and what is missing
    python -m bdutils.sweep STUDY ...       run what is missing of them; see --help

Each run writes one JSON to data/results, whole or not at all; a run that is there is skipped.
A run whose worker dies is tried again alone. If its worker dies then too, the run has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from . import scale, use_scale
from .experiments import results

if TYPE_CHECKING:
    from .experiments.studies import Run

TIMEOUT, RECONNECTS = 10, 5  # seconds for Dask to answer; how often in a row it may be lost
STATES = ("done", "there", "elsewhere", "failed")
DIED = "its worker process died while it ran alone; often too little memory"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_ONE_RUN = threading.Lock()  # a process has one random state and one number of threads


class RunState(NamedTuple):
    """What became of a run."""

    label: str
    """Place of the run among the results, STUDY/NAME."""
    state: str
    """`done`, `there`, `elsewhere` or `failed`."""
    record: dict | None = None
    """What was made, if anything."""
    note: str = ""
    """Why."""

    def __str__(self) -> str:
        if not self.record:
            return f"{self.label} {self.state.upper()}\n{self.note}".rstrip()
        names = self.record["metrics"]
        shown = (f"{name} {results.value(self.record, name):.3f}" for name in names)
        return f"{self.label} {' '.join(shown)} {sum(self.record['seconds'].values()):.0f} s"


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
    for run in runs:
        if only or not results.kept(results.place(study, run.name, folder)):
            yield run


def run_one(study: str, run: Run, *, make: Callable[..., dict], benchmark: Path | None = None,
            folder: Path | None = None, redo: bool = False, worker: str = "",
            patient: bool = False) -> RunState:
    """Make one run and keep its record, unless that has been done or is being done.

    Args:
        study: Its name.
        run: One of the study.
        make: Makes the record, see `experiments.run.make_record`.
        benchmark: Folder with data, for `make`.
        folder: Of the results.
        redo: Make the run even if there is a record.
        worker: In a worker process, the scale to work at; empty in the sweep's own.
        patient: If the run is being done, wait for its end.
    """
    if worker:  # as many workers as cores: with more threads they would wait for each other
        torch.set_num_threads(1)
        use_scale(worker)
        os.environ["BDUTILS_QUIET"] = "1"
    label, path = f"{study}/{run.name}", results.place(study, run.name, folder)
    with _ONE_RUN, results.locked(path, patient) as ours:
        if not ours:
            return RunState(label, "elsewhere")
        # Another sweep may have finished it since this one made its list.
        if not redo and (made := results.kept(path)):
            return RunState(label, "there", made)
        try:
            made = make(study, run, benchmark)
        except Exception:  # the other runs go on
            return RunState(label, "failed", note=traceback.format_exc())
        with suppress(OSError):  # the sweep's own process tries as well
            made = results.read(results.save(made, folder))
        return RunState(label, "done", made)


def _here(task: Callable, batch: list) -> Generator[tuple, None, None]:
    for key in batch:
        yield key, task(*key)


def _in_processes(workers: int, task: Callable, batch: list) -> Generator[tuple, None, None]:
    """Yield each run with its outcome, or with None if its worker died."""
    waiting, under_way = deque(batch), {}  # type: ignore[var-annotated]
    idle: list[ProcessPoolExecutor] = []
    try:
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                # An executor has one worker, so that a death ends one run.
                executor = idle.pop() if idle else ProcessPoolExecutor(
                    1, timeout=300, env=ONE_THREAD)
                key = waiting.popleft()
                under_way[executor.submit(task, *key)] = key, executor
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                key, executor = under_way.pop(future)
                died = isinstance(future.exception(), TerminatedWorkerError)
                idle += [] if died else [executor]
                yield key, None if died else future.result()
    finally:
        for executor in [*idle, *(one for _, one in under_way.values())]:
            executor.shutdown(kill_workers=True)


def _on_cluster(address: str, task: Callable, batch: list) -> Generator[tuple, None, None]:
    """Yield each run with its outcome, or with None if Dask gave it up as its workers died."""
    try:
        from distributed import CancelledError, Client, KilledWorker, as_completed
    except ImportError as error:
        raise ImportError("a cluster needs Dask: run `pip install distributed`") from error
    try:
        with Client(address, timeout=TIMEOUT, set_as_default=False) as client:
            under_way = {client.submit(task, *key, pure=False): key for key in batch}
            ended = as_completed(under_way, loop=client.loop)
            for future in ended:
                try:
                    outcome = future.result(timeout=TIMEOUT)
                except KilledWorker:
                    outcome = None
                except TimeoutError:  # a worker died with the result, which is made again
                    ended.add(future)
                    continue
                yield under_way.pop(future), outcome
    except (CancelledError, OSError) as error:
        raise ConnectionError(f"no Dask scheduler answers at {address}: start one by `dask "
                              "scheduler`, and give the address that it prints") from error


def run_all(todo: Iterable[tuple[str, Run]], *, workers: int = 1, dask: str | None = None,
            folder: Path | None = None, **options: Any) -> list[RunState]:
    """Make runs and keep their records, whatever happens to the workers.

    Args:
        todo: Studies and runs.
        workers: Processes; 1 is this one.
        dask: Address of a scheduler, in place of `workers`.
        folder: Of the results.
        **options: `make`, `benchmark` and `redo` of `run_one`.

    Raises:
        ConnectionError: If no scheduler answers, again and again.
        OSError: If a record cannot be written.
        ValueError: If there are no workers.
    """
    if workers < 1:
        raise ValueError(f"a sweep needs at least 1 worker, not {workers}")
    attempt = partial(_in_processes, workers) if workers > 1 else _here
    attempt = partial(_on_cluster, dask) if dask else attempt
    task = partial(run_one, folder=folder, worker="" if attempt is _here else scale(), **options)
    left, lost = dict.fromkeys(todo), 0
    suspects: list[tuple[str, Run]] = []
    ended: list[RunState] = []
    while left:
        # What ran beside a run may have killed its worker, so that each suspect is tried alone.
        batch = suspects[:1] or list(left)
        # What holds the lock of a run that we lost may be our own worker, still at it.
        asked = partial(task, patient=bool(suspects or lost))
        try:
            with closing(attempt(asked, batch)) as found:
                for key, outcome in found:
                    lost = 0
                    if not outcome and len(batch) > 1:
                        suspects.append(key)
                        continue
                    outcome = outcome or RunState(f"{key[0]}/{key[1].name}", "failed", note=DIED)
                    # From a worker that does not share our disk. If this fails, so would the rest.
                    path = results.place(key[0], key[1].name, folder)
                    if outcome.record and results.kept(path) != outcome.record:
                        results.save(outcome.record, folder)
                    ended.append(outcome)
                    del left[key]
                    print(f"[{len(ended)}/{len(ended) + len(left)}] {outcome}", flush=True)
        except (ConnectionError, TerminatedWorkerError) as error:  # the latter between two runs
            lost += 1
            if lost > RECONNECTS:
                raise
            print(f"{type(error).__name__}: {error}; trying again", flush=True)
        suspects = [key for key in suspects if key in left]
    return ended


def main() -> None:
    """Run the command line; see the module's text."""
    from .experiments.run import make_record
    from .experiments.studies import STUDIES

    parser = argparse.ArgumentParser(prog="python -m bdutils.sweep")
    parser.add_argument("study", nargs="*", help="leave out to list the studies")
    parser.add_argument("--only", help="name of one run, which is made again if it is there")
    parser.add_argument("--benchmark", type=Path, help="folder with TASK.parquet files")
    parser.add_argument("--results", type=Path, help="folder for the records")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--dask", metavar="ADDRESS", help="of a scheduler, tcp://HOST:PORT")
    given = parser.parse_args()
    # Workers may have another working folder.
    folder, benchmark = (path and path.resolve() for path in (given.results, given.benchmark))
    try:
        if not given.study:
            for study, runs in STUDIES.items():
                lacking = len(list(missing(study, folder=folder)))
                print(f"{study}: {len(runs)} runs" + (f", {lacking} missing" if lacking else ""))
            return
        todo = [(study, run) for study in given.study
                for run in missing(study, given.only, folder)]
        ended = run_all(todo, make=make_record, benchmark=benchmark, folder=folder,
                        redo=bool(given.only), workers=given.workers, dask=given.dask)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    states = [found.state for found in ended]
    print(", ".join(f"{state}: {states.count(state)}" for state in STATES))
    if "failed" in states:
        sys.exit(" ".join(["failed:", *(x.label for x in ended if x.state == "failed")]))


if __name__ == "__main__":
    # Not `main()`: workers must find the functions in a module that they can import.
    from bdutils import sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers end as by Ctrl+C
    sweep.main()
