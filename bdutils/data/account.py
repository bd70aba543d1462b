"""The account of a load: where every sample is, and what a reader should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..samples import LoadReport, in_words
from .deal import ROLES, Dealt

NO_LABEL = ("nan", "none", "null", "na", "n/a", "<na>", "nat")  # lower case


def account(settled: tuple, dealt: Dealt) -> LoadReport:
    """Count all samples by class.

    Args:
        settled: Labels and splits of all samples, and names of the classes.
        dealt: Which sample went where.
    """
    labels, splits, names = settled

    def by_class(rows: Sequence[int]) -> Counter:
        found = Counter(None if labels[i] is None else names[labels[i]] for i in rows)
        return {name: found[name] for name in (*names, None) if found[name] or name is not None}

    read: dict[str, list[int]] = {}
    for i, split in enumerate(splits):
        read.setdefault("left out" if split == "drop" else split, []).append(i)
    dropped = {"unlabeled": [i for i, y in enumerate(labels) if y is None and splits[i] != "drop"],
               "split left out": [i for i, x in enumerate(splits) if x == "drop"],
               **dealt.dropped}
    return LoadReport({split: by_class(rows) for split, rows in read.items()},
                      {role: by_class(dealt.roles[role]) for role in ROLES},
                      {reason: by_class(rows) for reason, rows in dropped.items() if rows})


def doubts(names: tuple[str, ...], dealt: Dealt, where: str, named: bool) -> list[str]:
    """Say what looks wrong but may be meant, one sentence each.

    Args:
        names: Of the classes.
        dealt: Which sample went where.
        where: The source.
        named: Whether the source itself names the classes.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    found = [f"{where}: the class names {', '.join(map(repr, group))} differ in case or spaces "
             "only: make them one if they are" for group in alike.values() if len(group) > 1]
    found += [f"{where}: there is a class named {name!r}: is that a label, or the lack of one?"
              for name in names if name.strip().lower() in NO_LABEL and not named]
    if rows := dealt.dropped.get("repeated, with another label"):
        found.append(f"{where}: {len(rows)} samples repeat another one with another label, as "
                     f"rows {in_words(sorted(rows))} do; one of each was kept")
    for role in ROLES:
        if lacking := [repr(names[k]) for k, other in dealt.lacking if other == role]:
            found.append(f"{where}: the role {role!r} has no sample of the class "
                         f"{in_words(lacking)}")
    return found


def remarks(dealt: Dealt, splits: set[str], sizes: dict[str, int | None]) -> list[str]:
    """Say where the roles differ from what was asked for, one sentence each.

    Args:
        dealt: Which sample went where.
        splits: That the source has.
        sizes: Samples a role that were asked for.
    """
    found = [f"{role}: {len(rows)} of the {sizes[role]} samples that were asked for"
             for role, rows in dealt.roles.items() if sizes[role] and len(rows) < sizes[role]]
    return found + [f"{role}: dealt from the rest, since there is no split {split!r}"
                    for split, role in (("test", "test"), ("dev", "reserved"))
                    if "train" in splits and split not in splits]
