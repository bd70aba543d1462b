"""One step for samples from anywhere: it settles labels and splits, deals, and keeps account."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from ..roles import Pictures, ReservedSet, Task, TestSet, TrainingSet
from ..samples import DataError, check_texts, in_words, plain
from .account import NO_LABEL, account, doubts, remarks
from .deal import deal

SPLITS = {"train": ("train", "training", "trn"),
          "dev": ("dev", "development", "val", "valid", "validation", "eval", "evaluation"),
          "test": ("test", "testing", "tst")}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MISSING = None


@dataclass(frozen=True)
class Raw:
    """Labeled samples as a source has them, in its order."""

    texts: Sequence[str] | Pictures
    """The n texts, or images."""
    labels: Sequence[object]
    """(n,) of any kind."""
    splits: Sequence[object] | None = None
    """(n,) names of splits, None if the source has none."""
    names: tuple[str, ...] | None = None
    """Of the classes, if the source names them; labels are then numbers, or such names."""
    typed: bool = True
    """Whether labels have types; in a CSV file all are texts."""
    notes: tuple[str, ...] = ()
    """What the reader of the source has to say."""


@dataclass(frozen=True)
class Rules:
    """What a reader decides about samples that cannot be taken as they are."""

    unlabeled: str = "refuse"
    """`refuse` or `drop` samples whose label is missing or -1."""
    splits: Mapping[str, str] | None = None
    """A source's own name of a split -> `train`, `dev`, `test` or `drop`."""

    def __post_init__(self) -> None:
        """Refuse what is neither."""
        if self.unlabeled not in ("refuse", "drop"):
            raise ValueError(f"unlabeled={self.unlabeled!r}: use 'refuse' or 'drop'")
        for name, meant in (self.splits or {}).items():
            if meant not in (*SPLITS, "drop"):
                raise ValueError(f"splits={{{name!r}: {meant!r}}}: use train, dev, test or drop")


def classes(labels: Sequence[object], names: tuple[str, ...] | None = None, typed: bool = True,
            where: str = "labels") -> tuple[list[int | None], tuple[str, ...]]:
    """Give each class a number.

    Whole numbers and truth values are numbers of classes. Names are sorted, and numbers in them as
    numbers.

    Args:
        labels: Of any kind; None, NaN, an empty text and -1 say that there is none.
        names: Of the classes, if they are known.
        typed: False if each label is a text, as in a CSV file.
        where: The source, for messages.

    Returns:
        (n,) numbers, None where a label is missing; and the K names.

    Raises:
        DataError: With the row of a label that is none.
    """
    values = [MISSING if _is_missing(x) else plain(x) for x in labels]
    kinds = {type(value) for value in values} - {type(MISSING)}
    if bad := kinds - {int, str}:
        row = next(i for i, value in enumerate(values) if type(value) in bad)
        remedy = ("give one whole number or name a sample"
                  if type(values[row]) is not float else "round it or make it a name")
        raise DataError(f"{where}: row {row} has the label {values[row]!r}, which is no class",
                        remedy)
    if not typed:
        values = _from_texts(values, where)
    _refuse_mixed(labels, values, where)
    if names is not None:
        return _of_known(values, tuple(map(str, names)), where), tuple(map(str, names))
    if all(isinstance(value, int | None) for value in values):
        return _numbers(values, where)
    found = sorted({str(value) for value in values if value is not MISSING}, key=natural)
    check_texts(found, f"{where}, names of classes")
    number = {name: k for k, name in enumerate(found)}
    return [MISSING if v is MISSING else number[str(v)] for v in values], tuple(found)


def _is_missing(label: object) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return bool(pd.api.types.is_scalar(label) and pd.isna(label))


def natural(name: str) -> tuple:
    """Return a key by which names are sorted, and numbers in them as numbers."""
    parts = re.split(r"(\d+)", name)
    return [int(x) if i % 2 else x for i, x in enumerate(parts)], name


def _from_texts(cells: list[str | None], where: str) -> list[int | str | None]:
    """Return the labels of a file without types, as numbers if all are."""
    said = {cell.strip() for cell in cells if cell is not MISSING}
    lower = {cell.lower() for cell in said}
    if lower and lower <= {"true", "false"}:
        return [MISSING if cell is MISSING else int(cell.strip().lower() == "true")
                for cell in cells]
    numeric = {cell for cell in said if cell.lower() not in NO_LABEL}
    padded = any(re.match(r"[+-]?0\d", cell) for cell in numeric)  # `01` is a name
    if not numeric or padded or not all(NUMBER.fullmatch(cell) for cell in numeric):
        return cells
    numbers = [float(cell) if cell is not MISSING and cell.strip() in numeric else MISSING
               for cell in cells]
    whole = [plain(x) for x in numbers]
    for row, value in enumerate(whole):
        if isinstance(value, float):
            raise DataError(f"{where}: row {row} has the label {cells[row]!r}, which is no class",
                            "round it or make it a name")
    return whole


def _refuse_mixed(labels: Sequence[object], values: list, where: str) -> None:
    bools = [i for i, x in enumerate(labels) if type(x).__name__ in ("bool", "bool_")]
    texts = [i for i, value in enumerate(values) if isinstance(value, str)]
    if bools and texts:
        raise DataError(f"{where}: row {bools[0]} has the label {labels[bools[0]]!r}, and row "
                        f"{texts[0]} {labels[texts[0]]!r}", "use one kind of label")


def _of_known(values: list, names: tuple[str, ...], where: str) -> list[int | None]:
    number = {name: k for k, name in enumerate(names)}
    if len(number) < len(names):
        raise DataError(f"{where}: two classes are named alike in {names}", "rename one")
    found = [MISSING if v == -1 else number.get(v, v) for v in values]
    for row, value in enumerate(found):
        if value is not MISSING and value not in range(len(names)):
            raise DataError(f"{where}: row {row} has label {value!r}", "labels must be whole "
                            f"numbers from 0 to {len(names) - 1}, or one of {in_words(names)}")
    return found


def _numbers(values: list[int | None], where: str) -> tuple[list[int | None], tuple[str, ...]]:
    found = sorted({value for value in values if value is not MISSING})
    without = [value for value in found if value != -1]
    if without != list(range(len(without))):
        raise DataError(f"{where}: the labels are [{in_words(found, 10)}]",
                        "number the classes from 0 without gaps, or give them names")
    return ([MISSING if value == -1 else value for value in values],
            tuple(map(str, without)))


def roles(splits: Sequence[object], where: str, own: Mapping[str, str] | None = None
          ) -> list[str]:
    """Return `train`, `dev`, `test`, `drop` or an empty text for each name of a split.

    Args:
        splits: (n,) names as they stand in the source.
        where: The source, for messages.
        own: What a reader says that a name means.

    Raises:
        DataError: For names that nobody knows, with their list.
    """
    meaning = {word: split for split, words in SPLITS.items() for word in words} | {"": ""}
    own = {str(name).strip().lower(): split for name, split in (own or {}).items()}
    said = ["" if _is_missing(name) else str(name).strip().lower() for name in splits]
    found = {name: own.get(name, meaning.get(name)) for name in dict.fromkeys(said)}
    if {"eval", "evaluation"} & (set(found) - set(own)) and "test" not in found.values():
        # Beside a validation split, this is what a model is evaluated on in the end.
        if any(found[name] == "dev" and not name.startswith("eval") for name in found):
            found |= {name: "test" for name in ("eval", "evaluation") if name in found}
    if unknown := [name for name, split in found.items() if split is None]:
        raise DataError(f"{where} has splits called {in_words(sorted(unknown))}",
                        "use train, dev and test, or say what each means with "
                        f"splits={{{unknown[0]!r}: 'train'}} (or 'dev', 'test', 'drop')", "splits")
    return [found[name] for name in said]


def make(raw: Raw, name: str, sizes: dict[str, int | None], seed: int, origin: str,
         rules: Rules = Rules(), loud: bool = True) -> Task:  # noqa: B008
    """Make a task of samples from anywhere: settle, drop repeats, deal, and keep account.

    Args:
        raw: The samples.
        name: Of the task.
        sizes: Samples a role, None for all there are.
        seed: Of the shuffling.
        origin: Where they came from.
        rules: For samples that cannot be taken as they are.
        loud: Whether to warn of what looks wrong; it is in the report in any case.

    Returns:
        A task whose roles share no sample.

    Raises:
        DataError: For samples that cannot be taken, and for too few.
    """
    where, count = origin.partition(": ")[2] or origin, len(raw.texts)
    if not len(raw.texts) == len(raw.labels) == len(raw.splits or raw.labels):
        raise DataError(f"{where} has {count} samples, {len(raw.labels)} labels and "
                        f"{len(raw.splits or ())} splits", "give one of each a sample")
    if not count:
        raise DataError(f"{where} holds no samples", "check the file, the split and the filters")
    labels, names = classes(raw.labels, raw.names, raw.typed, where)
    splits = roles(raw.splits or [""] * count, where, rules.splits)
    ours = [i for i, split in enumerate(splits) if split != "drop"]
    empty = [i for i in ours if labels[i] is MISSING]
    if empty and rules.unlabeled == "refuse":
        raise DataError(f"{where}: {len(empty)} of {count} samples are unlabeled (empty or -1); "
                        f"the first: row {empty[0]} has label "
                        f"{str(raw.labels[empty[0]]).strip() or 'nothing'}",
                        "label them, or leave them out with unlabeled=\"drop\"", "unlabeled")
    if len(names) < 2:
        raise DataError(f"{where} has one class only ({in_words(names)})"
                        if names else f"{where} has no labels", "a task needs two or more")
    kept = [i for i in ours if labels[i] is not MISSING]
    if len(names) > max(20, len(kept) // 2):
        raise DataError(f"{where} has {len(names)} classes in {len(kept)} samples "
                        f"({in_words(names, 3)})", "name the column of the labels with label=...",
                        "label")
    if not isinstance(raw.texts, Pictures):
        check_texts(raw.texts, where)
    dealt = deal(raw.texts, labels, splits, kept, (names, sizes, seed, name))
    report = account((labels, splits, names), dealt)
    found = doubts(names, dealt, where, raw.names is not None)
    made = {role: _role(role, raw.texts, labels, names, rows)
            for role, rows in dealt.roles.items()}
    if loud:
        for note in found:
            warnings.warn(note, stacklevel=3)
    notes = (*found, *raw.notes, *remarks(dealt, {splits[i] for i in kept}, sizes))
    return Task(name=name, source=origin, **made, report=replace(report, notes=notes))


def _role(role: str, texts: Sequence[str] | Pictures, labels: list, names: tuple[str, ...],
          rows: list[int]) -> TrainingSet | ReservedSet | TestSet:
    kind = {"train": TrainingSet, "reserved": ReservedSet, "test": TestSet}[role]
    chosen = (texts.take(rows) if isinstance(texts, Pictures)
              else tuple(str(texts[i]) for i in rows))
    return kind(chosen, tuple(labels[i] for i in rows), names)
