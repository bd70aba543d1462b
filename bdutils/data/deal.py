"""How samples are dealt out to the three roles: by class, and none twice."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..roles import Pictures
from ..samples import DataError, in_words, plain

ROLES = ("train", "reserved", "test")


@dataclass(frozen=True)
class Dealt:
    """Which sample went where."""

    roles: dict[str, list[int]]
    """Role -> samples, in the role's order."""
    dropped: dict[str, list[int]]
    """Reason -> samples."""
    lacking: list[tuple[int, str]]
    """Class and role without a sample of it."""


def check_sizes(sizes: dict[str, int | None]) -> None:
    """Refuse sizes of roles that do not exist, and numbers that are none.

    Args:
        sizes: Samples a role, None for all there are.

    Raises:
        DataError: Naming the role.
    """
    if not isinstance(sizes, dict):
        raise DataError(f"sizes is a {type(sizes).__name__}", "write it as in sizes={'train': "
                        "1000, 'reserved': 200, 'test': 400}", "sizes")
    for role, size in sizes.items():
        if role not in ROLES:
            raise DataError(f"sizes names the role {role!r}", f"use {', '.join(ROLES)}", "sizes")
        whole = type(plain(size)) is int and not isinstance(size, bool)
        if size is not None and not (whole and size >= 1):
            raise DataError(f"sizes asks for {size!r} samples in the role {role!r}",
                            "use a whole number from 1, or None for all there are", "sizes")


def deal(texts: Sequence[str] | Pictures, labels: Sequence[int | None], splits: Sequence[str],
         rows: list[int], about: tuple[tuple[str, ...], dict[str, int | None], int, str]
         ) -> Dealt:
    """Shuffle, drop repeats, and deal samples out to the three roles.

    Args:
        texts, labels, splits: Of all samples; splits are `train`, `dev`, `test` or empty.
        rows: The samples to deal.
        about: Names of the classes, sizes of the roles, seed, and the task's name.

    Raises:
        DataError: If too few are left to train on, or none of a class.
    """
    names, sizes, seed, name = about
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    # A sample that stands in two roles would leak, so only its first copy stays; the test part
    # goes first, because a published test set must keep its samples.
    rows.sort(key=lambda i: {"test": 0, "dev": 1}.get(splits[i], 2))
    first, dropped = _first_copies(texts, labels, rows)
    pools = {split: [i for i in first if splits[i] == split]
             for split in ("train", "", "test", "dev")}
    free = pools["train"] + pools[""]
    test_size = sizes["test"] or len(free) // 5
    reserved_size = sizes["reserved"] or len(free) // 10
    wants = {"test": 0 if pools["test"] else test_size,
             "reserved": 0 if pools["dev"] else reserved_size, "train": sizes["train"]}
    most = _quotas(Counter(labels[i] for i in free), wants, len(names), len(free))
    test = pools["test"] or _take(free, labels, test_size, most["test"])
    reserved = pools["dev"] or _take(free, labels, reserved_size, most["reserved"])
    made, left = {}, []
    for role, pool in {"train": free, "reserved": reserved, "test": test}.items():
        size = sizes[role]
        chosen = pool
        if size and size < len(pool):
            chosen = _take(pool, labels, size, [len(pool)] * len(names))
            left += pool
        if role == "train" and size and len(chosen) < size:
            raise DataError(f"{name} leaves only {len(chosen)} rows to train on, but {size} are "
                            "asked for", "give smaller sizes=...", "sizes")
        if not chosen:
            raise DataError(f"{name} leaves no samples for the role {role!r}",
                            "bring more samples, or give smaller sizes=...", "sizes")
        made[role] = chosen
    lacking = _lacking(made, labels, names, name)
    return Dealt(made, {**dropped, "not asked for": left}, lacking)


def key_of(sample: object) -> object:
    """Return what two samples share if they are the same, whatever case and spaces.

    Args:
        sample: A text, or an image (C, H, W).
    """
    if isinstance(sample, str):
        return " ".join(sample.lower().split())
    return hashlib.blake2b(sample.numpy().tobytes(), digest_size=16).digest()


def _first_copies(texts: Sequence[str] | Pictures, labels: Sequence[int | None], rows: list[int]
                  ) -> tuple[list[int], dict[str, list[int]]]:
    first: dict[object, int] = {}
    dropped: dict[str, list[int]] = {"repeated": [], "repeated, with another label": []}
    for i in rows:
        kept = first.setdefault(key_of(texts[i]), i)
        if kept != i:
            same = labels[kept] == labels[i]
            dropped["repeated" if same else "repeated, with another label"].append(i)
    return list(first.values()), dropped


def _quotas(counts: Counter, wants: dict[str, int | None], classes: int, free: int
            ) -> dict[str, list[int]]:
    """Return how many samples of each class a role may take, so that the others get some.

    A class that has enough for an even share of each role has no limit. A rare one is dealt in
    proportion to the sizes of the roles; of one or two samples, the training set gets the first.
    """
    given = wants["test"] + wants["reserved"]
    train = max(free - given, 1) if wants["train"] is None else wants["train"]
    # Who wants all the rest for training shall keep half of each class at least.
    even = [wants["test"], wants["reserved"], given if wants["train"] is None else train]
    need = sum(-(-want // classes) for want in even)
    most = {"test": [0] * classes, "reserved": [0] * classes}
    for k in range(classes):
        count = counts[k]
        if count >= need:
            most["test"][k] = most["reserved"][k] = count
            continue
        left = count - 1
        for role, spare in (("test", 1 if wants["reserved"] else 0), ("reserved", 0)):
            if wants[role] and left > 0:
                share = max(1, count * wants[role] // (given + train))
                most[role][k] = min(share, max(left - spare, 1))
                left -= most[role][k]
    return most


def _take(rows: list[int], labels: Sequence[int | None], size: int, most: list[int]
          ) -> list[int]:
    """Take `size` out of `rows`, evenly over the classes as far as they last."""
    queues = [[i for i, row in enumerate(rows) if labels[row] == k][:limit]
              for k, limit in enumerate(most)]
    taken: list[int] = []
    turn = 0
    while len(taken) < size and any(turn < len(queue) for queue in queues):
        taken += [queue[turn] for queue in queues if turn < len(queue)][:size - len(taken)]
        turn += 1
    chosen = set(taken)
    dealt = [rows[i] for i in sorted(taken)]
    rows[:] = [row for i, row in enumerate(rows) if i not in chosen]
    return dealt


def _lacking(made: dict[str, list[int]], labels: Sequence[int | None], names: tuple[str, ...],
             name: str) -> list[tuple[int, str]]:
    there = {role: {labels[i] for i in rows} for role, rows in made.items()}
    untrained = sorted((there["reserved"] | there["test"]) - there["train"])
    if untrained:
        raise DataError(f"{name} leaves no sample to train on of the class"
                        f"{'es' if len(untrained) > 1 else ''} "
                        f"{in_words([repr(names[k]) for k in untrained])}",
                        "bring more samples of each, or give smaller sizes=... for the other "
                        "roles", "sizes")
    return [(k, role) for role, found in there.items() for k in range(len(names))
            if k not in found]
