"""What all defenses share: what they are given, what they give back, how they are called.

A defense is a frozen dataclass of settings and a function that takes them and a `Case`::

    @repair.register
    def _(settings: MySettings, case: Case) -> Outcome:
        ...

From then on `repair(MySettings(), case)` works, and so does every table that is made with it.
What a reader's model or defense gives is checked there once, so that a slip is not an error far
away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Protocol

from torch import nn

from ..metrics import REFUSED
from ..models.adopt import architecture, check_classes, require_float32
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
        """Return an untrained model of the same kind.

        Args:
            training: To come.

        Raises:
            ValueError: If the pretrained encoder below the suspected model is not known.
        """
        given = self.classifier
        if isinstance(given, PictureClassifier):
            return replace(given.anew(training.seed), pad=training.pad, flip=training.flip)
        made = untrained(self.view.reserved, training, given.source)
        if _shape(made.model) != _shape(given.model):
            raise ValueError(f"a new {architecture(given.model)} is trained from its pretrained "
                             "encoder, and which that was is not known: set `source` of the "
                             "classifier to its folder or hub id")
        return made

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
def _method(settings: object, case: Case) -> Outcome:
    if isinstance(settings, type):
        raise TypeError(f"{settings.__name__} is a class: give `repair` settings, such as "
                        f"{settings.__name__}()")
    raise TypeError(f"no defense belongs to {type(settings).__name__}: write one, and put "
                    "`@repair.register` above it")


def repair(settings: object, case: Case) -> Outcome:
    """Run the defense that these settings belong to.

    What the defense itself raises goes through.

    Args:
        settings: Of one of the methods, or of a registered one.
        case: What it may see.

    Returns:
        A model that can be measured; that of the case is not changed.

    Raises:
        TypeError: If the settings belong to no defense, or if what it gives is no outcome.
        ValueError: If the model does not fit the data, or the repaired one does not answer.
    """
    _check_model(case)
    found = _method(settings, case)
    _check_outcome(found, type(settings).__name__, case)
    return found


def _register(first: object, method: Callable | None = None) -> Callable:
    """Let `repair` know a defense; see the text above."""
    try:
        return _method.register(first, method)
    except (TypeError, NameError) as error:
        raise TypeError("which settings this defense is for cannot be told: annotate its first "
                        "parameter, as in `def _(settings: MySettings, case: Case)`") from error


repair.register = _register
repair.dispatch, repair.registry = _method.dispatch, _method.registry


def _shape(model: nn.Module) -> tuple:
    sizes = ("hidden_size", "num_hidden_layers")
    return type(model).__name__, *(getattr(model.config, size, None) for size in sizes)


def _check_model(case: Case) -> None:
    """Call the suspected model once, so that one that cannot be called is refused at once."""
    model, rows = case.classifier, case.view.reserved
    lacks = [name for name in ("model", "encode", "collate", "batches", "logits", "predict")
             if not hasattr(model, name)]
    if lacks:
        raise TypeError(f"a defense works on a `Classifier` or `PictureClassifier`, not on a "
                        f"{type(model).__name__}, which has no {lacks[0]}")
    network = type(model.model).__name__
    if not hasattr(model.model, "device") or not hasattr(
            getattr(model.model, "config", None), "num_labels"):
        raise TypeError(f"the network {network} needs `device` and `config.num_labels` beside its "
                        "forward: defenses read them")
    require_float32(model.model)
    check_classes(model, rows.label_names)
    model.model.eval()  # else it would go on with dropout, and its BatchNorm would learn
    some = rows.take(range(min(2, len(rows)))).texts
    try:
        shape = tuple(model.logits(some).shape)
    except Exception as error:  # whatever a reader's network raises
        takes = "pixel_values" if rows.are_pictures else "input_ids and attention_mask"
        raise ValueError(f"the network {network} cannot be called "
                         f"({_short(error)}): it must take {takes} and return `logits`") from error
    if shape != (len(some), rows.num_labels):
        raise ValueError(f"the network {network} gives logits of shape {shape} "
                         f"for {len(some)} samples of {rows.num_labels} classes")


def _check_outcome(found: object, name: str, case: Case) -> None:
    """Refuse what a defense gives if nobody could measure it."""
    if not isinstance(found, Outcome):
        raise TypeError(f"the defense for {name} gave a {type(found).__name__} and no outcome: "
                        "end it with `return Outcome(model)`")
    if not callable(getattr(found.model, "predict", None)):
        raise TypeError(f"the model that the defense for {name} gave, a "
                        f"{type(found.model).__name__}, has no method `predict`: give a "
                        "`Classifier`, or a class that has one")
    rows = case.view.reserved
    some = rows.take(range(min(4, len(rows)))).texts
    try:
        answers = [int(answer) for answer in found.model.predict(some)]
    except Exception as error:  # whatever a reader's model raises
        raise ValueError(f"the model that the defense for {name} gave does not predict "
                         f"({_short(error)}): `predict` takes samples and returns a class "
                         "number for each") from error
    if len(answers) != len(some) or not {*answers} <= {REFUSED, *range(rows.num_labels)}:
        raise ValueError(f"the model that the defense for {name} gave answers {answers} for "
                         f"{len(some)} samples: `predict` returns a class number for each")


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__} {error}".split())
    return text if len(text) <= 70 else f"{text[:67]}..."
