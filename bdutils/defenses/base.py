"""What all defenses share: what they are given, what they give back, and their common steps.

A defense is one class. Its fields are its hyperparameters, and calling it with a `Context` runs
it::

    @register("mine")
    @dataclass(frozen=True)
    class Mine:
        epochs: int = 3

        def __call__(self, context: Context) -> Outcome:
            ...

`register` also checks what goes in and what comes out, so that a slip in a reader's model or
defense is one clear sentence here and not an error far away.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..metrics import REJECTED, cacc
from ..models.adopt import architecture, check_classes, require_float32
from ..models.image import ImageClassifier
from ..roles import CleanSet, TrainSet, stratified_subset
from ..training import ImageTrainConfig, Model, Training, untrained

DEFENSES: dict[str, type] = {}
Defense = TypeVar("Defense", bound=type)


class Predictor(Protocol):
    """What can be measured: a model, or a model behind an input filter."""

    def predict(self, inputs: Any) -> list[int]:
        """Return a class for each text or image, `metrics.REJECTED` where it gives none."""


class EpochLog(NamedTuple):
    """What the defender sees of a model under repair, from clean and flagged samples alone.

    What was not measured is NaN.
    """

    cycle: int
    """Steps, epochs or cycles so far; 0 is before the first."""
    agreement: float
    """Share of flagged samples that keep their label."""
    base: float = math.nan
    """Share of other clean samples that get that label."""
    accuracy: float = math.nan
    """On held-out clean samples."""
    trust: tuple[float, ...] = ()
    """Mean terms of the loss on clean samples."""
    punish: tuple[float, ...] = ()
    """Mean terms of the loss on flagged samples."""
    excess: float = math.nan
    """See `log_odds_excess`."""


Callback = Callable[[nn.Module, EpochLog], None]


def ignore(student: nn.Module, log: EpochLog) -> None:
    """Do nothing after an epoch; an evaluator may give another callback.

    What a callback returns is not used, and it must leave student and random state as they are.
    """


@dataclass(frozen=True)
class Context:
    """What a defender is given, whatever the defense, and nothing else.

    No part refers to the test set, the trigger, the target label or the poisoned samples, so
    that a defense cannot use what a real defender would not know.

    Raises:
        TypeError: If a set has another role.
    """

    classifier: Model
    """The suspected model."""
    clean: CleanSet
    """Clean samples."""
    # For a type checker these two are always there: what needs them asks `require` first.
    train: TrainSet = cast(TrainSet, None)
    """The training set, None if the defender does not have it."""
    training: Training = cast(Training, None)
    """How such a model is trained, None if the defender does not know it."""
    callback: Callback = ignore
    """An evaluator's look at a model under repair, of which the defense learns nothing."""

    def __post_init__(self) -> None:
        """Keep the roles apart."""
        if type(self.clean) is not CleanSet:
            raise TypeError("a defender's clean samples must be a CleanSet, "
                            f"not a {type(self.clean).__name__}")
        if self.train is not None and type(self.train) is not TrainSet:
            raise TypeError("a defender's training set must be a TrainSet, "
                            f"not a {type(self.train).__name__}")

    def require(self, method: str, *, train: bool = False, training: bool = False) -> None:
        """Say what a defense needs and has not been given.

        Args:
            method: Its name, for the message.
            train: Whether it needs the training set.
            training: Whether it must know how such a model is trained.

        Raises:
            ValueError: If something is missing, or the sets differ in their classes.
        """
        if train and self.train is None:
            raise ValueError(f"{method} needs the training set: give the context a `train`, or "
                             "choose a defense that needs clean samples alone")
        if training and self.training is None:
            raise ValueError(f"{method} trains as the given model was trained: give the context "
                             "a `training`")
        if self.train and self.train.label_names != self.clean.label_names:
            raise ValueError("training set and clean samples differ in their classes: "
                             f"{self.train.label_names} and {self.clean.label_names}")

    def new_model(self, training: Training) -> Model:
        """Return an untrained model of the same kind as the suspected one.

        Args:
            training: To come.

        Raises:
            ValueError: If the pretrained encoder below the suspected model is not known.
        """
        given = self.classifier
        if isinstance(given, ImageClassifier):
            assert isinstance(training, ImageTrainConfig)
            return replace(given.anew(training.seed), pad=training.pad, flip=training.flip)
        made = untrained(self.clean, training, given.source)
        if _shape(made.model) != _shape(given.model):
            raise ValueError(f"a new {architecture(given.model)} is trained from its pretrained "
                             "encoder, and which that was is not known: set `source` of the "
                             "classifier to its folder or hub id")
        return made


@dataclass(frozen=True)
class Outcome:
    """What a defense gives back."""

    model: Predictor
    """Repaired, behind a filter, or as it was."""
    verdict: str = "purified"
    """`purified`, `filtered`, `no evidence`, `undone`, or a word of the defense's own."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By step; the whole time if the defense gives none."""
    history: tuple[EpochLog, ...] = ()
    """What the defender saw on the way."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What else the method found, by name."""


def register(name: str) -> Callable[[Defense], Defense]:
    """Return a decorator that enters a defense into `DEFENSES` and checks each of its calls.

    Args:
        name: Of the defense; a class of the same name may be registered anew, as when a cell of
            a notebook runs twice.

    Raises:
        TypeError: If it decorates what is no dataclass with `__call__(self, context)`.
        ValueError: If another defense has the name.
    """
    def add(cls: Defense) -> Defense:
        method = vars(cls).get("__call__") if inspect.isclass(cls) else None
        if not (is_dataclass(cls) and callable(method)
                and len(inspect.signature(method).parameters) == 2):
            raise TypeError(f"{getattr(cls, '__name__', cls)} is no defense: write a dataclass "
                            "with `def __call__(self, context: Context) -> Outcome`")
        if name in DEFENSES and DEFENSES[name].__name__ != cls.__name__:
            raise ValueError(f"{name!r} is {DEFENSES[name].__name__} already: choose another name")

        @functools.wraps(method)
        def checked(self: object, context: Context) -> Outcome:
            _check_context(context)
            start = time.perf_counter()
            outcome = method(self, context)
            _check_outcome(outcome, name, context)
            return outcome if outcome.seconds else replace(
                outcome, seconds={"purify": time.perf_counter() - start})

        cls.__call__ = checked  # type: ignore[method-assign]
        DEFENSES[name] = cls
        return cls

    return add


def check_range(config: object, holds: bool) -> None:
    """Reject hyperparameters that cannot be meant.

    Args:
        config: Of a defense.
        holds: Whether each of its fields is in its range.

    Raises:
        ValueError: If one is not.
    """
    if not holds:
        raise ValueError(f"cannot go on with {config}: a field is out of its range")


def clone(classifier: Model) -> Model:
    """Return a copy that can be trained without changing the original."""
    return replace(classifier, model=copy.deepcopy(classifier.model))


def stratified_split(clean: CleanSet, shares: Sequence[float], seed: int
                     ) -> list[CleanSet | None]:
    """Divide clean samples among several uses, each with the same share of every class.

    Args:
        clean: n samples.
        shares: Of each class, with a sum of 1 at most.
        seed: Which samples go where.

    Returns:
        Disjoint sets, one for each share; None where a share is 0.

    Raises:
        ValueError: If a share that is not 0 gets no sample of a class.
    """
    rng = random.Random(seed)
    parts: list[list[int]] = [[] for _ in shares]
    for label in range(clean.num_labels):
        chosen = [i for i, y in enumerate(clean.labels) if y == label]
        rng.shuffle(chosen)
        start, reach = 0, 0.0
        for part, share in zip(parts, shares, strict=True):
            reach += share  # rounded once, so that no sample is lost
            stop = round(reach * len(chosen))
            if stop > len(chosen) or (share and stop == start):
                raise ValueError(f"{len(chosen)} clean samples of class {label} cannot be divided "
                                 f"by {tuple(shares)}: give more, or shares that sum to 1 at most")
            part += chosen[start:stop]
            start = stop
    return [clean.take(part) if part else None for part in parts]


def hold_out(clean: CleanSet, share: float, seed: int) -> tuple[CleanSet, CleanSet]:
    """Split clean samples into material and a share for a threshold.

    Args:
        clean: n samples.
        share: Of all, as many of each class.
        seed: Which.

    Raises:
        ValueError: If a part would be empty.
    """
    n, count = len(clean), round(share * len(clean))
    if not 0 < count < n:
        raise ValueError(f"{n} clean samples cannot be split at a share of {share}: an input "
                         "filter needs samples in both parts")
    order = random.Random(seed).sample(range(n), n)
    held = stratified_subset(order, clean.labels, count, clean.num_labels)
    chosen = set(held)
    return clean.take([i for i in order if i not in chosen]), clean.take(held)


def line_search(before: Model, after: Model, excess: Callable[[Model], float],
                steps: int = 7) -> tuple[Model, float]:
    """Return the first model on the way from one to the other whose excess is gone.

    An unlearning often goes further than it should. Between the weights of the two models lies a
    straight line, and along it the backdoor fades smoothly: bisection finds where to stop.

    Args:
        before: The suspected model, left as it is.
        after: Repaired, of the same network, left as it is.
        excess: Maps a model to a number from what the defender sees, above 0 as long as too much
            of the backdoor is there.
        steps: Of the bisection, >= 1; the place is known to 1 / 2^steps.

    Returns:
        A copy with the weights (1 - s) * before + s * after, and s. Where `after` has an excess
        as well, s is 1.

    Source: after Frankle et al. 2020, who look at training on such lines.
    """
    model = clone(after)

    @torch.no_grad()
    def between(share: float) -> Model:
        # By parameter, not by name: what two names share is moved once.
        for at, old, new in zip(*map(_weights, (model, before, after)), strict=True):
            if at.is_floating_point():
                at.copy_(torch.lerp(new, old, 1 - share))
        return model

    if excess(after) > 0:
        return model, 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if excess(between(middle)) > 0:
            low = middle
        else:
            high = middle
    return between(high), high


def log_odds(logits: Tensor, labels: Tensor | Sequence[int] | int) -> Tensor:
    """Return how far a model prefers a label to all others together.

    Unlike the share of samples that get the label, it does not saturate.

    Args:
        logits: (n, K).
        labels: (n,) class numbers, or one for all samples.

    Returns:
        (n,) in nats, above 0 where the label has more than half of the probability.
    """
    chosen = torch.as_tensor(labels, device=logits.device).expand(len(logits))[:, None]
    others = logits.scatter(1, chosen, -math.inf).logsumexp(1)
    return logits.gather(1, chosen)[:, 0] - others


def log_odds_excess(suspects: Tensor, labels: Sequence[int], clean: Tensor,
                    clean_labels: Sequence[int], purity: float = 1.0) -> float:
    """Return how much more poisoned samples lean to their label than clean ones to that label.

    Without a backdoor a trigger changes little, so poisoned samples lean to the target label as
    clean samples of other classes do. Both are compared by their median log odds. Where some of
    the suspects are clean and rightly have their label, the poisoned ones are the lower part.

    Args:
        suspects: (n, K) logits of the model under repair.
        labels: (n,) of the suspects, as in the training set.
        clean: (m, K) its logits of clean samples.
        clean_labels: (m,) true ones.
        purity: Estimated share of the suspects that are poisoned, 0 to 1.

    Returns:
        Nats: above 0 while some of the backdoor is there, and below 0 once the trigger pushes
        away from the target.
    """
    suspects, clean, true = suspects.float().cpu(), clean.float().cpu(), torch.tensor(clean_labels)
    levels = {label: log_odds(clean, label)[true != label].median().item()
              for label in set(labels)}
    beyond = log_odds(suspects, labels) - torch.tensor([levels[label] for label in labels])
    return beyond.quantile(purity / 2).item()


def accept_if_harmless(before: Model, after: Model, held_out: CleanSet | None,
                       max_loss: float | None, stacklevel: int = 4) -> str:
    """Say whether a repair stands, or costs too much on held-out samples.

    Args:
        before: The model as it was given.
        after: Repaired.
        held_out: Clean samples that had no part in the repair; with None it stands.
        max_loss: Of accuracy, 0 to 1; with None it stands.
        stacklevel: Of the warning that a repair is undone: the place where a defense is called.

    Returns:
        `purified` or `undone`.
    """
    if max_loss is None or not held_out:
        return "purified"
    was, now = (cacc(model.predict(held_out.inputs), held_out.labels).value
                for model in (before, after))
    if was - now <= max_loss:
        return "purified"
    warnings.warn(f"the defense took the held-out accuracy from {was:.1%} to {now:.1%} and was "
                  "undone: lower lr, or give more clean samples", stacklevel=stacklevel)
    return "undone"


def _weights(classifier: Model) -> Iterator[Tensor]:
    return itertools.chain(classifier.model.parameters(), classifier.model.buffers())


def _shape(model: nn.Module) -> tuple:
    sizes = ("hidden_size", "num_hidden_layers")
    return type(model).__name__, *(getattr(model.config, size, None) for size in sizes)


def _check_context(context: Context) -> None:
    """Call the suspected model once, so that one that cannot be called is rejected at once."""
    if not isinstance(context, Context):
        raise TypeError(f"a defense is called with a Context, not a {type(context).__name__}: "
                        "give Context(classifier, clean)")
    model, clean = context.classifier, context.clean
    lacks = [name for name in ("model", "encode", "collate", "batches", "logits", "predict")
             if not hasattr(model, name)]
    if lacks:
        raise TypeError(f"a defense works on a `Classifier` or `ImageClassifier`, not on a "
                        f"{type(model).__name__}, which has no {lacks[0]}")
    network = type(model.model).__name__
    if not hasattr(model.model, "device") or not hasattr(
            getattr(model.model, "config", None), "num_labels"):
        raise TypeError(f"the network {network} needs `device` and `config.num_labels` beside its "
                        "forward: defenses read them")
    require_float32(model.model)
    check_classes(model, clean.label_names)
    model.model.eval()  # else it would go on with dropout, and its BatchNorm would learn
    some = clean.take(range(min(2, len(clean)))).inputs
    try:
        shape = tuple(model.logits(some).shape)
    except Exception as error:  # whatever a reader's network raises
        takes = "pixel_values" if clean.are_images else "input_ids and attention_mask"
        raise ValueError(f"the network {network} cannot be called "
                         f"({_short(error)}): it must take {takes} and return `logits`") from error
    if shape != (len(some), clean.num_labels):
        raise ValueError(f"the network {network} gives logits of shape {shape} "
                         f"for {len(some)} samples of {clean.num_labels} classes")


def _check_outcome(outcome: object, name: str, context: Context) -> None:
    """Reject what a defense gives if nobody could measure it."""
    if not isinstance(outcome, Outcome):
        raise TypeError(f"the defense {name} gave a {type(outcome).__name__} and no outcome: "
                        "end it with `return Outcome(model)`")
    if not callable(getattr(outcome.model, "predict", None)):
        raise TypeError(f"the model that the defense {name} gave, a "
                        f"{type(outcome.model).__name__}, has no method `predict`: give a "
                        "`Classifier`, or a class that has one")
    clean = context.clean
    some = clean.take(range(min(4, len(clean)))).inputs
    try:
        answers = [int(answer) for answer in outcome.model.predict(some)]
    except Exception as error:  # whatever a reader's model raises
        raise ValueError(f"the model that the defense {name} gave does not predict "
                         f"({_short(error)}): `predict` takes samples and returns a class "
                         "number for each") from error
    if len(answers) != len(some) or not {*answers} <= {REJECTED, *range(clean.num_labels)}:
        raise ValueError(f"the model that the defense {name} gave answers {answers} for "
                         f"{len(some)} samples: `predict` returns a class number for each")


def _short(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__} {error}".split())
    return text if len(text) <= 70 else f"{text[:67]}..."
