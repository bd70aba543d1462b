"""What all defenses share: what they are given, what they give back, how they are called.

A defense is a frozen dataclass of settings and a function that takes them and a `Case`:

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


class Predictor(Protocol):
    """What can be measured: a model, or a model behind a guard."""

    def predict(self, texts) -> list[int]:
        """Return a class for each text or picture, `metrics.REFUSED` where it gives none."""


@dataclass(frozen=True)
class Case:
    """What a defender is given, whatever the defense, and nothing else.

    Fields: classifier: the suspected model; view: clean rows, and the pool if he has it; training:
    how such a model is trained; watch: an examiner's look at a model under repair, of which the
    defense learns nothing; None if nobody looks.
    """

    classifier: Classifier | PictureClassifier
    view: DefenderView
    training: TrainSettings | PictureSettings
    watch: Callable | None = None

    def fresh(self, training: TrainSettings | PictureSettings) -> Classifier | PictureClassifier:
        """Return an untrained model of the same kind.

        Source: ours.
        """
        return untrained(self.view.reserved, training)

    @property
    def looks(self) -> dict[str, Callable]:
        """Return the examiner's look as an argument, if there is one."""
        return {"watch": self.watch} if self.watch else {}


@dataclass(frozen=True)
class Outcome:
    """What a defense gives back.

    Fields: model: repaired, guarded or as it was; verdict: the defense's own, in a word; seconds:
    by step; found: the method's own report, if it has one.
    """

    model: Predictor
    verdict: str = "purified"
    seconds: dict[str, float] = field(default_factory=dict)
    found: object = None


@singledispatch
def repair(settings: object, case: Case) -> Outcome:
    """Run the defense that these settings belong to.

    Args: settings: of one of the methods, or of a registered one; case: what it may see.
    Returns: a model that can be measured; that of the case is not changed.
    Raises: TypeError if the settings belong to no defense; what the defense raises.
    Source: ours.
    """
    raise TypeError(f"no defense belongs to {type(settings).__name__}: write one, and put "
                    "`@repair.register` above it")
