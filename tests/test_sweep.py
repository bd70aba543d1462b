"""Sweeps: what is there is not redone, what is lost is redone, whatever is killed meanwhile.

Nothing is mocked but the work: workers, schedulers and sweeps are processes and are killed.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import fake_study
import pytest
from joblib.externals.loky import reusable_executor

from bdutils import sweep
from bdutils.experiments import results

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parent.parent


class Place:
    """A folder of results, the log of the fake runs, and the command line on both."""

    def __init__(self, folder: Path) -> None:
        self.results, self.log = folder / "results", folder / "log"
        self.environment = {**os.environ, "FAKE_LOG": str(self.log), "PYTHONPATH":
                            os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}

    def start(self, *options: str, runs: dict, environment: dict = {},  # noqa: B006
              **changes) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tests/fake_study.py"), *options]
        if "--results" not in options and "FAKE_HOME" not in environment:
            command += ["--results", str(self.results)]
        return subprocess.Popen(command, text=True, **{
            "env": {**self.environment, "FAKE_RUNS": json.dumps(runs), **environment},
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **changes})

    def command(self, *options: str, runs: dict, **changes) -> tuple[int, str, str]:
        process = self.start(*options, runs=runs, **changes)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def names(self, kind: str) -> list[str]:
        return [fields[0] for fields in fake_study.lines(self.log, kind)]

    def wait(self, kind: str, count: int, seconds: float = 60) -> list[str]:
        """Wait until a line of this kind has been logged so often; return its fields."""
        end = time.time() + seconds
        while len(found := fake_study.lines(self.log, kind)) < count:
            assert time.time() < end, f"{len(found)} of {count} lines {kind!r}"
            time.sleep(0.01)
        return found[count - 1]

    def check(self, runs: list, but: tuple[str, ...] = ()) -> None:
        """Every record is there and whole, was written once, and nothing else is there."""
        expected = sorted(run.name for run in runs if run.name not in but)
        assert [made["name"] for made in results.load("fake", self.results)] == expected
        assert sorted(self.names("kept")) == expected
        there = {path.name for path in (self.results / "fake").iterdir()}
        # The lock of a killed process stays, and holds nothing.
        assert {f"{name}.json" for name in expected} == {
            name for name in there if not name.endswith(".lock")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Place(tmp_path)
    for name in ("FAKE_LOG", "PYTHONPATH"):  # loky's workers inherit them
        monkeypatch.setenv(name, made.environment[name])
    monkeypatch.setattr(results, "save", fake_study.save)
    monkeypatch.setattr(sweep, "PAUSE", 0.05)
    yield made
    if reusable_executor._executor:  # its workers know the log of this test only
        reusable_executor._executor.shutdown(kill_workers=True)


@pytest.fixture
def study(monkeypatch):
    """Let `bdutils.experiments.studies` hold fake runs."""
    def put(runs):
        stand_in = types.ModuleType("bdutils.experiments.studies")
        stand_in.STUDIES, stand_in.perform = {"fake": runs}, fake_study.perform
        monkeypatch.setitem(sys.modules, "bdutils.experiments.studies", stand_in)
        return runs

    return put


def carry_out(runs, place, **options):
    return sweep.carry_out((("fake", run) for run in runs), perform=fake_study.perform,
                           folder=place.results, **options)


def states(ended):
    return Counter(found.state for found in ended)


def test_damaged_and_misplaced_records_are_made_again(place, study):
    runs = study(fake_study.runs(6, 0.0))
    assert states(carry_out(runs, place)) == {"done": 6}
    paths = [results.place("fake", run.name, place.results) for run in runs]
    paths[0].write_text(paths[0].read_text()[:-20])
    paths[1].write_text("{}")
    shutil.copy(paths[3], paths[2])
    paths[4].write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a record of a run"):
        results.load("fake", place.results)
    todo = list(sweep.missing("fake", folder=place.results))
    assert todo == [runs[i] for i in (0, 1, 2, 4)]
    carry_out(todo, place)
    assert Counter(place.names("kept")) == {run.name: 1 + (run in todo) for run in runs}
    assert len(results.load("fake", place.results)) == 6
    assert not list(sweep.missing("fake", folder=place.results))
    assert {path.suffix for path in paths[0].parent.iterdir()} == {".json"}  # no lock is left


def test_one_run_can_be_made_again(place, study):
    runs = study(fake_study.runs(2, 0.0))
    carry_out(runs, place)
    assert states(carry_out(runs, place)) == {"there": 2}  # looked at again under the lock
    only = list(sweep.missing("fake", "run01", place.results))
    assert states(carry_out(only, place, redo=True)) == {"done": 1}
    assert place.names("kept") == ["run00", "run01", "run01"]


def test_a_full_disk_stops_the_sweep_and_leaves_no_piece(place, study):
    runs = {"count": 4, "seconds": 0.0, "large": 2}

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    status, out, err = place.command("fake", runs=runs, preexec_fn=small_files)
    assert status == 1 and "OSError" in err and "Traceback" not in err
    assert "record cannot be written (File too large): make room or choose another" in err
    assert "run02large.json" in err
    assert sorted(path.name for path in (place.results / "fake").iterdir()) == [
        "run00.json", "run01.json"]
    left = study(fake_study.runs(**runs))
    carry_out(sweep.missing("fake", folder=place.results), place)
    place.check(left)
    assert Counter(place.names("end"))["run00"] == 1


def test_a_refused_write_keeps_the_old_record(place, monkeypatch):
    run = fake_study.runs(1, 0.0)[0]
    carry_out([run], place)
    run = fake_study.FakeRun(0, 0.1)  # of the same name
    before = results.load("fake", place.results)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written .No space left.*make room"):
        carry_out([run], place, redo=True)
    assert results.load("fake", place.results) == before
    assert [path.name for path in (place.results / "fake").iterdir()] == ["run00.json"]


def test_two_sweeps_at_once_do_each_run_once(place, tmp_path):
    runs = {"count": 12, "seconds": 0.2}
    gate = tmp_path / "gate"
    gate.touch()  # both have looked what is missing before either has begun
    both = [place.start("fake", runs=runs, environment={"FAKE_WAIT": str(gate)})
            for _ in range(2)]
    place.wait("ready", 2)
    gate.unlink()
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    place.check(fake_study.runs(**runs))
    assert sorted(place.names("begin")) == [run.name for run in fake_study.runs(**runs)]
    assert len({fields[1] for fields in fake_study.lines(place.log, "end")}) == 2
    assert sum(int(out.split("done: ")[1].split(",")[0]) for out in outs) == 12


def test_the_command_line_with_two_workers(place, study, monkeypatch, capsys):
    runs = {"count": 6, "seconds": 0.1, "error": 2}
    status, out, err = place.command("fake", "--workers", "2", runs=runs)
    assert status == 1 and "failed: fake/run02error" in err and "Traceback" not in err
    assert "FAILED\nTraceback" in out and "the loss is no longer a number" in out
    assert "[6/6] fake/" in out and "done: 5, there: 0, elsewhere: 0, failed: 1" in out
    place.check(fake_study.runs(**runs), but=("run02error",))
    workers = {fields[1] for fields in fake_study.lines(place.log, "end")}
    assert len(workers) == 2
    assert place.names("dask") == ["False"]  # imported only when asked for
    study(fake_study.runs(**runs))
    monkeypatch.setattr(sys, "argv", ["sweep", "--results", str(place.results)])
    sweep.main()
    assert capsys.readouterr().out == "fake: 6 runs, 1 missing\n"


def test_a_killed_worker_costs_no_finished_run(place):
    runs = fake_study.runs(8, killed=3)
    ended = carry_out(runs, place, workers=2)
    assert {found.run for found in ended} == set(runs) and len(ended) == 8
    assert set(states(ended)) <= {"done", "there"}
    place.check(runs)
    assert place.names("begin").count("run03killed") == 2


def gaps(place: Place) -> list[float]:
    """Return the seconds between the end of a run and the start of the next in its process."""
    by_process: dict[str, list[tuple[float, float]]] = {}
    for _, process, start, end in fake_study.lines(place.log, "end"):
        by_process.setdefault(process, []).append((float(start), float(end)))
    return [after[0] - before[1] for spans in by_process.values()
            for before, after in zip(spans, spans[1:])]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_overhead_is_under_two_percent(place, workers):
    seconds = 2.0  # a real run takes longer: it reads data and a model, and measures
    carry_out(fake_study.runs(5 * workers, seconds), place, workers=workers)
    found = sorted(gaps(place))
    assert len(found) == 4 * workers
    # The lower quartile, since other programs may take the cores meanwhile.
    assert found[len(found) // 4] < 0.02 * seconds, found


@pytest.mark.slow
def test_a_run_that_always_kills_its_worker_stops_only_itself(place, monkeypatch):
    monkeypatch.setattr(sweep, "ATTEMPTS", 2)
    runs = fake_study.runs(5, deadly=0)
    with pytest.raises(RuntimeError, match="lost 2 times while nothing.*Not done: .*run00deadly"):
        carry_out(runs, place, workers=2)
    place.check(runs, but=("run00deadly",))


@pytest.mark.slow
def test_an_interrupted_sweep_ends_at_once_with_its_workers(place):
    process = place.start("fake", "--workers", "2", runs={"count": 40, "seconds": 3},
                          start_new_session=True)
    place.wait("begin", 2)
    start = time.time()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=30)
    assert process.returncode not in (0, 1) and time.time() - start < 3
    assert not place.names("end")
    for _, worker in fake_study.lines(place.log, "begin"):
        assert not alive(int(worker))


def alive(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False


# ----------------------------------------------------------------- Dask, on this machine


class Cluster:
    """A scheduler and workers, each a process."""

    def __init__(self, environment: dict, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.environment = f"tcp://127.0.0.1:{self.port}", environment
        self.folder, self.processes = folder, []

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{options[0]}", "--no-dashboard",
             *options[1:]], env={**self.environment, **environment}, cwd=self.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def scheduler(self) -> subprocess.Popen:
        return self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port))

    def worker(self, **environment: str) -> subprocess.Popen:
        # Without a nanny, which would start a killed worker again.
        return self.start("worker", self.address, "--nthreads", "1", "--no-nanny",
                          "--host", "127.0.0.1", **environment)


@pytest.fixture
def cluster(place, tmp_path):
    made = Cluster(place.environment, tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_cluster_may_lose_worker_scheduler_and_sweep(place, cluster):
    runs = {"count": 24, "seconds": 0.3}
    scheduler, *_ = cluster.scheduler(), cluster.worker(), cluster.worker()
    first = place.start("fake", "--dask", cluster.address, runs=runs)
    count = len(fake_study.lines(place.log, "begin"))

    def just_begun() -> list[str]:
        nonlocal count
        count = len(fake_study.lines(place.log, "begin")) + 1
        return place.wait("begin", count)

    place.wait("kept", 4)
    worker = int(just_begun()[1])
    os.kill(worker, signal.SIGKILL)  # its run goes to the other one
    cluster.worker()
    place.wait("kept", 8)
    name, worker = just_begun()
    first.kill()
    first.wait()
    while name not in place.names("kept"):  # by the worker: the file system is shared
        assert alive(int(worker))
        time.sleep(0.01)
    second = place.start("fake", "--dask", cluster.address, runs=runs)
    place.wait("kept", 12)
    just_begun()
    scheduler.kill()
    scheduler.wait()
    cluster.scheduler(), cluster.worker(), cluster.worker()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "workers were lost" in out
    place.check(fake_study.runs(**runs))


@pytest.mark.slow
def test_records_come_back_where_no_file_system_is_shared(place, cluster, tmp_path):
    runs = {"count": 3, "seconds": 0.0}
    paths = {}
    for name in ("here", "there"):  # two checkouts, each with a results folder of its own
        shutil.copytree(ROOT / "bdutils", tmp_path / name / "bdutils")
        paths[name] = os.pathsep.join((str(tmp_path / name), str(ROOT / "tests")))
    cluster.scheduler(), cluster.worker(PYTHONPATH=paths["there"])
    status, _, err = place.command("fake", "--dask", cluster.address, runs=runs, environment={
        "PYTHONPATH": paths["here"], "FAKE_HOME": "here"})
    assert status == 0, err
    for name in paths:
        assert len(results.load("fake", tmp_path / name / "data/results")) == 3
    assert len(place.names("end")) == 3


@pytest.mark.slow
def test_a_task_that_dask_gives_up_does_not_hang_the_sweep(place, cluster, monkeypatch):
    """As a task that has taken several workers with it; a nanny starts each again."""
    monkeypatch.setattr(sweep, "ATTEMPTS", 2)
    runs = fake_study.runs(3, 0.1, deadly=0)
    cluster.environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "0"
    cluster.scheduler()
    for _ in range(2):
        cluster.start("worker", cluster.address, "--nthreads", "1", "--host", "127.0.0.1")
    with pytest.raises(RuntimeError, match="KilledWorker.*Not done: fake/run00deadly"):
        carry_out(runs, place, dask=cluster.address)
    place.check(runs, but=("run00deadly",))


def test_no_scheduler_is_a_clear_error(place, monkeypatch):
    from bdutils import cluster

    monkeypatch.setattr(cluster, "TIMEOUT", 0.5)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        carry_out(fake_study.runs(1), place, dask="tcp://127.0.0.1:9")


def test_workers_with_several_threads_are_refused(place):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None,
                      scheduler_port=0) as local:
        with pytest.raises(ValueError, match="several threads.*--nthreads 1"):
            carry_out(fake_study.runs(1), place, dask=local.scheduler_address)


def test_without_dask_the_remedy_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "bdutils.cluster", raising=False)
    monkeypatch.delattr("bdutils.cluster", raising=False)
    with pytest.raises(ImportError, match="run `pip install distributed`"):
        carry_out(fake_study.runs(1), place, dask="tcp://127.0.0.1:9")
