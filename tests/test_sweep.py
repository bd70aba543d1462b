"""Sweeps: what is there is not redone, what is lost is redone, whatever is killed meanwhile.

Workers, schedulers and sweeps are processes. Gated runs wait for a test, which so has the order of
all that happens in its hand.
"""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import fake_study
from helpers.fake_study import FakeRun

from bdutils import results, sweep

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[1]


def until(condition, *arguments):
    """Wait for something that must come; the limit only keeps a failed test from hanging."""
    end = time.monotonic() + 300
    while not (found := condition(*arguments)):
        assert time.monotonic() < end, f"{condition.__qualname__}{arguments} did not come"
        time.sleep(0.01)
    return found


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


class Place:
    """A folder of results, what the runs there have logged, and sweeps of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.processes = folder, folder / "results", []
        self.threads = ThreadPoolExecutor()

    def begun(self, name: str = "", count: int = 0) -> list[int]:
        """Return the processes in which runs of this name have begun; none if fewer than count."""
        log = self.folder / "begun"
        pairs = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        found = [int(process) for run, process in pairs if name in ("", run)]
        return found if len(found) >= count else []

    def kill(self, name: str, count: int = 1) -> None:
        """Kill the worker in which a run has begun, and so do away with the run."""
        os.kill(until(self.begun, name, count)[-1], signal.SIGKILL)

    def open(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def kept(self, *names: str) -> bool:
        there = {path.name for path in self.results.glob("fake/*.json")}
        return there >= {f"{name}.json" for name in names}

    def sweep(self, *runs: FakeRun, **options) -> Counter:
        todo = [("fake", run) for run in runs]
        self.ended = sweep.run_all(todo, **{"perform": fake_study.perform,
                                            "folder": self.results, **options})
        assert Counter(found.run for found in self.ended) == Counter(runs)
        return Counter(found.state for found in self.ended)

    def start(self, *command: str, **options) -> subprocess.Popen:
        self.processes.append(subprocess.Popen([sys.executable, "-m", *command], **options))
        return self.processes[-1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path)
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    yield made
    made.open(*"abcdef")
    for process in made.processes:
        process.kill()
        process.wait()
    made.threads.shutdown()


A, B, C, D = (FakeRun(name) for name in "abcd")
GATED = {name: FakeRun(name, "gated") for name in "abcd"}


def test_damaged_and_misplaced_records_are_made_again(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "bdutils.studies", fake_study.stand_in(A, B, C, D))
    assert place.sweep(A, B, C, D) == {"done": 4}
    paths = {run: results.place("fake", run.name, place.results) for run in (A, B, C, D)}
    paths[A].write_text(paths[A].read_text()[:-20])
    paths[B].write_bytes(b"\xff\xfe")
    shutil.copy(paths[D], paths[C])
    todo = list(sweep.missing("fake", folder=place.results))
    assert todo == [A, B, C]
    assert place.sweep(*todo, D) == {"done": 3, "there": 1}
    assert len(results.load("fake", place.results)) == 4 and len(place.begun("d")) == 1
    assert {path.suffix for path in paths[A].parent.iterdir()} == {".json"}  # no lock is left


def test_a_full_disk_is_one_sentence_and_the_old_record_stays(place):
    place.sweep(A)
    before = {path: path.read_text() for path in place.results.glob("fake/*")}
    full = place.start("helpers.fake_study", "fake", "--only", "a", "--results", str(place.results),
                       env={**os.environ, "FAKE_RUNS": "a"}, stderr=subprocess.PIPE, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)))
    message = full.communicate()[1]
    assert full.returncode == 1 and len(place.begun("a")) == 2 and message.count("\n") == 1
    assert "the record cannot be written (File too large): make room or choose" in message
    assert {path: path.read_text() for path in place.results.glob("fake/*")} == before


def test_two_sweeps_at_once_do_each_run_once(place):
    first = place.threads.submit(place.sweep, GATED["a"], GATED["b"], C, workers=2)
    until(place.begun, "a"), until(place.begun, "b")
    second = Place(place.folder)
    assert second.sweep(GATED["a"], GATED["b"], C) == {"elsewhere": 2, "done": 1}
    place.open("a", "b")
    assert first.result() == {"done": 2, "there": 1}
    assert len(place.begun()) == 3 and place.kept("a", "b", "c")


def test_the_command_line(place, monkeypatch, capsys):
    studies = fake_study.stand_in(A, FakeRun("b", "faulty"), C)
    monkeypatch.setitem(sys.modules, "bdutils.studies", studies)
    monkeypatch.setattr(sys, "argv", ["sweep", "fake", "--results", str(place.results)])
    with pytest.raises(SystemExit, match="failed: fake/b"):
        sweep.main()
    out = capsys.readouterr().out
    assert "FAILED\nTraceback" in out and "the loss is no longer a number" in out
    assert "[3/3] fake/" in out and "done: 2, there: 0, elsewhere: 0, failed: 1" in out
    monkeypatch.setattr(sys, "argv", ["sweep", "--results", str(place.results)])
    sweep.main()
    assert capsys.readouterr().out == "fake: 3 runs, 1 missing\n"


@pytest.mark.parametrize("always", [False, True])
def test_a_killed_worker_takes_no_other_run_with_it(place, always):
    done = place.threads.submit(place.sweep, GATED["a"], GATED["b"], C, D, workers=2)
    until(place.begun, "b")
    place.kill("a")
    until(place.kept, "c", "d")  # in a new worker
    assert len(place.begun("a")) == 1  # not beside another run
    place.open("b")
    until(place.begun, "a", 2)
    assert place.kept("b", "c", "d")  # so that it is alone
    place.kill("a", 2) if always else place.open("a")
    assert done.result() == ({"done": 3, "failed": 1} if always else {"done": 4})
    assert not always or "its worker process died" in place.ended[-1].note
    assert len(place.begun()) == 5 and place.kept("a") != always


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_with_its_workers(place, number):
    process = place.start(
        "helpers.fake_study", "fake", "--workers", "2", "--results", str(place.results),
        env={**os.environ, "FAKE_RUNS": "a:gated b:gated c"}, stderr=subprocess.DEVNULL)
    workers = until(place.begun, "", 2)
    process.send_signal(number)
    assert process.wait() != 0
    until(lambda: not any(map(alive, workers)))
    assert not place.kept("a") and not place.kept("b") and not place.kept("c")


# ----------------------------------------------------------------- Dask, on this machine


class Cluster:
    """A scheduler and workers, each a process; no nanny, which would start a worker again."""

    def __init__(self, place: Place) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.place, self.address = place, f"tcp://127.0.0.1:{self.port}"

    def start(self, kind: str, *options: str, **environment: str) -> subprocess.Popen:
        return self.place.start(
            f"distributed.cli.dask_{kind}", "--host", "127.0.0.1", "--no-dashboard", *options,
            env={**os.environ, **environment}, cwd=self.place.folder, stderr=subprocess.DEVNULL)

    def scheduler(self, **environment: str) -> subprocess.Popen:
        return self.start("scheduler", "--port", str(self.port), **environment)

    def worker(self, *options: str) -> subprocess.Popen:
        return self.start("worker", self.address, "--nthreads", "1", *options)


def test_a_cluster_may_lose_a_worker_and_its_scheduler(place):
    cluster = Cluster(place)
    scheduler, *_ = cluster.scheduler(), cluster.worker("--no-nanny"), cluster.worker("--no-nanny")
    done = place.threads.submit(place.sweep, GATED["a"], GATED["b"], C, D, dask=cluster.address)
    until(place.begun, "a"), until(place.begun, "b")
    place.kill("a")
    place.open("b")
    until(place.kept, "b", "c", "d"), until(place.begun, "a", 2)
    scheduler.kill()
    scheduler.wait()
    cluster.scheduler(), cluster.worker("--no-nanny")
    place.open("a")
    assert done.result() == {"done": 3, "there": 1} or done.result() == {"done": 4}
    assert place.kept("a") and all(len(place.begun(name)) == 1 for name in "bcd")


def test_what_dask_gives_up_is_tried_alone_and_records_come_back(place, monkeypatch, tmp_path):
    cluster = Cluster(place)
    cluster.scheduler(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    cluster.worker()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # the worker has its own folder of this name
    done = place.threads.submit(place.sweep, GATED["a"], B, C, dask=cluster.address,
                                folder=Path("results"))
    place.kill("a"), place.kill("a", 2)
    assert done.result() == {"done": 2, "failed": 1} and place.kept("b", "c")
    assert len(results.load("fake", Path("results"))) == 2


def test_no_scheduler_is_a_clear_error(place, monkeypatch):
    monkeypatch.setattr(sweep, "TIMEOUT", 0.5)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        place.sweep(A, dask="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="run `pip install distributed`"):
        place.sweep(A, dask="tcp://127.0.0.1:9")
