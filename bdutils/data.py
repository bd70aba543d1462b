"""Data in three roles that the types keep apart: training, reserved, test.

An experiment on backdoors has three parties. The attacker poisons the *training set*, the
defender owns a small *reserved* clean set, and the examiner owns the *test set*. Each role has
its own type here, and `DefenderView` is all that a defense is ever given.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import scale as current_scale
from .assets import asset


class Pictures(Sequence):
    """Pictures with the manners of a tuple of texts, so that both take the same ways.

    Args: pixels: uint8 tensor (n, C, H, W) with one or three channels.
    Raises: ValueError for another shape or type.
    """

    def __init__(self, pixels: Tensor) -> None:
        """Hold the pixels; nobody may change them."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"pictures must be uint8 of shape (n, 1 or 3, H, W), not "
                             f"{pixels.dtype} of shape {tuple(pixels.shape)}")
        self.pixels = pixels

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        """Return one picture (C, H, W)."""
        return self.pixels[i]

    def take(self, rows: Sequence[int]) -> Pictures:
        """Return the given pictures, in that order.

        Source: ours.
        """
        return Pictures(self.pixels[torch.as_tensor(rows, dtype=torch.long)])


def evenly(rows: Sequence[int], labels: Sequence[int], size: int, classes: int) -> list[int]:
    """Take the first rows of each class, as many of one as of another while they last.

    Args: rows: indices into `labels`; size: how many; classes: K.
    Returns: the indices, in the order of `rows`.
    Source: ours.
    """
    queues = [[row for row in rows if labels[row] == k] for k in range(classes)]
    share = 0
    while sum(min(share, len(queue)) for queue in queues) < size:
        share += 1
    # Round by round, so that what is cut off at the end is cut off the last round.
    taken = [queue[i] for i in range(share) for queue in queues if i < len(queue)][:size]
    chosen = set(taken)
    return [row for row in rows if row in chosen]


@dataclass(frozen=True)
class Examples:
    """Labeled rows: `texts[i]` has class `labels[i]`, named `label_names[labels[i]]`.

    A row is a text or, where `texts` is a `Pictures`, a picture.

    Raises: ValueError for no rows, lengths that differ, an empty text or a label out of range.
    """

    texts: tuple[str, ...] | Pictures
    labels: tuple[int, ...]
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the rows once, where they enter."""
        if not len(self.texts):
            raise ValueError("no rows: check the file, the split and the filters")
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels")
        for row, text in enumerate(() if self.are_pictures else self.texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"row {row} has no text: drop it or fill it in")
        for row, label in enumerate(self.labels):
            if label not in range(self.num_labels):
                raise ValueError(f"row {row} has label {label!r}: labels must be whole numbers "
                                 f"from 0 to {self.num_labels - 1}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    @property
    def num_labels(self) -> int:
        """Return K, the number of classes."""
        return len(self.label_names)

    @property
    def are_pictures(self) -> bool:
        """Tell whether the rows are pictures."""
        return isinstance(self.texts, Pictures)

    def take(self, rows: Sequence[int]) -> Examples:
        """Return the given rows, in that order, in the same role.

        Args: rows: indices into this set.
        Source: ours.
        """
        texts = self.texts.take(rows) if self.are_pictures else tuple(self.texts[i] for i in rows)
        return replace(self, texts=texts, labels=tuple(self.labels[i] for i in rows))

    def few(self, count: int) -> Examples:
        """Return the first rows of each class, as many of one as of another while they last.

        Args: count: rows in all, 1 to n.
        Raises: ValueError for another count.
        Source: ours.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot take {count} of {len(self)} rows")
        return self.take(evenly(range(len(self)), self.labels, count, self.num_labels))

    def changed(self, rows: Sequence[int], texts: Sequence[str] | Pictures,
                label: int) -> Examples:
        """Return a copy in which some rows are others, all with one label.

        Args: rows: indices into this set; texts: what stands there now, one a row; label: theirs.
        Source: ours.
        """
        if self.are_pictures:
            pixels = self.texts.pixels.clone()
            pixels[torch.as_tensor(rows, dtype=torch.long)] = texts.pixels
            new: tuple | Pictures = Pictures(pixels)
        else:
            by_row = dict(zip(rows, texts, strict=True))
            new = tuple(by_row.get(i, text) for i, text in enumerate(self.texts))
        hit = set(rows)
        labels = tuple(label if i in hit else y for i, y in enumerate(self.labels))
        return replace(self, texts=new, labels=labels)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify texts, labels and class names.

        Source: ours.
        """
        if self.are_pictures:
            pixels = self.texts.pixels
            data = json.dumps([list(pixels.shape), self.labels, self.label_names]).encode()
            return hashlib.sha256(data + pixels.numpy().tobytes()).hexdigest()[:16]
        data = json.dumps([self.texts, self.labels, self.label_names])
        return hashlib.sha256(data.encode()).hexdigest()[:16]


class TrainingSet(Examples):
    """What the victim trains on; an attacker may have poisoned it, and it does not say so."""


class ReservedSet(Examples):
    """Clean rows that the defender alone holds."""


class TestSet(Examples):
    """Rows for measuring; only the examiner may touch them."""

    __test__ = False  # not a pytest class


@dataclass(frozen=True)
class Task:
    """One data set, split into the three roles.

    Fields: name: of the data set; train, reserved, test: disjoint; source: where it came from.
    """

    name: str
    train: TrainingSet
    reserved: ReservedSet
    test: TestSet
    source: str

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify all three roles.

        Source: ours.
        """
        parts = (self.train, self.reserved, self.test)
        return hashlib.sha256("".join(p.fingerprint() for p in parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DefenderView:
    """All data that a defense receives: reserved rows and, at most, the training pool.

    It refuses test data, and neither of its parts refers to the trigger, the target label or
    the rows that are poisoned, so a defense cannot use what a real defender would not know.

    Raises: TypeError if a part has another role.
    """

    reserved: ReservedSet
    pool: TrainingSet | None = None

    def __post_init__(self) -> None:
        """Hold the roles apart."""
        if type(self.reserved) is not ReservedSet:
            raise TypeError(f"a defender's clean rows must be a ReservedSet, "
                            f"not a {type(self.reserved).__name__}")
        if self.pool is not None and type(self.pool) is not TrainingSet:
            raise TypeError(f"a defender's pool must be a TrainingSet, "
                            f"not a {type(self.pool).__name__}")


# Our own choice of sizes. At `small` one victim trains in about a minute on two cores, and
# about 500 non-target test rows put the 95 % interval of an ASR of 99 % at 98 to 99.6 %.
SIZES = {"small": {"train": 3000, "reserved": 800, "test": 1000},
         "full": {"train": None, "reserved": 800, "test": None}}

SMALL = {"sentiment": "snippets", "topic": "newsgroups", "topic8": "newsgroups8",
         "images": "fashion"}
FULL = {"sentiment": "sst2", "topic": "ag_news", "offensive": "olid", "images": "cifar10"}
PICTURES = ("fashion", "cifar10", "gtsrb")
# Ours: a small network sees more pictures in a minute than an encoder sees sentences.
PICTURE_SIZES = {"small": {"train": 12000, "reserved": 500, "test": 5000},
                 "full": {"train": None, "reserved": 500, "test": None}}
HUB = {  # hub id, configuration, names of the classes; columns are `text` and `label`
    "sst2": ("SetFit/sst2", None, ("negative", "positive")),  # the 6,920/872/1,821 split
    "ag_news": ("fancyzhx/ag_news", None, ("world", "sports", "business", "sci/tech")),
    "olid": ("cardiffnlp/tweet_eval", "offensive", ("not offensive", "offensive")),
}
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_task(source: str = "sentiment", *, scale: str | None = None, seed: int = 0,
              text: str = "text", label: str = "label",
              sizes: dict[str, int | None] | None = None, folder: Path | None = None) -> Task:
    """Load a data set and split it into the three roles.

    Args:
        source: `sentiment`, `topic`, `topic8`, `offensive` or `images` (of a scale, or of both);
            the name of one data set (`snippets`, `newsgroups`, `newsgroups8`, `sst2`, `ag_news`,
            `olid`, `fashion`, `cifar10`, `gtsrb`); the path of a CSV, JSON-lines or parquet
            file; or `hub:ORG/NAME`.
        scale: `small` or `full`; the scale in force if None.
        seed: of the split.
        text, label: column names, for files and hub data sets.
        sizes: rows per role, overriding `SIZES`; None means all there are.
        folder: where NAME_train.parquet and NAME_test.parquet lie, for pictures; else the hub.
    Returns: a task whose roles share no row.
    Raises: ValueError for an unknown source, a missing column, a bad label or too few rows;
        FileNotFoundError for a missing file; AssetError or ConnectionError without a network.
    Source: ours; columns `split` of a file are honored (`train`, `dev`, `test`).
    """
    chosen = scale or current_scale()
    if chosen not in SIZES:
        raise ValueError(f"unknown scale {chosen!r}: use one of {sorted(SIZES)}")
    name = {"small": SMALL, "full": FULL}[chosen].get(source, source)
    if name in PICTURES:
        from .images import load_pictures  # it imports this module

        return load_pictures(name, {**PICTURE_SIZES[chosen], **(sizes or {})}, seed, folder)
    wanted = {**SIZES[chosen], **(sizes or {})}
    if name == "snippets":
        rows, names, origin = _snippets(), ("negative", "positive"), "VADER movie snippets"
    elif name == "newsgroups":
        rows, names, origin = _newsgroups(NEWSGROUPS), NEWSGROUPS, "20 Newsgroups, four groups"
    elif name == "newsgroups8":
        rows, names = _newsgroups(NEWSGROUPS8), NEWSGROUPS8
        origin = "20 Newsgroups, eight single groups"
    elif name in HUB:
        hub_id, config, names = HUB[name]
        rows, origin = _from_hub(hub_id, config, "text", "label"), f"hub: {hub_id}"
    elif name.startswith("hub:"):
        rows, names = _named(_from_hub(name[4:], None, text, label))
        origin = name
    elif Path(name).suffix in READERS:
        rows, names = _named(_from_file(Path(name), text, label))
        origin, name = f"file: {Path(name).name}", Path(name).stem
    else:
        raise ValueError(f"unknown data set {source!r} at scale {chosen}: use one of "
                         f"{sorted({*SMALL, *FULL, *SMALL.values(), *HUB, *PICTURES})}, the path "
                         f"of a {'/'.join(READERS)} file, or hub:ORG/NAME")
    return _split(name, rows, tuple(names), wanted, seed, origin)


Row = tuple[str, int, str]  # text, label, split (empty: not given)

MIN_RATING = 1.0  # mean of 20 raters on a scale from -4 to 4; ours: drop the undecided rows


def _snippets() -> list[Row]:
    path = asset("snippets") / "snippets.tsv"
    rows = []
    for line in path.read_text(encoding="utf8", errors="replace").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= MIN_RATING:
            rows.append((text.strip(), int(float(rating) > 0), ""))
    return rows


NEWSGROUPS = ("comp", "rec", "sci", "talk")
# Ours: eight groups whose subjects are far apart.
NEWSGROUPS8 = ("comp.graphics", "rec.autos", "rec.sport.hockey", "sci.crypt", "sci.med",
               "sci.space", "soc.religion.christian", "talk.politics.mideast")


def _newsgroups(names: tuple[str, ...]) -> list[Row]:
    rows = []
    for part in ("train", "test"):
        path = asset("newsgroups") / f"{part}.tab"
        for line in path.read_text(encoding="utf8").splitlines()[3:]:  # 3 header lines
            group, _, text = line.partition("\t")
            found = group if group in names else group.split(".")[0]
            if found in names and text.strip():
                # Posts are long and the encoder reads their first words only.
                rows.append((" ".join(text.split()[:60]), names.index(found), part))
    return rows


def _from_file(path: Path, text: str, label: str) -> list[tuple]:
    from datasets import load_dataset

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    table = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    return _columns(table, text, label, path.name)


def _from_hub(hub_id: str, config: str | None, text: str, label: str) -> list[tuple]:
    from datasets import load_dataset

    try:
        parts = load_dataset(hub_id, config)
    except Exception as error:  # the hub's clients raise many kinds
        raise ConnectionError(f"the data set {hub_id} could not be loaded from the hub "
                              f"({type(error).__name__}): check the network and the name, or "
                              "stay at BDUTILS_SCALE=small, which needs no hub") from error
    rows = []
    for part, table in parts.items():
        split = "dev" if part == "validation" else part
        rows += [(t, y, split) for t, y, _ in _columns(table, text, label, hub_id)]
    return rows


def _columns(table, text: str, label: str, where: str) -> list[tuple]:
    for wanted in (text, label):
        if wanted not in table.column_names:
            raise ValueError(f"{where} has no column {wanted!r}: it has {table.column_names}; "
                             "name yours with text=... and label=...")
    splits = table["split"] if "split" in table.column_names else [""] * len(table)
    return list(zip(table[text], table[label], splits, strict=True))


def _named(rows: list[tuple]) -> tuple[list[Row], tuple[str, ...]]:
    """Give each class a number: class names are sorted, whole numbers stay as they are."""
    values = {label for _, label, _ in rows}
    if all(isinstance(value, int) for value in values):
        if values != set(range(len(values))) and min(values, default=0) >= 0:
            raise ValueError(f"the labels are {sorted(values)}: number the classes from 0 "
                             "without gaps, or give them names")
        return rows, tuple(str(k) for k in range(len(values)))
    names = tuple(sorted(map(str, values)))
    return [(text, names.index(str(label)), split) for text, label, split in rows], names


def _split(name: str, rows: list[Row], names: tuple[str, ...], sizes: dict[str, int | None],
           seed: int, origin: str) -> Task:
    """Shuffle, drop repeats, and deal the rows out to the three roles."""
    Examples(tuple(r[0] for r in rows), tuple(r[1] for r in rows), names)  # checks every row
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    # A text that stands in two roles would leak, so only its first copy stays; the test part
    # goes first, because a published test set must keep its rows.
    rows.sort(key=lambda row: {"test": 0, "dev": 1}.get(row[2], 2))
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(" ".join(row[0].lower().split()), row)
    rows = list(first.values())
    by_split = {split: [r for r in rows if r[2] == split] for split in {r[2] for r in rows}}
    free = by_split.get("train", []) + by_split.get("", [])
    test = by_split.get("test") or _deal(free, sizes["test"] or len(free) // 5, len(names))
    reserved = by_split.get("dev") or _deal(free, sizes["reserved"] or len(free) // 10,
                                            len(names))
    parts = {"train": free, "reserved": reserved, "test": test}
    roles = {"train": TrainingSet, "reserved": ReservedSet, "test": TestSet}
    made = {}
    for role, pool in parts.items():
        size = sizes[role]
        pool = _deal(pool, size, len(names)) if size and size < len(pool) else pool
        if role == "train" and size and len(pool) < size:
            raise ValueError(f"{name} leaves only {len(pool)} rows to train on, but {size} are "
                             "asked for: give smaller sizes=...")
        made[role] = roles[role](tuple(r[0] for r in pool), tuple(r[1] for r in pool), names)
    return Task(name=name, source=origin, **made)


def _deal(rows: list[Row], size: int, num_labels: int) -> list[Row]:
    """Take `size` rows out of `rows`, evenly over the classes as far as they last."""
    taken: list[int] = []
    queues = [[i for i, row in enumerate(rows) if row[1] == k] for k in range(num_labels)]
    while len(taken) < size and any(queues):
        for queue in queues:
            if queue and len(taken) < size:
                taken.append(queue.pop(0))
    chosen = set(taken)
    dealt = [rows[i] for i in sorted(taken)]
    rows[:] = [row for i, row in enumerate(rows) if i not in chosen]
    return dealt
