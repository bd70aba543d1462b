"""Recorded studies: grids of runs that are too long for a page.

    python -m bdutils.sweep                        list the studies and what is missing
    python -m bdutils.sweep attacks rates          run what is missing of two studies
    python -m bdutils.sweep attacks --workers 2    in two processes
    python -m bdutils.sweep attacks --dask tcp://HOST:8786    on a Dask cluster
    python -m bdutils.sweep attacks --only badnets-rate0.1-seed0    one run, even if it is there
    python -m bdutils.sweep sst2 --benchmark FOLDER     files instead of the hub

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from . import results, scale, use_scale

if TYPE_CHECKING:
    from distributed import Client

    from .studies import Run  # imports every attack and defense, which only real runs need

TIMEOUT = 10  # seconds for a Dask scheduler to answer
RECONNECTS = 5  # attempts in a row to go on with a lost scheduler while no run ends
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# A process has one random state and one number of threads: never two runs in it at once.
_ONE_RUN = threading.Lock()


class Outcome(NamedTuple):
    """What became of a run: `state` is done, there, elsewhere or failed; `note` says why."""

    study: str
    run: Run
    state: str
    record: dict | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """Return the run's place among the results."""
        return f"{self.study}/{self.run.name}"

    def __str__(self) -> str:
        """Return what is printed of it."""
        if not self.record:
            return f"{self.label} {self.state.upper()}\n{self.note}".rstrip()
        shown = [f"{name} {results.value(self.record, name):.3f}"
                 for name in self.record["metrics"]]
        seconds = sum(self.record["seconds"].values())
        return f"{self.label} {' '.join(shown)} {seconds:.0f} s {self.note}".rstrip()


def missing(study: str, only: str | None = None, folder: Path | None = None) -> Iterator[Run]:
    """Yield the runs of a study that have no valid record yet.

    Args:
        study: its name.
        only: one run's name, yielded in any case.
        folder: of the results.

    Raises:
        ValueError: for an unknown study or run.

    Source: ours.
    """
    from .studies import STUDIES

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


def run_one(study: str, run: Run, *, perform: Callable[..., dict], benchmark: Path | None = None,
            folder: Path | None = None, redo: bool = False, worker: str = "",
            patient: bool = False) -> Outcome:
    """Perform one run and keep its record, unless that has been done or is being done.

    Args:
        study: its name.
        run: one of the study.
        perform: makes the record, see `studies.perform`.
        benchmark: folder with data, for `perform`.
        folder: of the results.
        redo: perform the run even if there is a record.
        worker: in a worker process, the scale to work at; empty in the sweep's own.
        patient: if the run is being done, wait for its end.

    Returns:
        What became of it, with the record, which may be the only copy that is left.

    Source: ours.
    """
    if worker:  # as many workers as cores: with more threads they would wait for each other
        torch.set_num_threads(1)
        use_scale(worker)
        os.environ["BDUTILS_QUIET"] = "1"
    path, note = results.place(study, run.name, folder), ""
    with _ONE_RUN, results.locked(path, patient) as ours:
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


def _here(task: Callable, batch: list) -> Iterator[tuple]:
    for key in batch:
        yield key, task(*key)


def _in_processes(workers: int, task: Callable, batch: list) -> Iterator[tuple]:
    """Yield each run with its outcome, or with an error if its worker died."""
    waiting, idle, under_way = deque(batch), [], {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                # A pool has one worker, so that a death ends one run.
                pool = idle.pop() if idle else ProcessPoolExecutor(1, timeout=300, env=ONE_THREAD)
                with suppress(BrokenProcessPool):  # it died between two runs: take another
                    future = pool.submit(task, *waiting[0])
                    under_way[future] = waiting.popleft(), pool
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                key, pool = under_way.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    yield key, future.exception()
                else:
                    idle.append(pool)
                    yield key, future.result()
    finally:
        for pool in [*idle, *(pool for _, pool in under_way.values())]:
            pool.shutdown(kill_workers=True)


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("a cluster needs Dask: run `pip install distributed`") from error
    try:
        client = Client(address, timeout=TIMEOUT, set_as_default=False)
    except OSError as error:
        raise ConnectionError(f"no Dask scheduler answers at {address}: start one by `dask "
                              "scheduler`, and give the address that it prints") from error
    with client:
        if max(client.nthreads().values(), default=1) > 1:
            raise ValueError(f"a worker of {address} has several threads, but runs share what is "
                             "global in a process: start it by `dask worker ADDRESS --nthreads 1`")
        yield client


def _on_cluster(address: str, task: Callable, batch: list) -> Iterator[tuple]:
    """Yield each run with its outcome, or with an error if Dask gave it up.

    Dask itself gives a run whose worker died to another one, `allowed-failures` times.
    """
    from distributed import CancelledError, KilledWorker, as_completed

    try:
        with _connected(address) as client:
            under_way = {client.submit(task, *key, pure=False): key for key in batch}
            ended = as_completed(under_way, loop=client.loop)
            for future in ended:
                try:
                    outcome = future.result(timeout=TIMEOUT)
                except KilledWorker as error:
                    outcome = error
                except TimeoutError:  # a worker died with the result, which is made again
                    ended.add(future)
                    continue
                yield under_way.pop(future), outcome
    except (CancelledError, OSError) as error:
        raise ConnectionError(f"the Dask scheduler at {address} was lost") from error


def run_all(todo: Iterable[tuple[str, Run]], *, perform: Callable[..., dict],
            benchmark: Path | None = None, folder: Path | None = None, redo: bool = False,
            workers: int = 1, dask: str | None = None) -> list[Outcome]:
    """Perform runs and keep their records, whatever happens to the workers.

    Args:
        todo: studies and runs.
        perform: see `run_one`, as for `benchmark`, `folder` and `redo`.
        workers: processes; 1 is this one.
        dask: address of a scheduler, in place of `workers`.

    Returns:
        The outcomes, in the order in which they came.

    Raises:
        ConnectionError: if there is no scheduler, or it is lost again and again.
        OSError: if a record cannot be written.
        ValueError: if there are no workers, or they have several threads.

    Source: ours.
    """
    if workers < 1:
        raise ValueError(f"a sweep needs at least 1 worker, not {workers}")
    attempt = _here if workers == 1 else partial(_in_processes, workers)
    if dask:
        attempt = partial(_on_cluster, dask)
        with _connected(dask):  # a wrong address is an error at once
            pass
    task = partial(run_one, perform=perform, benchmark=benchmark, folder=folder, redo=redo,
                   worker="" if attempt is _here else scale())
    left, suspects, ended, lost = dict.fromkeys(todo), [], [], 0
    total = len(left)
    while left:
        batch = suspects[:1] or list(left)
        # What holds the lock of a run that we lost may be our own worker, still at it.
        asked = partial(task, patient=bool(suspects or lost))
        try:
            with closing(attempt(asked, batch)) as found:
                for key, outcome in found:
                    lost = 0
                    if isinstance(outcome, Exception) and len(batch) > 1:
                        suspects.append(key)  # what ran beside it may be to blame
                        continue
                    if isinstance(outcome, Exception):
                        outcome = Outcome(*key, "failed", note="its worker process died while it "
                                          f"ran alone; often too little memory ({outcome})")
                    _bring_home(outcome, folder)
                    ended.append(outcome)
                    del left[key]
                    print(f"[{len(ended)}/{total}] {outcome}", flush=True)
        except ConnectionError as error:
            lost += 1
            if lost > RECONNECTS:
                raise
            print(f"{error}: connecting again", flush=True)
        suspects = [key for key in suspects if key in left]
        if suspects:
            print(f"workers died; tried again alone: {len(suspects)} runs", flush=True)
    return ended


def _bring_home(outcome: Outcome, folder: Path | None) -> None:
    """Keep a record that comes from a worker which does not share our disk."""
    path = results.place(outcome.study, outcome.run.name, folder)
    if outcome.record and _kept(path) != outcome.record:
        results.save(outcome.record, folder)


def main() -> None:
    """Run the command line; see the module's text."""
    from .studies import STUDIES, perform

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
        ended = run_all(todo, perform=perform, benchmark=benchmark, folder=folder,
                        redo=bool(chosen.only), workers=chosen.workers, dask=chosen.dask)
    except (ImportError, OSError, ValueError) as error:
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

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers end as by Ctrl+C
    sweep.main()
