"""Data sets: where they come from, and how they are dealt out to the three roles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .. import scale as current_scale
from ..roles import Images, Task
from ..samples import DataError, in_words
from .deal import Rules, check_sizes, make
from .hub import read_hub
from .image import Size, as_images, check_size, holds_images, read_folder
from .known import IMAGES, NEWSGROUPS, TEXTS, known_texts, load_images
from .labels import Raw
from .tables import KNOWN, read_table, suffix_of

# Our own choice of sizes. At `small` one victim trains in about a minute on two cores, and
# about 500 non-target test samples put the 95% interval of an ASR of 99% at 98 to 99.6%.
SIZES: dict[str, dict[str, int | None]] = {
    "small": {"train": 3000, "clean": 800, "test": 1000},
    "full": {"train": None, "clean": 800, "test": None},
}
SMALL = {"sentiment": "snippets", "topic": "newsgroups", "topic8": "newsgroups8",
         "images": "fashion"}
FULL = {"sentiment": "sst2", "topic": "ag_news", "offensive": "olid", "images": "cifar10"}
IMAGE_SETS = tuple(IMAGES)
# Ours: a small network sees more images in a minute than an encoder sees sentences.
IMAGE_SIZES: dict[str, dict[str, int | None]] = {
    "small": {"train": 12000, "clean": 500, "test": 5000},
    "full": {"train": None, "clean": 500, "test": None},
}


@dataclass(frozen=True)
class ReadConfig(Rules):
    """How a reader's own data are read."""

    encoding: str | None = None
    """Of the characters of a file; `utf-8`, or what its first bytes say, if None."""
    separator: str | None = None
    """Of the cells in a CSV file; found by the names of the columns if None."""
    size: Size = None
    """Height and width of images, or one number for both; that of most images if None."""

    def __post_init__(self) -> None:
        """Reject what is no size and no separator."""
        super().__post_init__()
        check_size(self.size)
        if self.separator is not None and (len(self.separator) != 1 or self.separator in "\"\r\n"):
            raise ValueError(f"separator={self.separator!r}: use one character, such as ';'")


def load_task(source: str | os.PathLike = "sentiment", *, scale: str | None = None, seed: int = 0,
              text: str = "text", label: str = "label",
              sizes: Mapping[str, int | None] | None = None,
              folder: str | os.PathLike | None = None, **reading: Any) -> Task:
    """Load a data set and split it into the three roles.

    A column `split` of a file is honored (`train`, `dev`, `test` and their usual synonyms), and so
    are folders of those names above folders of images. `report` of the task says what was read,
    kept and dropped.

    Args:
        source: `sentiment`, `topic`, `topic8`, `offensive` or `images` (of a scale, or of both);
            the name of one data set (`snippets`, `newsgroups`, `newsgroups8`, `sst2`, `ag_news`,
            `olid`, `fashion`, `cifar10`, `gtsrb`); the path of a CSV, TSV, JSON, JSON-lines or
            parquet file, packed by `gzip` or not; the path of a folder that holds a folder of
            images for each class; `hub:ORG/NAME` or `hub:ORG/NAME:CONFIG`.
        scale: `small` or `full`; the scale in force if None.
        seed: Of the split.
        text, label: Column names, for files and hub data sets.
        sizes: Samples per role, overriding `SIZES`; None means all there are.
        folder: Where `NAME.parquet` lies, or `NAME_train.parquet` and `NAME_test.parquet` for
            images, in place of the hub.
        **reading: Fields of `ReadConfig`, for own data: unlabeled, splits, encoding, separator
            and size.

    Returns:
        A task whose roles share no sample.

    Raises:
        ValueError: For an unknown source, a missing column, a bad label or too few samples.
        TypeError: For an option that there is not, or a source that is no text.
        FileNotFoundError: For a missing file.
        AssetError: Without a network.
        ConnectionError: Without a network.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"load_task takes a name or a path, not a {type(source).__name__}: for "
                        "texts and labels that you have in Python use make_task(texts, labels)")
    chosen, config = current_scale(scale), _config(reading)
    name = {"small": SMALL, "full": FULL}[chosen].get(str(source), str(source))
    check_sizes(sizes or {})
    if reading and name in ("snippets", *NEWSGROUPS, *TEXTS, *IMAGES):
        raise DataError(f"{name} is known to the book and is read in one way",
                        f"leave out {', '.join(sorted(reading))}")
    place = _path(folder) if folder else None
    if folder and (name in ("snippets", *NEWSGROUPS) or suffix_of(Path(name)) in KNOWN):
        raise DataError(f"{name} is not taken from a folder", "leave out folder=...")
    if name in IMAGES:
        return load_images(name, {**IMAGE_SIZES[chosen], **(sizes or {})}, seed, place)
    if known := known_texts(name, place):
        raw, origin = known
    elif own := _own(name, (text, label), place, config):
        raw, origin, name = own
    else:
        there = sorted({*SMALL, *FULL, *SMALL.values(), *TEXTS, *IMAGES})
        raise ValueError(f"unknown data set {str(source)!r} at scale {chosen}: use one of "
                         f"{there}, the path of a {'/'.join(KNOWN)} file or of a folder of "
                         "images, or hub:ORG/NAME")
    return make(raw, name, _sizes(raw, chosen, sizes), seed, origin, config, loud=not known)


def make_task(samples: Any, labels: Any, *, split: Any = None,
              names: Sequence[str] | None = None, name: str = "own", seed: int = 0,
              sizes: Mapping[str, int | None] | None = None, **reading: Any) -> Task:
    """Make a task of what you have in Python: lists, arrays, tensors, columns of a table.

    Args:
        samples: Texts; or images, as Pillow has them or as an array or tensor of uint8, of shape
            (n, H, W), (n, C, H, W) or (n, H, W, C) with one or three channels.
        labels: (n,) numbers from 0, truth values, or names of classes.
        split: (n,) names such as `train`, `dev` and `test`, None to deal at random.
        names: Of the classes, in the order of their numbers; taken from the labels if None.
        name: Of the task.
        seed: Of the split.
        sizes: Samples a role, as for `load_task`.
        **reading: As for `load_task`: unlabeled, splits and size.

    Returns:
        A task whose roles share no sample.

    Raises:
        ValueError: For samples or labels that cannot be taken, with the sample.
        TypeError: For an option that there is not.
    """
    for what, given in (("samples", samples), ("labels", labels)):
        if given is None or isinstance(given, str | bytes):
            raise TypeError(f"{what} is a {type(given).__name__}: give a list, an array or a "
                            "column of a table")
    config = _config(reading)
    check_sizes(sizes or {})
    samples = samples if hasattr(samples, "__len__") else list(samples)
    found, notes = as_images(samples, config.size) or (list(samples), ())
    raw = Raw(found, list(labels), None if split is None else list(split),
              None if names is None else tuple(map(str, names)), notes=notes)
    return make(raw, name, _sizes(raw, current_scale(), sizes), seed, f"made here: {name}", config)


def _sizes(raw: Raw, scale: str, sizes: Mapping[str, int | None] | None
           ) -> dict[str, int | None]:
    default = IMAGE_SIZES if isinstance(raw.inputs, Images) else SIZES
    return {**default[scale], **(sizes or {})}


def _config(given: dict[str, Any]) -> ReadConfig:
    there = [field.name for field in fields(ReadConfig)]
    if unknown := sorted(set(given) - set(there)):
        raise TypeError(f"there is no option {unknown[0]!r}: use one of {', '.join(there)}")
    return ReadConfig(**given)


def _path(given: str | os.PathLike) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise DataError(f"there is no home folder for {given}", "write the path in full") from None


def _own(name: str, columns: tuple[str, str], folder: Path | None, config: ReadConfig
         ) -> tuple[Raw, str, str] | None:
    """Return a reader's own samples, where they came from, and the name of the task."""
    if name.startswith("hub:") and name[4:].strip():
        there = Path(name[4:])
        if not (there.is_dir() and holds_images(there)):
            hub_id, _, part = name[4:].partition(":")
            remedy = "save it as a file elsewhere, and name that file"
            return read_hub(hub_id, part or None, columns, None, remedy,
                            size=config.size), name, name
        folder, name = there, there.name
    path = folder or _path(name)
    if path.is_dir() and name.strip():
        title = name if folder else path.resolve().name
        return read_folder(path, config.size, config.splits), f"folder: {path.name}", title
    if folder:
        raise FileNotFoundError(f"there is no folder {folder}: check the path")
    if suffix_of(path) in KNOWN:
        table = read_table(path, columns, config.encoding, config.separator)
        stem = path.stem.removesuffix(path.suffixes[-2]) if path.suffix.lower() == ".gz" else (
            path.stem)
        return table.raw(*columns), f"file: {path.name}", stem
    if path.is_file():
        raise DataError(f"{path.name} is of a form that is not known",
                        f"save it as one of {in_words(KNOWN, 9)}, packed by gzip or not")
    return None
