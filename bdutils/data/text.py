"""Texts: files, registries and the hub, as rows that are split into the three roles."""

from __future__ import annotations

import random
from pathlib import Path

from ..assets import asset
from ..roles import Examples, ReservedSet, Task, TestSet, TrainingSet

HUB = {  # hub id, configuration, names of the classes; columns are `text` and `label`
    "sst2": ("SetFit/sst2", None, ("negative", "positive")),  # the 6,920/872/1,821 split
    "ag_news": ("fancyzhx/ag_news", None, ("world", "sports", "business", "sci/tech")),
    "olid": ("cardiffnlp/tweet_eval", "offensive", ("not offensive", "offensive")),
}
READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
Row = tuple[str, int, str]  # text, label, split (empty: not given)
MIN_RATING = 1.0  # mean of 20 raters on a scale from -4 to 4; ours: drop the undecided rows


def snippets() -> list[Row]:
    """Return the VADER movie snippets whose raters are decided."""
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


def newsgroups(names: tuple[str, ...]) -> list[Row]:
    """Return the posts of some newsgroups."""
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


def from_file(path: Path, text: str, label: str) -> list[tuple]:
    """Return the rows of a file."""
    from datasets import load_dataset

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    table = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    return _columns(table, text, label, path.name)


def from_hub(hub_id: str, config: str | None, text: str, label: str) -> list[tuple]:
    """Return the rows of a data set of the hub."""
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


def named(rows: list[tuple]) -> tuple[list[Row], tuple[str, ...]]:
    """Give each class a number: class names are sorted, whole numbers stay as they are."""
    values = {label for _, label, _ in rows}
    if all(isinstance(value, int) for value in values):
        if values != set(range(len(values))) and min(values, default=0) >= 0:
            raise ValueError(f"the labels are {sorted(values)}: number the classes from 0 "
                             "without gaps, or give them names")
        return rows, tuple(str(k) for k in range(len(values)))
    names = tuple(sorted(map(str, values)))
    return [(text, names.index(str(label)), split) for text, label, split in rows], names


def split(name: str, rows: list[Row], names: tuple[str, ...], sizes: dict[str, int | None],
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
