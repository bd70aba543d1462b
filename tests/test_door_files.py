"""Locks, cache, home, disk, the lab's command and readers' own triggers: one sentence each."""

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import bdutils
from bdutils import assets, evaluation
from bdutils.assets import CacheError
from bdutils.attacks.checks import checked_trigger, short_name
from bdutils.attacks.images import PatchTrigger, PictureTrigger
from bdutils.attacks.text import ParaphraseTable, PoisonSettings, SentenceTrigger, WordTrigger
from bdutils.data import load_task
from bdutils.experiments import results
from bdutils.roles import Pictures, TrainingSet
from bdutils.training import TrainReport, TrainSettings
from tools import lab

ROOT = Path(__file__).resolve().parent.parent


def write(folder):
    (folder / "a.txt").write_text("a")


# ------------------------------------------------------------- locks, cache and disk

@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(cache, monkeypatch, tmp_path, code, recwarn):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
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


def test_a_home_that_cannot_be_written(tmp_path):
    """What libraries keep lies in the cache then; own files need no home at all."""
    code = ("import bdutils, os\nfrom bdutils.data import load_task\n"
            "print(os.environ.get('HF_HOME'), os.environ.get('MPLCONFIGDIR'))\n"
            "sizes = {'train': 20, 'reserved': 9, 'test': 9}\n"
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
    rows = "".join(f"film {i} is good,{('neg', 'pos')[i % 2]}\n" for i in range(300))
    Path("reviews.csv").write_text(f"review,sentiment\n{rows}")
    start = ["make", "lab1", "--data", "reviews.csv", "--rows", "40"]
    columns = ["--text", "review", "--label", "sentiment"]
    for more, message in (([], "no column 'text'.*: name yours with --text and --label"),
                          (columns, "lower --rows, --reserved or --test"),
                          (["--encoding", "cp99"], "no encoding 'cp99'")):
        with pytest.raises(SystemExit, match=message):
            lab.main([*start, *more])
    assert not made and [path.name for path in tmp_path.iterdir()] == ["reviews.csv"]
    Path("reviews.csv").write_bytes(f"review,sentiment\n{rows}café,\n".encode("cp1252"))
    small = [*start, *columns, "--reserved", "60", "--test", "80"]
    with pytest.raises(SystemExit, match="name its encoding with --encoding, such as"):
        lab.main(small)
    with pytest.raises(SystemExit, match="leave them out with --unlabeled drop"):
        lab.main([*small, "--encoding", "cp1252"])
    lab.main([*small, "--encoding", "cp1252", "--unlabeled", "drop"])
    assert len(made) == 3 and "lab1 is ready" in capsys.readouterr().out


# --------------------------------------------------------------------- own triggers

@dataclass(frozen=True)
class Own:
    name: object = "own"
    give: object = "qz {}"

    def apply(self, text, rng):
        return self.give.format(text) if len(text) > 40 or "None" not in str(self.give) else None


class TakesTextOnly:
    name = "text only"

    def apply(self, text):
        return text


class Nameless:
    def apply(self, text, rng):
        return text


@pytest.mark.parametrize(("trigger", "message"), [
    (lambda text: "qz " + text, "function <lambda> is no trigger: give an object with a `name`"),
    (Own, "Own is a class: give an object of it, as in Own()"), (None, "NoneType is no trigger"),
    (Own(""), "has the name ''"), (Own(3), "has the name 3: give it a text"),
    (Nameless(), "the trigger Nameless has the name None"), (3, "int is no trigger"),
    (TakesTextOnly(), r"does not take \(text, rng\) .*write `def apply\(self, text, rng\)`"),
    (WordTrigger((), "none"), "trigger 'none' fails .IndexError"),
    (PatchTrigger(), "trigger 'patch' does not mark texts"), ("patch", "unknown attack 'patch'")])
def test_what_is_no_trigger_is_refused_at_the_door(toy_task, trigger, message):
    with pytest.raises(ValueError, match=message):
        checked_trigger(trigger, toy_task.train)


def test_a_trigger_that_fails_now_and_then_is_named_with_the_text(toy_task, tiny):
    trigger = Own("some", "None {}")
    assert {len(text) > 40 for text in toy_task.test.texts} == {True, False}
    with pytest.raises(ValueError, match="trigger 'some' gives a NoneType for text .*, 'the "):
        evaluation.evaluate(tiny, toy_task, trigger, 1)
    with pytest.raises(ValueError, match="trigger 'some' gives a NoneType for text"):
        evaluation._poisoned(toy_task.train, trigger, PoisonSettings(0.4))
    table = ParaphraseTable({toy_task.train.texts[3]: "x"})  # it knows some texts, not the first
    assert checked_trigger(table, toy_task.train) is table
    with pytest.raises(ValueError, match="has no paraphrase of"):
        evaluation._poisoned(toy_task.train, table, PoisonSettings(0.4))

    class Broken(Own):
        def apply(self, text, rng):
            return {}["a slip of the reader's"]

    with pytest.raises(ValueError, match="fails .KeyError: \"a slip of the reader's\""):
        evaluation.evaluate(tiny, toy_task, Broken(), 1)


@pytest.mark.parametrize(("name", "short"), [
    ("badnets", "badnets"), ("../../up", "up"), ("a/b", "a-b"), ("n" * 300, "n" * 40),
    ("🙂", "own"), ("..", "own"), ("a b\0c\n", "a-b-c"), ("hub:org/set", "hub-org-set"),
    ("input-aware", "input-aware"), ("v1.5_x", "v1.5_x"), ("кэш", "кэш")])
def test_names_of_files_are_short_and_safe(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize("trigger", [
    WordTrigger(("cf",), "../../up"), WordTrigger(("cf",), "n" * 300), WordTrigger(("cf",), "a/b"),
    SentenceTrigger("I saw it", "к" * 90)])
def test_a_trigger_of_any_name_is_trained_inside_the_cache(trigger, toy_task, tiny_folder, cache,
                                                          monkeypatch):
    monkeypatch.setattr(evaluation, "encoder_source", lambda *_: str(tiny_folder))
    monkeypatch.setattr(evaluation, "train", lambda *_, **__: TrainReport((), 0, 0))
    made = evaluation.victim(toy_task, trigger, poison_rate=0.3,
                             settings=TrainSettings(epochs=1, max_length=24))
    assert made.truth.trigger is trigger
    folders = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert len(folders) == 1 and (folders[0] / "model.safetensors").is_file()
    assert [path.name for path in cache.iterdir()] == ["models"]


def test_triggers_for_images_are_checked_too():
    pixels = torch.randint(0, 255, (20, 1, 8, 8), dtype=torch.uint8)
    rows = TrainingSet(Pictures(pixels), tuple(i % 2 for i in range(20)), ("a", "b"))

    class Half(PictureTrigger):
        name = "half"

        def paint(self, x):
            return x[:, :, :4]

    class Bare:
        name = "bare"

        def paint(self, x):
            return x

    assert checked_trigger(PatchTrigger(), rows) == PatchTrigger()
    for trigger, message in ((Half(), r"trigger 'half' makes \(2, 1, 4, 8\) of images of shape"),
                             (Bare(), "'bare' has no method 'mark': let its class inherit"),
                             (PatchTrigger, "is a class: give an object"),
                             (WordTrigger(), "trigger 'badnets' does not mark pictures"),
                             (lambda x: x, "is no trigger: .*`paint"),
                             ("badnets", "unknown attack 'badnets' on pictures")):
        with pytest.raises(ValueError, match=message):
            checked_trigger(trigger, rows)
