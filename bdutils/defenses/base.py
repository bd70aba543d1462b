"""What all defenses share: what they are given, what they give back, how they are called.

A defense is a frozen dataclass of settings and a function that takes them and a `Case`::

    @repair.register
    def _(settings: MySettings, case: Case) -> Outcome:
        ...

From then on `repair(MySettings(), case)` works, and so does every table that is made with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Protocol

from ..models.image import PictureClassifier
from ..models.text import Classifier
from ..roles import DefenderView
from ..training import PictureSettings, TrainSettings, untrained


def check_range(settings: object, holds: bool) -> None:
    """Refuse settings that cannot be meant.

    Args:
        settings: Of a defense.
        holds: Whether each of its fields is in its range.

    Raises:
        ValueError: If one is not.
    """
    if not holds:
        raise ValueError(f"cannot go on with {settings}: a field is out of its range")


class Predictor(Protocol):
    """What can be measured: a model, or a model behind a guard."""

    def predict(self, texts) -> list[int]:
        """Return a class for each text or picture, `metrics.REFUSED` where it gives none."""


@dataclass(frozen=True)
class Case:
    """What a defender is given, whatever the defense, and nothing else."""

    classifier: Classifier | PictureClassifier
    """The suspected model."""
    view: DefenderView
    """Clean rows, and the pool if he has it."""
    training: TrainSettings | PictureSettings
    """How such a model is trained."""
    watch: Callable | None = None
    """An examiner's look at a model under repair, of which the defense learns nothing; None if
    nobody looks."""

    def fresh(self, training: TrainSettings | PictureSettings) -> Classifier | PictureClassifier:
        """Return an untrained model of the same kind."""
        return untrained(self.view.reserved, training)

    @property
    def looks(self) -> dict[str, Callable]:
        """Return the examiner's look as an argument, if there is one."""
        return {"watch": self.watch} if self.watch else {}


@dataclass(frozen=True)
class Outcome:
    """What a defense gives back."""

    model: Predictor
    """Repaired, guarded or as it was."""
    verdict: str = "purified"
    """The defense's own, in a word."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step."""
    found: object = None
    """The method's own report, if it has one."""


@singledispatch
def repair(settings: object, case: Case) -> Outcome:
    """Run the defense that these settings belong to.

    What the defense itself raises goes through.

    Args:
        settings: Of one of the methods, or of a registered one.
        case: What it may see.

    Returns:
        A model that can be measured; that of the case is not changed.

    Raises:
        TypeError: If the settings belong to no defense.
    """
    raise TypeError(f"no defense belongs to {type(settings).__name__}: write one, and put "
                    "`@repair.register` above it")
