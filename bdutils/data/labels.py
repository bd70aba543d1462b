"""What labels and names of splits mean, wherever samples come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..roles import Images
from ..samples import DataError, check_texts, in_words, plain

SPLITS = {"train": ("train", "training", "trn"),
          "dev": ("dev", "development", "val", "valid", "validation", "eval", "evaluation"),
          "test": ("test", "testing", "tst")}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NO_LABEL = ("nan", "none", "null", "na", "n/a", "<na>", "nat")  # lower case
Numbers = list[int | None]  # of classes; None where there is no label
Names = tuple[str, ...]


@dataclass(frozen=True)
class Raw:
    """Labeled samples as a source has them, in its order."""

    inputs: Sequence[Any] | Images
    """The n texts, or images."""
    labels: Sequence[object]
    """(n,) of any kind."""
    splits: Sequence[object] | None = None
    """(n,) names of splits, None if the source has none."""
    names: Names | None = None
    """Of the classes, if the source names them; labels are then numbers, or such names."""
    typed: bool = True
    """Whether labels have types; in a CSV file all are texts."""
    notes: tuple[str, ...] = ()
    """What the reader of the source has to say."""


def classes(labels: Sequence[object], names: Names | None = None, typed: bool = True,
            where: str = "labels") -> tuple[Numbers, Names]:
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
        DataError: With the sample of a label that is none.
    """
    values = [None if _is_missing(label) else plain(label) for label in labels]
    for i, value in enumerate(values):
        if type(value) not in (int, str, type(None)):
            raise _no_class(where, i, value, "round it or make it a name" if type(value) is float
                            else "give one whole number or name a sample")
    if not typed:
        values = _from_texts(values, where)
    bools = [i for i, label in enumerate(labels) if type(label).__name__ in ("bool", "bool_")]
    texts = [i for i, value in enumerate(values) if isinstance(value, str)]
    if bools and texts:
        raise DataError(f"{where}: sample {bools[0]} has the label {labels[bools[0]]!r}, and "
                        f"sample {texts[0]} {labels[texts[0]]!r}", "use one kind of label")
    if names is not None:
        return _of_known(values, names, where), names
    if not texts:
        return _from_numbers(values, where)
    names = tuple(sorted({str(value) for value in values if value is not None}, key=natural))
    check_texts(names, f"{where}, names of classes")
    number = {name: k for k, name in enumerate(names)}
    return [None if value is None else number[str(value)] for value in values], names


def natural(name: str) -> tuple:
    """Return a key by which names are sorted, and numbers in them as numbers."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def parts_of(splits: Sequence[object], where: str, own: Mapping[str, str] | None) -> list[str]:
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
    found = {name: own.get(name, meaning.get(name, "?")) for name in dict.fromkeys(said)}
    if "test" not in found.values() and any(
            split == "dev" and not name.startswith("eval") for name, split in found.items()):
        # Beside a validation split, this is what a model is evaluated on in the end.
        found |= {name: "test" for name in ("eval", "evaluation")
                  if name in found and name not in own}
    if unknown := [name for name, split in found.items() if split == "?"]:
        raise DataError(f"{where} has splits called {in_words(sorted(unknown))}",
                        "use train, dev and test, or say what each means with "
                        f"splits={{{unknown[0]!r}: 'train'}} (or 'dev', 'test', 'drop')", "splits")
    return [found[name] for name in said]


def _is_missing(label: object) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return bool(pd.api.types.is_scalar(label) and pd.isna(label))


def _no_class(where: str, i: int, label: object, remedy: str) -> DataError:
    return DataError(f"{where}: sample {i} has the label {label!r}, which is no class", remedy)


def _from_texts(cells: list[Any], where: str) -> list[Any]:
    """Return the labels of a file without types, as numbers if all are."""
    said = {cell.strip() for cell in cells if cell is not None}
    if said and {cell.lower() for cell in said} <= {"true", "false"}:
        return [None if cell is None else int(cell.strip().lower() == "true") for cell in cells]
    numeric = {cell for cell in said if cell.lower() not in NO_LABEL}
    padded = any(re.match(r"[+-]?0\d", cell) for cell in numeric)  # `01` is a name
    if not numeric or padded or not all(NUMBER.fullmatch(cell) for cell in numeric):
        return cells
    numbers = [plain(float(cell)) if cell is not None and cell.strip() in numeric else None
               for cell in cells]
    for i, number in enumerate(numbers):
        if isinstance(number, float):
            raise _no_class(where, i, cells[i], "round it or make it a name")
    return numbers


def _of_known(values: list[Any], names: Names, where: str) -> Numbers:
    number = {name: k for k, name in enumerate(names)}
    if len(number) < len(names):
        raise DataError(f"{where}: two classes are named alike in {names}", "rename one")
    found = [None if value == -1 else number.get(value, value) for value in values]
    for i, value in enumerate(found):
        if value is not None and value not in range(len(names)):
            raise DataError(f"{where}: sample {i} has label {value!r}", "labels must be whole "
                            f"numbers from 0 to {len(names) - 1}, or one of {in_words(names)}")
    return found


def _from_numbers(values: list[Any], where: str) -> tuple[Numbers, Names]:
    found = sorted({value for value in values if value is not None})
    there = [value for value in found if value != -1]
    if there != list(range(len(there))):
        raise DataError(f"{where}: the labels are [{in_words(found, 10)}]",
                        "number the classes from 0 without gaps, or give them names")
    return [None if value == -1 else value for value in values], tuple(map(str, there))
