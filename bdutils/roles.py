"""Data in three roles that the types keep apart: training, reserved, test.

An experiment on backdoors has three parties. The attacker poisons the *training set*, the
defender owns a small *reserved* clean set, and the examiner owns the *test set*. Each role has
its own type here, and `DefenderView` is all that a defense is ever given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .samples import LoadReport, check_texts, plain


class Pictures(Sequence):
    """Pictures with the manners of a tuple of texts, so that both take the same ways.

    Args:
        pixels: uint8 tensor (n, C, H, W) with one or three channels.

    Raises:
        ValueError: For another shape or type.
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
        """Return the given pictures, in that order."""
        return Pictures(self.pixels[torch.as_tensor(rows, dtype=torch.long)])


def evenly(rows: Sequence[int], labels: Sequence[int], size: int, classes: int) -> list[int]:
    """Take the first rows of each class, as many of one as of another while they last.

    Args:
        rows: Indices into `labels`.
        labels: Class numbers.
        size: How many.
        classes: K.

    Returns:
        The indices, in the order of `rows`.
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

    Lists, arrays and columns of a table are taken as well, and are kept as tuples; a label may be
    a truth value or a whole float, of NumPy or pandas too, and is kept as an int.

    Raises:
        ValueError: For no rows, lengths that differ, an empty text or one that holds half a
            character, a label out of range, or two classes of one name.
    """

    texts: tuple[str, ...] | Pictures
    """The n texts, or pictures."""
    labels: tuple[int, ...]
    """(n,) class numbers, 0 to K - 1."""
    label_names: tuple[str, ...]
    """The K names of the classes."""

    def __post_init__(self) -> None:
        """Check the rows once, where they enter."""
        if isinstance(self.texts, str) or isinstance(self.label_names, str):
            raise ValueError("texts and label_names are tuples of texts, not one text")
        if not self.are_pictures:
            object.__setattr__(self, "texts", tuple(self.texts))
        object.__setattr__(self, "labels", tuple(map(plain, self.labels)))
        object.__setattr__(self, "label_names", tuple(map(str, self.label_names)))
        if not len(self.texts):
            raise ValueError("no rows: check the file, the split and the filters")
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError(f"label_names {self.label_names} name two classes alike")
        if not self.are_pictures:
            check_texts(self.texts)
        known = range(self.num_labels)
        for row, label in enumerate(self.labels):
            if type(label) is not int or label not in known:
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

        Args:
            rows: Indices into this set.
        """
        texts = self.texts.take(rows) if self.are_pictures else tuple(self.texts[i] for i in rows)
        return replace(self, texts=texts, labels=tuple(self.labels[i] for i in rows))

    def few(self, count: int) -> Examples:
        """Return the first rows of each class, as many of one as of another while they last.

        Args:
            count: Rows in all, 1 to n.

        Raises:
            ValueError: For another count.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot take {count} of {len(self)} rows")
        return self.take(evenly(range(len(self)), self.labels, count, self.num_labels))

    def changed(self, rows: Sequence[int], texts: Sequence[str] | Pictures,
                label: int) -> Examples:
        """Return a copy in which some rows are others, all with one label.

        Args:
            rows: Indices into this set.
            texts: What stands there now, one a row.
            label: Theirs.
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
        """Return 16 hexadecimal digits that identify texts, labels and class names."""
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
    """One data set, split into the three roles."""

    name: str
    """Of the data set."""
    train: TrainingSet
    """What the victim trains on; the roles share no row."""
    reserved: ReservedSet
    """What the defender holds."""
    test: TestSet
    """What the examiner measures on."""
    source: str
    """Where it came from."""
    report: LoadReport | None = field(default=None, compare=False, repr=False)
    """What was read, kept and dropped; None for a task that was put together by hand."""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify all three roles."""
        parts = (self.train, self.reserved, self.test)
        return hashlib.sha256("".join(p.fingerprint() for p in parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DefenderView:
    """All data that a defense receives: reserved rows and, at most, the training pool.

    It refuses test data, and neither of its parts refers to the trigger, the target label or
    the rows that are poisoned, so a defense cannot use what a real defender would not know.

    Raises:
        TypeError: If a part has another role.
    """

    reserved: ReservedSet
    """Clean rows."""
    pool: TrainingSet | None = None
    """The training set, None if the defender has none."""

    def __post_init__(self) -> None:
        """Hold the roles apart."""
        if type(self.reserved) is not ReservedSet:
            raise TypeError(f"a defender's clean rows must be a ReservedSet, "
                            f"not a {type(self.reserved).__name__}")
        if self.pool is not None and type(self.pool) is not TrainingSet:
            raise TypeError(f"a defender's pool must be a TrainingSet, "
                            f"not a {type(self.pool).__name__}")
