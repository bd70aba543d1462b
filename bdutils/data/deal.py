"""How samples are dealt out to the three roles: by class, none twice, and each accounted for."""

from __future__ import annotations

import hashlib
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..roles import CleanSet, Images, Task, TestSet, TrainSet, stratified_subset
from ..samples import DataError, LoadReport, check_texts, in_words, plain
from .labels import NO_LABEL, SPLITS, Names, Numbers, Raw, classes, parts_of

ROLES = ("train", "clean", "test")
Sizes = Mapping[str, int | None]  # samples a role; None: all there are
Found = dict[str, list[int]]  # role, or reason to drop -> indices


@dataclass(frozen=True)
class Rules:
    """What a reader decides about samples that cannot be taken as they are."""

    unlabeled: str = "reject"
    """`reject` or `drop` samples whose label is missing or -1."""
    splits: Mapping[str, str] | None = None
    """A source's own name of a split -> `train`, `dev`, `test` or `drop`."""

    def __post_init__(self) -> None:
        """Reject what is neither."""
        if self.unlabeled not in ("reject", "drop"):
            raise ValueError(f"unlabeled={self.unlabeled!r}: use 'reject' or 'drop'")
        for name, meant in (self.splits or {}).items():
            if meant not in (*SPLITS, "drop"):
                raise ValueError(f"splits={{{name!r}: {meant!r}}}: use train, dev, test or drop")


@dataclass(frozen=True)
class Settled:
    """All samples of a source, with labels and splits that are known."""

    inputs: Sequence[Any] | Images
    """The n texts, or images."""
    labels: Numbers
    """(n,) classes, None where there is no label."""
    names: Names
    """Of the classes."""
    splits: list[str]
    """(n,) `train`, `dev`, `test`, `drop` or empty."""
    where: str
    """The source, for messages."""


def check_sizes(sizes: object) -> None:
    """Reject sizes of roles that do not exist, and numbers that are none."""
    if not isinstance(sizes, dict):
        raise DataError(f"sizes is a {type(sizes).__name__}", "write it as in sizes={'train': "
                        "1000, 'clean': 200, 'test': 400}", "sizes")
    for role, size in sizes.items():
        if role not in ROLES:
            raise DataError(f"sizes names the role {role!r}", f"use {', '.join(ROLES)}", "sizes")
        number = plain(size)
        whole = type(number) is int and number >= 1 and not isinstance(size, bool)
        if size is not None and not whole:
            raise DataError(f"sizes asks for {size!r} samples in the role {role!r}",
                            "use a whole number from 1, or None for all there are", "sizes")


def make(raw: Raw, name: str, sizes: Sizes, seed: int, origin: str, rules: Rules | None = None,
         loud: bool = True) -> Task:
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
    settled = _settled(raw, origin.partition(": ")[2] or origin, rules or Rules())
    roles, dropped = _deal(settled, sizes, seed, name)
    found = _doubts(settled, roles, dropped, raw.names is not None)
    for note in found if loud else ():
        warnings.warn(note, stacklevel=3)
    there = {split for split, y in zip(settled.splits, settled.labels) if y is not None}
    notes = [f"{role}: {len(chosen)} of the {sizes[role]} samples that were asked for"
             for role, chosen in roles.items() if len(chosen) < (sizes[role] or 0)]
    notes += [f"{role}: dealt from the rest, since there is no split {split!r}"
              for split, role in (("test", "test"), ("dev", "clean"))
              if "train" in there and split not in there]
    return _task(name, origin, settled, roles, dropped, (*found, *raw.notes, *notes))


def make_published(settled: Settled, name: str, sizes: Sizes, seed: int, origin: str) -> Task:
    """Make a task of a published set, whose test part goes to the test role alone.

    Args:
        settled: All images, in the splits `train` and `test`.
        name, sizes, seed, origin: As for `make`.

    Raises:
        DataError: For too few images.
    """
    digests = [sample_key(image) for image in settled.inputs]
    rng = random.Random(seed)
    used: set[bytes] = set()
    roles: Found = {}
    # The test part goes first, since a published test set must keep its images.
    for role, split in (("test", "test"), ("clean", "train"), ("train", "train")):
        there = [i for i, part in enumerate(settled.splits) if part == split]
        first: dict[bytes, int] = {}
        for i in rng.sample(there, len(there)):
            if digests[i] not in used:
                first.setdefault(digests[i], i)
        chosen, size = list(first.values()), sizes[role]
        if size and len(chosen) < size:
            raise DataError(f"{name} leaves only {len(chosen)} images for the role {role!r}, but "
                            f"{size} are asked for", "give smaller sizes=...", "sizes")
        if size:
            chosen = stratified_subset(chosen, settled.labels, size, len(settled.names))
        used.update(digests[i] for i in chosen)
        roles[role] = chosen
    left = set(range(len(digests))).difference(*roles.values())
    dropped = {"repeated": [i for i in left if digests[i] in used],
               "not asked for": [i for i in left if digests[i] not in used]}
    return _task(name, origin, settled, roles, dropped)


def sample_key(sample: str | Tensor) -> bytes:
    """Return what two samples share if they are the same, a text's case and spaces aside."""
    if isinstance(sample, str):
        return " ".join(sample.lower().split()).encode()
    return hashlib.blake2b(sample.numpy().tobytes(), digest_size=16).digest()


def _settled(raw: Raw, where: str, rules: Rules) -> Settled:
    count = len(raw.inputs)
    if not count == len(raw.labels) == len(raw.splits or raw.labels):
        raise DataError(f"{where} has {count} samples, {len(raw.labels)} labels and "
                        f"{len(raw.splits or ())} splits", "give one of each a sample")
    if not count:
        raise DataError(f"{where} holds no samples", "check the file, the split and the filters")
    labels, names = classes(raw.labels, raw.names, raw.typed, where)
    splits = parts_of(raw.splits or [""] * count, where, rules.splits)
    empty = [i for i, split in enumerate(splits) if split != "drop" and labels[i] is None]
    if empty and rules.unlabeled == "reject":
        raise DataError(f"{where}: {len(empty)} of {count} samples are unlabeled (empty or -1); "
                        f"the first: sample {empty[0]} has label "
                        f"{str(raw.labels[empty[0]]).strip() or 'nothing'}",
                        "label them, or leave them out with unlabeled=\"drop\"", "unlabeled")
    if len(names) < 2:
        raise DataError(f"{where} has one class only ({in_words(names)})"
                        if names else f"{where} has no labels", "a task needs two or more")
    kept = count - splits.count("drop") - len(empty)
    if len(names) > max(20, kept // 2):
        raise DataError(f"{where} has {len(names)} classes in {kept} samples "
                        f"({in_words(names, 3)})", "name the column of the labels with label=...",
                        "label")
    if not isinstance(raw.inputs, Images):
        check_texts(raw.inputs, where)
    return Settled(raw.inputs, labels, names, splits, where)


def _deal(settled: Settled, sizes: Sizes, seed: int, name: str) -> tuple[Found, Found]:
    """Shuffle, drop repeats, and deal; return indices by role, and by reason to drop them."""
    labels, splits = settled.labels, settled.splits
    order = [i for i, y in enumerate(labels) if y is not None and splits[i] != "drop"]
    random.Random(seed).shuffle(order)
    # A sample that stands in two roles would leak, so only its first copy stays; the test part
    # goes first, because a published test set must keep its samples.
    order.sort(key=lambda i: {"test": 0, "dev": 1}.get(splits[i], 2))
    first, dropped = _first_copies(settled, order)
    given = {split: [i for i in first if splits[i] == split]
             for split in ("train", "", "test", "dev")}
    free = given["train"] + given[""]
    wants = {"test": 0 if given["test"] else sizes["test"] or len(free) // 5,
             "clean": 0 if given["dev"] else sizes["clean"] or len(free) // 10}
    most = _quotas(Counter(labels[i] for i in free), wants, sizes["train"], len(settled.names),
                   len(free))
    test = given["test"] or _take(free, labels, wants["test"], most["test"])
    clean = given["dev"] or _take(free, labels, wants["clean"], most["clean"])
    roles: Found = {}
    left: list[int] = []
    for role, there in {"train": free, "clean": clean, "test": test}.items():
        size, chosen = sizes[role], there
        if size and size < len(there):
            chosen = _take(there, labels, size, [len(there)] * len(settled.names))
            left += there
        if role == "train" and size and len(chosen) < size:
            raise DataError(f"{name} leaves only {len(chosen)} samples to train on, but {size} "
                            "are asked for", "give smaller sizes=...", "sizes")
        if not chosen:
            raise DataError(f"{name} leaves no samples for the role {role!r}",
                            "bring more samples, or give smaller sizes=...", "sizes")
        roles[role] = chosen
    trained, others = ({labels[i] for role in part for i in roles[role]}
                       for part in (("train",), ("clean", "test")))
    if lacking := [repr(x) for k, x in enumerate(settled.names) if k in others - trained]:
        raise DataError(f"{name} leaves no sample to train on of the class"
                        f"{'es' if len(lacking) > 1 else ''} {in_words(lacking)}",
                        "bring more samples of each, or give smaller sizes=... for the other "
                        "roles", "sizes")
    return roles, {**dropped, "not asked for": left}


def _first_copies(settled: Settled, order: list[int]) -> tuple[list[int], Found]:
    first: dict[object, int] = {}
    dropped: Found = {"repeated": [], "repeated, with another label": []}
    for i in order:
        kept = first.setdefault(sample_key(settled.inputs[i]), i)
        if kept != i:
            same = settled.labels[kept] == settled.labels[i]
            dropped["repeated" if same else "repeated, with another label"].append(i)
    return list(first.values()), dropped


def _quotas(counts: Counter, wants: dict[str, int], size: int | None, classes: int, free: int
            ) -> Found:
    """Return how many samples of each class a role may take, so that the others get some.

    A class that has enough for an even share of each role has no limit. A rare one is dealt in
    proportion to the sizes of the roles; of one or two samples, the training set gets the first.
    """
    given = wants["test"] + wants["clean"]
    train = max(free - given, 1) if size is None else size
    # Who wants all the rest for training shall keep half of each class at least.
    even = [wants["test"], wants["clean"], given if size is None else train]
    need = sum(-(-want // classes) for want in even)
    most = {"test": [0] * classes, "clean": [0] * classes}
    for k in range(classes):
        count = counts[k]
        if count >= need:
            most["test"][k] = most["clean"][k] = count
            continue
        left = count - 1
        for role, spare in (("test", 1 if wants["clean"] else 0), ("clean", 0)):
            if wants[role] and left > 0:
                share = max(1, count * wants[role] // (given + train))
                most[role][k] = min(share, max(left - spare, 1))
                left -= most[role][k]
    return most


def _take(indices: list[int], labels: Numbers, size: int, most: list[int]) -> list[int]:
    """Take `size` out of `indices`, evenly over the classes as far as they last."""
    queues = [[i for i in indices if labels[i] == k][:limit] for k, limit in enumerate(most)]
    turns = (queue[turn] for turn in range(max(map(len, queues))) for queue in queues
             if turn < len(queue))
    taken = set(itertools.islice(turns, size))
    chosen = [i for i in indices if i in taken]
    indices[:] = [i for i in indices if i not in taken]
    return chosen


def _doubts(settled: Settled, roles: Found, dropped: Found, named: bool) -> list[str]:
    """Say what looks wrong but may be meant, one sentence each."""
    alike: dict[str, list[str]] = {}
    for name in settled.names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    found = [f"the class names {', '.join(map(repr, group))} differ in case or spaces only: make "
             "them one if they are" for group in alike.values() if len(group) > 1]
    found += [f"there is a class named {name!r}: is that a label, or the lack of one?"
              for name in settled.names if name.strip().lower() in NO_LABEL and not named]
    if twice := dropped["repeated, with another label"]:
        found.append(f"{len(twice)} samples repeat another one with another label, as samples "
                     f"{in_words(sorted(twice))} do; one of each was kept")
    for role, chosen in roles.items():
        there = {settled.labels[i] for i in chosen}
        if lacking := [repr(x) for k, x in enumerate(settled.names) if k not in there]:
            found.append(f"the role {role!r} has no sample of the class {in_words(lacking)}")
    return [f"{settled.where}: {doubt}" for doubt in found]


def _task(name: str, origin: str, settled: Settled, roles: Found, dropped: Found,
          notes: tuple[str, ...] = ()) -> Task:
    """Put the roles together, and count all samples by class."""
    labels, names = settled.labels, settled.names

    def by_class(indices: Sequence[int]) -> dict[str | None, int]:
        found = Counter(labels[i] for i in indices)
        lacking = {None: found[None]} if found[None] else {}
        return {name: found[k] for k, name in enumerate(names)} | lacking

    read: Found = {}
    for i, split in enumerate(settled.splits):
        read.setdefault("left out" if split == "drop" else split, []).append(i)
    reasons = {"unlabeled": [i for split, there in read.items() if split != "left out"
                             for i in there if labels[i] is None],
               "split left out": read.get("left out", []), **dropped}
    report = LoadReport({split: by_class(there) for split, there in read.items()},
                        {role: by_class(chosen) for role, chosen in roles.items()},
                        {reason: by_class(there) for reason, there in reasons.items() if there},
                        notes)
    train, clean, test = (_taken(settled, roles[role]) for role in ROLES)
    return Task(name, TrainSet(*train), CleanSet(*clean), TestSet(*test), origin, report)


def _taken(settled: Settled, indices: list[int]) -> tuple[Any, Any, Names]:
    inputs = settled.inputs
    chosen = (inputs.take(indices) if isinstance(inputs, Images)
              else tuple(str(inputs[i]) for i in indices))
    return chosen, [settled.labels[i] for i in indices], settled.names
