"""Locks, cache, home, disk and the lab's command: one sentence each."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

import bdutils
from bdutils import assets
from bdutils.assets import CacheError
from bdutils.data import load_task
from bdutils.experiments import results
from tools import lab

ROOT = Path(__file__).resolve().parent.parent


def write(folder):
    (folder / "a.txt").write_text("a")


# ------------------------------------------------------------- locks, cache and disk

@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(cache, monkeypatch, tmp_path, code, recwarn):
    def reject(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", reject)
    assert (assets.entry("models/mine", write) / "a.txt").read_text() == "a"
    with results.locked(tmp_path / "study/run.json") as ours:
        assert ours
    assert not list(recwarn)


def test_without_locks_the_faster_one_stays(cache):
    def build(folder):
        write(folder)
        assets._build(cache / "models/mine", write, {})  # as another process does meanwhile

    folder = assets.entry("models/mine", build)
    assert assets.is_intact(folder)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["mine"]


@pytest.mark.parametrize(("place", "message"), [
    ("file", "is a file, or lies below one: set BDUTILS_CACHE to a folder"),
    ("file/below", "is a file, or lies below one"), ("n" * 300, "has too long a name"),
    ("~nobodyknows/x", "there is no home folder for the cache ~nobodyknows/x: set BDUTILS_CACHE"),
    ("J\udcc3rg", "letters that Python does not know in this locale: set PYTHONUTF8=1")])
def test_a_cache_that_cannot_be(tmp_path, monkeypatch, place, message):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDUTILS_CACHE", place if place[0] == "~" else f"{tmp_path}/{place}")
    monkeypatch.setattr(assets, "_build", lambda *_: pytest.fail("it worked for nothing"))
    with pytest.raises(CacheError, match=message):
        assets.asset("snippets")
    with pytest.raises(CacheError, match=message):
        load_task("sentiment")


def test_a_cache_that_is_chosen_by_call(tmp_path, monkeypatch):
    monkeypatch.setenv("BDUTILS_CACHE", "unset")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file: name a folder"):
        bdutils.use_cache(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no home folder for ~nobodyknows: write the path"):
        bdutils.use_cache("~nobodyknows")


@pytest.mark.parametrize("error", [
    OSError(errno.EROFS, "Read-only file system"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_disk_that_takes_no_more(cache, error):
    def build(folder):
        write(folder)
        raise error

    with pytest.raises(CacheError, match="is full or read-only .*: set BDUTILS_CACHE") as seen:
        assets.entry("models/mine", build)
    assert seen.value.__cause__ is error
    assert [path.name for path in (cache / "models").iterdir()] == ["mine.lock"]


def test_a_full_disk_is_seen_before_the_work(cache, monkeypatch):
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CacheError, match="full or read-only"):
        assets.entry("models/mine", lambda _: pytest.fail("it worked for nothing"))


def test_errors_of_others_are_not_the_cache_s(cache, tmp_path):
    for error in (PermissionError(13, "Permission denied", str(tmp_path / "mine.csv")),
                  FileNotFoundError(2, "No such file", "x"), OSError("no such model"),
                  ValueError("a mistake")):
        def build(folder, error=error):
            raise error

        with pytest.raises(type(error)) as seen:
            assets.entry("models/mine", build)
        assert seen.value is error


def test_a_program_that_finds_the_disk_full(cache, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(
            command, 1, "", "ERROR: Could not install: [Errno 28] No space left on device: '/x'")

    monkeypatch.setattr(assets.subprocess, "run", run)
    for name in ("snippets", "fashion_mnist"):
        with pytest.raises(CacheError, match="full or read-only .*: make room"):
            assets.asset(name)
    with pytest.raises(CacheError, match="make room"):  # and no try at the hub
        load_task("images", scale="small")


def test_no_apt_get_and_no_hub(cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="no apt-get here; and .* could not be loaded from "
                       "the hub .*unset HF_HUB_OFFLINE.*copy the folder .*fashion_mnist") as seen:
        load_task("images", scale="small")
    assert "small" not in str(seen.value)  # which it is


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path):
    """What libraries keep lies in the cache then; own files need no home at all."""
    code = ("import bdutils, os\nfrom bdutils.data import load_task\n"
            "print(os.environ.get('HF_HOME'), os.environ.get('MPLCONFIGDIR'))\n"
            "sizes = {'train': 20, 'clean': 9, 'test': 9}\n"
            "print(len(load_task('mine.csv', sizes=sizes).train))")
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n"
                                                                for i in range(60)))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "gone"), "PYTHONPATH": str(ROOT),
           "BDUTILS_CACHE": "kept"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                         capture_output=True)
    kept = tmp_path / "kept"
    assert run.stdout.split() == [f"{kept}/huggingface", f"{kept}/matplotlib", "20"], run.stderr
    env = {**env, "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                         capture_output=True)
    assert run.stdout.split() == ["None", "None", "20"], run.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.csv", ".cache", ".config"}


def test_a_record_that_could_not_be_kept_is_not_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no record can be kept.*choose another folder .--results"):
        with results.locked(tmp_path / "file/study/run.json"):
            pytest.fail("it worked for nothing")


# ------------------------------------------------------------------------- the lab

def test_the_lab_takes_columns_of_other_names(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(lab, "_suspect", lambda folder, *_: (folder.mkdir(), made.append(folder)))
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"film {i} is good,{('neg', 'pos')[i % 2]}\n" for i in range(300))
    Path("reviews.csv").write_text(f"review,sentiment\n{lines}")
    start = ["make", "lab1", "--data", "reviews.csv", "--samples", "40"]
    columns = ["--text", "review", "--label", "sentiment"]
    for more, message in (([], "no column 'text'.*: name yours with --text and --label"),
                          (columns, "lower --samples, --clean or --test"),
                          (["--encoding", "cp99"], "no encoding 'cp99'")):
        with pytest.raises(SystemExit, match=message):
            lab.main([*start, *more])
    assert not made and [path.name for path in tmp_path.iterdir()] == ["reviews.csv"]
    Path("reviews.csv").write_bytes(f"review,sentiment\n{lines}café,\n".encode("cp1252"))
    small = [*start, *columns, "--clean", "60", "--test", "80"]
    with pytest.raises(SystemExit, match="name its encoding with --encoding, such as"):
        lab.main(small)
    with pytest.raises(SystemExit, match="leave them out with --unlabeled drop"):
        lab.main([*small, "--encoding", "cp1252"])
    lab.main([*small, "--encoding", "cp1252", "--unlabeled", "drop"])
    assert len(made) == 3 and "lab1 is ready" in capsys.readouterr().out
