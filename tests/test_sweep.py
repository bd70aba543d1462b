"""Sweeps: what is there is not redone, what is lost is redone, whatever is killed meanwhile.

Workers, schedulers and sweeps are real processes. Gated runs wait for a test, which so has the
order of all that happens in its hand.
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
from types import SimpleNamespace

import pytest
from helpers.fake_study import FakeRun, make_record

from bdutils import sweep
from bdutils.experiments import results

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds, against hanging only: beside busy cores, two workers took over 120 to begin
A, B, C, D = (FakeRun(name) for name in "abcd")
GATED_A, GATED_B, GATED_D = (FakeRun(name, "gated") for name in "abd")


def until(condition, *arguments):
    """Wait for what must come."""
    end = time.monotonic() + LIMIT
    while not (found := condition(*arguments)):
        assert time.monotonic() < end, f"{condition.__qualname__}{arguments} did not come"
        time.sleep(0.01)
    return found


class Place:
    """A folder of results, and the processes of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.processes = folder, folder / "results", []
        self.threads = ThreadPoolExecutor()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = "tcp://{}:{}".format(*free.getsockname())

    def begun(self, name: str = "*", count: int = 0) -> list[str]:
        """Return the processes in which runs of this name began; none if under count."""
        found = sorted(path.name.split("-") for path in self.folder.glob(f"{name}-*-*"))
        return [process for *_, process in found] if len(found) >= count else []

    def kill(self, name: str, count: int = 1) -> None:
        """Kill the worker in which a run has begun so often."""
        os.kill(int(until(self.begun, name, count)[-1]), signal.SIGKILL)

    def kept(self) -> set[str]:
        return {path.stem for path in self.results.glob("fake/*.json")}

    def sweep(self, *runs: FakeRun, **options) -> Counter:
        todo = [("fake", run) for run in runs]
        options = {"folder": self.results, "make": make_record, **options}
        return Counter(found.state for found in sweep.run_all(todo, **options))

    def start(self, *command: str, **options) -> subprocess.Popen:
        self.processes.append(subprocess.Popen([sys.executable, "-m", *command], **options))
        return self.processes[-1]

    def scheduler(self) -> subprocess.Popen:
        host, port = self.address.removeprefix("tcp://").split(":")
        return self.start("distributed.cli.dask_scheduler", "--host", host, "--port", port)

    def dask_worker(self) -> None:  # no nanny, which would start a killed one again
        self.start("distributed.cli.dask_worker", self.address, "--no-nanny", "--nthreads", "1",
                   cwd=self.folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path)
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    fakes = SimpleNamespace(make_record=make_record,
                            STUDIES={"fake": [A, FakeRun("b", "faulty"), C]})
    monkeypatch.setitem(sys.modules, "bdutils.experiments.studies", fakes)
    monkeypatch.setitem(sys.modules, "bdutils.experiments.run", fakes)
    yield made
    for name in "abd":
        (tmp_path / name).touch()
    for process in made.processes:
        process.kill()
        process.wait()
    made.threads.shutdown()


def test_damaged_and_misplaced_records_are_made_again(place):
    assert place.sweep(A, B, C, D) == {"done": 4}
    whole, cut, other = (results.place("fake", name, place.results) for name in "dac")
    cut.write_text(cut.read_text()[:-20])
    shutil.copy(whole, other)
    assert [run.name for run in sweep.missing("fake", folder=place.results)] == ["a", "c"]
    assert place.sweep(A, B, C, D) == {"done": 2, "there": 2}
    assert len(results.load("fake", place.results)) == 4 and len(place.begun()) == 6


def test_a_full_disk_is_one_sentence_and_the_old_record_stays(place):
    place.sweep(A)
    before = {path: path.read_text() for path in place.results.glob("fake/*")}
    full = place.start("helpers.fake_study", "fake", "--only", "a", "--results", place.results,
                       env={**os.environ, "FAKE_RUNS": "a"}, stderr=subprocess.PIPE, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)))
    message = full.communicate()[1]
    assert full.returncode == 1 and len(place.begun("a")) == 2 and message.count("\n") == 1
    assert "the record cannot be written (File too large): make room or choose" in message
    assert {path: path.read_text() for path in place.results.glob("fake/*")} == before


def test_two_sweeps_at_once_do_each_run_once(place):
    first = place.threads.submit(place.sweep, GATED_A, GATED_B, C, workers=2)
    until(place.begun, "a", 1), until(place.begun, "b", 1)
    second = place.threads.submit(place.sweep, GATED_A, GATED_B, C)
    assert second.result(LIMIT) == {"elsewhere": 2, "done": 1}
    (place.folder / "a").touch(), (place.folder / "b").touch()
    assert first.result(LIMIT) == {"done": 2, "there": 1} and len(place.begun()) == 3


def test_the_command_line(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "--results", str(place.results), "fake"])
    with pytest.raises(SystemExit, match="failed: fake/b"):
        sweep.main()
    out = capsys.readouterr().out
    assert "b FAILED\nTraceback" in out and "the loss is no longer a number" in out
    assert "[3/3] fake/c" in out and "done: 2, there: 0, elsewhere: 0, failed: 1" in out
    sys.argv.pop()
    sweep.main()
    assert capsys.readouterr().out == "fake: 3 runs, 1 missing\n"


def test_a_killed_worker_takes_no_other_run_with_it(place):
    done = place.threads.submit(place.sweep, GATED_A, GATED_B, C, GATED_D, workers=2)
    until(place.begun, "b", 1)
    place.kill("a")
    place.kill("d")
    (place.folder / "b").touch()
    until(place.begun, "a", 2)
    assert place.kept() == {"b", "c"} and len(place.begun("d")) == 1  # so that it is alone
    (place.folder / "a").touch()
    place.kill("d", 2)
    assert done.result(LIMIT) == {"done": 3, "failed": 1}
    assert place.kept() == {"a", "b", "c"} and len(place.begun()) == 6


def test_an_interrupted_sweep_ends_with_its_workers(place):
    process = place.start(
        "helpers.fake_study", "fake", "--workers", "2", "--results", place.results,
        env={**os.environ, "FAKE_RUNS": "a:gated b:gated c"}, stderr=subprocess.DEVNULL)
    workers = until(place.begun, "*", 2)
    process.send_signal(signal.SIGTERM)  # which is made the same as Ctrl+C
    assert process.wait(LIMIT) != 0
    until(lambda: not any(Path("/proc", worker).exists() for worker in workers))
    assert not place.kept()


def test_a_cluster_may_lose_a_worker_and_its_scheduler(place):
    scheduler, *_ = place.scheduler(), place.dask_worker(), place.dask_worker()
    done = place.threads.submit(place.sweep, GATED_A, B, C, dask=place.address)
    place.kill("a")
    until(place.begun, "a", 2)
    finished = place.kept()
    scheduler.kill()
    scheduler.wait()
    place.scheduler(), place.dask_worker()
    (place.folder / "a").touch()
    assert sum(done.result(LIMIT).values()) == 3 and place.kept() == {"a", "b", "c"}
    assert all(len(place.begun(name)) == 1 for name in finished)


def test_what_dask_gives_up_is_tried_alone_and_records_come_back(place, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    place.scheduler(), place.dask_worker()
    (place.folder / "here").mkdir()
    monkeypatch.chdir(place.folder / "here")  # the worker has a folder of this name of its own
    done = place.threads.submit(place.sweep, GATED_A, B, C, dask=place.address,
                                folder=Path("results"))
    place.kill("a")
    place.dask_worker()
    place.kill("a", 2)
    place.dask_worker()
    assert done.result(LIMIT) == {"done": 2, "failed": 1}
    assert len(results.load("fake", Path("results"))) == 2 and place.kept() == {"b", "c"}


def test_no_scheduler_is_a_clear_error(place, monkeypatch):
    monkeypatch.setattr(sweep, "TIMEOUT", 0.1)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        place.sweep(A, dask="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="run `pip install distributed`"):
        place.sweep(A, dask="tcp://127.0.0.1:9")
