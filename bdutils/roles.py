"""Data in three roles that the types keep apart: training set, clean set, test set.

An experiment on backdoors has three parties. The attacker poisons the *training set*, the
defender owns a small *clean set*, and the evaluator owns the *test set*. Each role has its own
type here; `defenses.base.Context` is all that a defense is ever given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from .samples import LoadReport, check_texts, plain


class Images(Sequence):
    """Images that behave like a tuple of texts, so that both go the same way."""

    def __init__(self, pixels: Tensor) -> None:
        """Hold the pixels, uint8 (n, C, H, W) with one or three channels; nobody changes them."""
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 of shape (n, 1 or 3, H, W), not "
                             f"{pixels.dtype} of shape {tuple(pixels.shape)}")
        self.pixels = pixels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def __getitem__(self, i: Any) -> Any:
        """Return one image (C, H, W)."""
        return self.pixels[i]

    def take(self, indices: Sequence[int]) -> Images:
        """Return the given images, in that order."""
        return Images(self.pixels[torch.as_tensor(indices, dtype=torch.long)])


def stratified_subset(indices: Sequence[int], labels: Sequence[int | None], size: int,
                      classes: int) -> list[int]:
    """Take the first samples of each class, as many of one as of another while they last.

    Args:
        indices: Into `labels`.
        labels: Class numbers.
        size: How many, all if there are fewer.
        classes: K.

    Returns:
        The chosen ones, in the order of `indices`.
    """
    queues = [[i for i in indices if labels[i] == k] for k in range(classes)]
    size, share = min(size, sum(map(len, queues))), 0
    while sum(min(share, len(queue)) for queue in queues) < size:
        share += 1
    # Round by round, so that what is cut off at the end is cut off the last round.
    taken = [queue[n] for n in range(share) for queue in queues if n < len(queue)][:size]
    chosen = set(taken)
    return [i for i in indices if i in chosen]


@dataclass(frozen=True)
class Examples:
    """Labeled samples: `inputs[i]` has class `labels[i]`, named `label_names[labels[i]]`.

    A sample is a text or, where `inputs` is an `Images`, an image.

    Lists, arrays and columns of a table are taken as well, and are kept as tuples; a label may be
    a truth value or a whole float, of NumPy or pandas too, and is kept as an int.

    Raises:
        ValueError: For no samples, lengths that differ, an empty text or one that holds half a
            character, a label out of range, or two classes of one name.
    """

    inputs: tuple[str, ...] | Images
    """The n texts, or images."""
    labels: tuple[int, ...]
    """(n,) class numbers, 0 to K - 1."""
    label_names: tuple[str, ...]
    """The K names of the classes."""

    def __post_init__(self) -> None:
        """Check the samples once, where they enter."""
        if isinstance(self.inputs, str) or isinstance(self.label_names, str):
            raise ValueError("inputs and label_names are tuples of texts, not one text")
        if not self.are_images:
            object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "labels", tuple(map(plain, self.labels)))
        object.__setattr__(self, "label_names", tuple(map(str, self.label_names)))
        if not len(self.inputs):
            raise ValueError("no samples: check the file, the split and the filters")
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.labels)} labels")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError(f"label_names {self.label_names} name two classes alike")
        if not self.are_images:
            check_texts(self.inputs)
        known = range(self.num_labels)
        for i, label in enumerate(self.labels):
            if type(label) is not int or label not in known:
                raise ValueError(f"sample {i} has label {label!r}: labels must be whole numbers "
                                 f"from 0 to {self.num_labels - 1}")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    @property
    def num_labels(self) -> int:
        """Return K, the number of classes."""
        return len(self.label_names)

    @property
    def pixels(self) -> Tensor:
        """Return the pixels of images, uint8 (n, C, H, W)."""
        assert isinstance(self.inputs, Images)
        return self.inputs.pixels

    @property
    def are_images(self) -> bool:
        """Tell whether the samples are images."""
        return isinstance(self.inputs, Images)

    def take(self, indices: Sequence[int]) -> Self:
        """Return the given samples, in that order, in the same role.

        Args:
            indices: Into this set.
        """
        inputs = (self.inputs.take(indices) if isinstance(self.inputs, Images)
                  else tuple(self.inputs[i] for i in indices))
        return replace(self, inputs=inputs, labels=tuple(self.labels[i] for i in indices))

    def stratified(self, count: int) -> Self:
        """Return the first samples of each class, as many of one as of another while they last.

        Args:
            count: Samples in all, 1 to n.

        Raises:
            ValueError: For another count.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"cannot take {count} of {len(self)} samples")
        return self.take(stratified_subset(range(len(self)), self.labels, count, self.num_labels))

    def changed(self, indices: Sequence[int], inputs: Sequence[str] | Images,
                label: int) -> Self:
        """Return a copy in which some samples are others, all with one label.

        Args:
            indices: Into this set.
            inputs: What stands there now.
            label: Theirs.
        """
        new: tuple[str, ...] | Images
        if isinstance(self.inputs, Images) and isinstance(inputs, Images):
            pixels = self.inputs.pixels.clone()
            pixels[torch.as_tensor(indices, dtype=torch.long)] = inputs.pixels
            new = Images(pixels)
        else:
            at = dict(zip(indices, inputs, strict=True))
            new = tuple(at.get(i, text) for i, text in enumerate(self.inputs))
        hit = set(indices)
        labels = tuple(label if i in hit else y for i, y in enumerate(self.labels))
        return replace(self, inputs=new, labels=labels)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify inputs, labels and class names."""
        if isinstance(self.inputs, Images):
            pixels = self.inputs.pixels
            head = json.dumps([list(pixels.shape), self.labels, self.label_names])
            return _digest(head.encode() + pixels.numpy().tobytes())
        return _digest(json.dumps([self.inputs, self.labels, self.label_names]).encode())


class TrainSet(Examples):
    """What the victim trains on; an attacker may have poisoned it, and it does not say so."""


class CleanSet(Examples):
    """Clean samples that the defender alone holds."""


class TestSet(Examples):
    """Samples for measuring; only the evaluator may touch them."""

    __test__ = False  # not a pytest class


@dataclass(frozen=True)
class Task:
    """One data set, split into the three roles."""

    name: str
    """Of the data set."""
    train: TrainSet
    """What the victim trains on; the roles share no sample."""
    clean: CleanSet
    """What the defender holds."""
    test: TestSet
    """What the evaluator measures on."""
    source: str
    """Where it came from."""
    report: LoadReport | None = field(default=None, compare=False, repr=False)
    """What was read, kept and dropped; None for a task that was put together by hand."""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify all three roles."""
        parts = (self.train, self.clean, self.test)
        return _digest("".join(part.fingerprint() for part in parts).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
