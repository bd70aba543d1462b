"""What holds for samples from anywhere: plain labels, sound texts, and an account of all."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


class DataError(ValueError):
    """Data that cannot be taken as they are; the message ends with the remedy."""

    def __init__(self, reason: str, remedy: str, option: str = "") -> None:
        """Keep what is wrong and what to do in Python, since a command has another remedy.

        `option` is the name of the argument that the remedy is about, if it is about one.
        """
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy, self.option = reason, remedy, option


def in_words(things: Sequence[object], most: int = 5) -> str:
    """Return the first things of a list, and how many more there are."""
    shown = ", ".join(map(str, things[:most]))
    return shown + (f" and {len(things) - most} more" if len(things) > most else "")


def plain(label: Any) -> Any:
    """Return a label as Python has it: whole numbers of any kind as int, all else as it is."""
    if type(label) is int:
        return label
    if hasattr(label, "item") and getattr(label, "ndim", 1) == 0:  # of NumPy or PyTorch
        label = label.item()
    whole = isinstance(label, numbers.Real) and label == label // 1
    return int(label) if whole else label


def check_texts(texts: Sequence[object], where: str = "") -> None:
    """Reject what is no text, is empty, or cannot be written because half a character is in it.

    Args:
        texts: Of all samples.
        where: Where they came from, for the message.

    Raises:
        ValueError: With the sample, counted from 0.
    """
    where = f"{where}: " if where else ""
    for i, text in enumerate(texts):
        if not isinstance(text, str | float | None) and text is not pd.NA:
            raise ValueError(f"{where}sample {i} has no text but a {type(text).__name__}: "
                             "join or convert it first")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}sample {i} has no text: drop it or fill it in")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{where}sample {i} holds half a character (a lone surrogate), as in "
                             "a text that was cut inside an emoji: repair or drop it")


Counts = Mapping[str | None, int]  # class -> samples; None: of no class


@dataclass(frozen=True)
class LoadReport:
    """What was read, kept and dropped when a task was made; every sample is in one place."""

    read: Mapping[str, Counts]
    """Split, empty where none was given -> class -> samples."""
    kept: Mapping[str, Counts]
    """Role -> class -> samples."""
    dropped: Mapping[str, Counts]
    """Reason -> class -> samples."""
    notes: tuple[str, ...] = ()
    """What else a reader should know, one sentence each."""

    @staticmethod
    def total(counts: Mapping[str, Counts]) -> int:
        """Return how many samples one of the tables holds."""
        return sum(sum(count.values()) for count in counts.values())

    def __str__(self) -> str:
        """Return totals, a table by class, and the notes."""
        columns = {f"read {split}".strip(): row for split, row in self.read.items()}
        columns |= dict(self.kept)
        columns |= {f"dropped: {reason}": row for reason, row in self.dropped.items()}
        classes = dict.fromkeys(name for row in columns.values() for name in row)
        table = pd.DataFrame({title: [row.get(name, 0) for name in classes]
                              for title, row in columns.items()},
                             index=["(no label)" if name is None else name for name in classes])
        head = (f"{self.total(self.read)} samples read, {self.total(self.kept)} kept, "
                f"{self.total(self.dropped)} dropped")
        return "\n".join([head, table.to_string(), *self.notes])
