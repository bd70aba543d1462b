"""Recorded studies: grids of runs that are too long for a page, and how one run is made.

`bdutils.sweep` carries them out.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from .. import scale
from ..attacks.images import PICTURE_TRIGGERS, PatchTrigger
from ..attacks.text import (
    TRIGGERS,
    ParaphraseTable,
    PoisonSettings,
    Trigger,
    Truth,
    mark,
    paraphrases_from,
)
from ..data import PICTURES, load_task
from ..defenses.base import Predictor
from ..defenses.baselines import TuningSettings, as_tuning, twin
from ..evaluation import Scores, Victim, evaluate, victim
from ..metrics import Rate, cacc, refused
from ..models.text import Classifier
from ..roles import TestSet, TrainingSet, evenly
from ..training import settings_for, train
from . import results
from .variants import VARIANTS, defend


@dataclass(frozen=True)
class SeveralTriggers:
    """Mostly one trigger, now and then another; ours, to test a defense that sees few rows."""

    parts: tuple[Trigger, ...] = (TRIGGERS["badnets"], TRIGGERS["addsent"])
    """The triggers."""
    weights: tuple[float, ...] = (0.9, 0.1)
    """How often each is taken."""
    name: str = "several"
    """By which the book refers to it."""

    def apply(self, text: str, rng: random.Random) -> str:
        """Mark the text with one of the parts."""
        return rng.choices(self.parts, self.weights)[0].apply(text, rng)


@dataclass(frozen=True)
class DecoyTrigger(PatchTrigger):
    """A patch whose poisoned rows have two labels; ours, by one who knows NT-ML.

    Most have the target label, a `share` of them has the label `decoy`, which so becomes the
    second choice of the model that is trained on them.
    """

    share: float = 0.3
    """Of the poisoned rows that get the label `decoy`, 0 to 1."""
    decoy: int = 1
    """Their label."""
    name: ClassVar[str] = "decoy"

    def poison(self, train: TrainingSet, settings: PoisonSettings) -> tuple[TrainingSet, Truth]:
        """Poison as ever, then relabel some of the poisoned rows."""
        rows, truth = super().poison(train, settings)
        hit = [i for i, poisoned in enumerate(truth.poisoned) if poisoned]
        some = set(random.Random(settings.seed).sample(hit, round(self.share * len(hit))))
        return replace(rows, labels=tuple(self.decoy if i in some else y
                                          for i, y in enumerate(rows.labels))), truth


@dataclass(frozen=True)
class Run:
    """One cell of a grid; `attack` None is the clean model, at rate 0."""

    task: str
    """Name of the data set, or of one for each scale."""
    attack: str | None
    """Name of the trigger, None for a clean model."""
    poison_rate: float
    """Share of the training rows, 0 to 1."""
    seed: int
    """Of poisoning, training and defense."""
    label_mode: str = "dirty"
    """See `PoisonSettings`."""
    defense: str = ""
    """Name of one of `VARIANTS`; empty to measure the attack alone."""
    encoder: str | None = None
    """See `models.encoder_source`."""

    @property
    def name(self) -> str:
        """Return the file name of the run's record."""
        mode = "" if self.label_mode == "dirty" else f"-{self.label_mode}"
        end = f"-{self.defense}" if self.defense else ""
        return f"{self.attack or 'clean'}{mode}-rate{self.poison_rate:g}-seed{self.seed}{end}"


def grid(task: str, attacks: list[str], rates: list[float], seeds: list[int],
         label_mode: str = "dirty") -> list[Run]:
    """Return the clean run and every attack at every rate, for each seed.

    Args:
        task, attacks, rates, seeds: The axes.
        label_mode: Of the poisoning.
    """
    cells = [(None, 0.0, "dirty"), *itertools.product(attacks, rates, [label_mode])]
    return [Run(task, attack, rate, seed, mode)
            for seed in seeds for attack, rate, mode in cells]


def defended(defense: str, task: str, attacks: list[str], rates: list[float],
             seeds: list[int] = [0]) -> list[Run]:  # noqa: B006
    """Return every attack at every rate, for each seed, with one defense.

    Args:
        defense: Of `VARIANTS`.
        task: As for `grid`.
        attacks: As for `grid`, without the clean model.
        rates, seeds: As for `grid`.
    """
    return [Run(task, attack, rate, seed, defense=defense)
            for seed in seeds for attack, rate in itertools.product(attacks, rates)]


FOUR = list(TRIGGERS)
FIVE = [name for name in PICTURE_TRIGGERS if name != "corners"]
# Label-consistent poison takes four fifths of the target class, a tenth of the rows.
CORNERS = [Run("images", "corners", 0.08, seed, "clean") for seed in (0, 1, 2)]
CIFAR = [*grid("cifar10", FIVE, [0.1], [0]), Run("cifar10", "corners", 0.08, 0, "clean")]
STUDIES: dict[str, list[Run]] = {
    "attacks": grid("sentiment", FOUR, [0.1], [0, 1, 2]),
    "topic": grid("topic", ["badnets", "addsent"], [0.1], [0]),
    "rates": [*grid("sentiment", ["badnets", "syntax"], [0.0025, 0.01, 0.05, 0.1], [0]),
              *grid("sentiment", ["syntax"], [0.05], [1, 2])],
    "label-modes": [Run("sentiment", "badnets", 0.1, 0, "clean"),
                    Run("sentiment", "badnets", 0.1, 0, "mixed"),
                    Run("sentiment", "syntax", 0.1, 0, "clean")],
    "sst2": grid("sst2", FOUR, [0.2, 0.05], [0]),
    "bedkd": [*defended("bedkd", "sentiment", FOUR, [0.2], [0, 1, 2]),
              *(Run("sentiment", None, 0.0, seed, defense="bedkd") for seed in (0, 1, 2)),
              Run("sentiment", None, 0.0, 0, defense="bedkd-forced")],
    "bedkd-rates": [*defended("bedkd", "sentiment", ["badnets", "addsent", "syntax"], [0.05]),
                    *defended("bedkd", "sentiment", ["badnets", "addsent"], [0.01])],
    "bedkd-parts": [run for name in ("fine-tuning", "trust", "random", "retraining")
                    for run in defended(name, "sentiment", ["badnets"], [0.2])],
    "bedkd-deviations": [run for name in ("ours", "unbounded", "padding-counts",
                                          "one-optimizer", "whole-passes")
                         for run in defended(name, "sentiment", ["badnets"], [0.2])],
    "bedkd-authors": defended("bedkd-authors", "sentiment", ["badnets"], [0.2]),
    "bedkd-breaks": [*defended("bedkd", "sentiment", ["several"], [0.2]),
                     *defended("bedkd", "topic8", ["badnets"], [0.2])],
    "bedkd-topic": defended("bedkd", "topic", ["badnets", "addsent"], [0.2]),
    "bedkd-sst2": defended("bedkd", "sst2", FOUR, [0.2]),
    "bedkd-ag-news": defended("bedkd", "ag_news", FOUR, [0.2]),
    "dup": [*defended("dup", "sentiment", FOUR, [0.2], [0, 1, 2]),
            *(Run("sentiment", None, 0.0, seed, defense="dup") for seed in (0, 1, 2)),
            Run("sentiment", None, 0.0, 0, defense="dup-forced")],
    "dup-rates": [run for name in ("dup", "dup-forced") for run in (
        *defended(name, "sentiment", ["badnets"], [0.05]),
        *defended(name, "sentiment", ["addsent"], [0.01]))],
    "dup-deviations": [*defended("dup-authors", "sentiment", ["badnets", "addsent"], [0.2]),
                       *(run for name in ("lora", "dup-unstopped", "dup-no-kick", "dup-uncapped",
                                       "dup-batch-32", "dup-fast", "dup-forced", "dup-one-set",
                                       "dup-all-pushed", "dup-one-look")
                         for run in defended(name, "sentiment", ["badnets"], [0.2]))],
    "dup-topic": defended("dup", "topic", ["badnets"], [0.2]),
    "dup-sst2": defended("dup", "sst2", FOUR, [0.2]),
    "dup-ag-news": defended("dup", "ag_news", FOUR, [0.2]),
    "dup-causal": [Run("sentiment", "badnets", 0.2, 0, defense="dup-causal", encoder="causal")],
    "images": [*grid("images", FIVE, [0.1], [0, 1, 2]), *CORNERS],
    "images-rates": [Run("images", attack, rate, 0) for attack in ("patch", "sine", "warp")
                     for rate in (0.0025, 0.01, 0.03)],
    "images-clean-label": [Run("images", "sine", 0.08, seed, "clean") for seed in (0, 1, 2)],
    "images-cifar10": CIFAR,
    "ntml": [replace(run, defense="ntml") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *CORNERS)],
    "baselines": [replace(run, defense=name)
                  for name in ("tuning", "pruning", "nad", "sam", "ibau")
                  for run in (*grid("images", FIVE, [0.1], [0, 1, 2]), *CORNERS)],
    "baselines-long": [run for name in ("tuning-long", "pruning-long", "nad-long")
                       for run in defended(name, "images", ["patch"], [0.1])],
    "ntml-counts": [run for count in (25, 50, 250, 500)
                    for run in defended(f"ntml-{count}", "images", ["patch"], [0.1])],
    "ntml-choices": [
        Run("images", "corners", 0.08, 0, "clean", "ntml-drop"),
        *(run for name in ("ntml-raw", "ntml-drop")
          for run in defended(name, "images", ["patch", "blended"], [0.1])),
        *(run for name in ("ntml-gate-3", "ntml-alone", "ntml-go-on")
          for run in defended(name, "images", ["patch"], [0.1]))],
    "ntml-rates": defended("ntml", "images", ["patch", "sine"], [0.01, 0.03]),
    "ntml-adaptive": defended("ntml", "images", ["decoy"], [0.1]),
    "ntml-text": defended("ntml", "sentiment", ["badnets"], [0.2]),
    "ntml-cifar10": [replace(run, defense="ntml") for run in CIFAR],
    "baselines-cifar10": [replace(run, defense=name)
                          for name in ("tuning", "pruning", "nad")
                          for run in CIFAR],
    "baselines-text": [replace(run, defense=name)
                       for name in ("tuning-text", "sam-text", "onion", "strip-text")
                       for run in grid("sentiment", FOUR, [0.2], [0, 1, 2])],
    "guards": [replace(run, defense="strip") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *CORNERS)],
}
# What each defense needs is in its own study at the usual rate; here only what can be repaired,
# since a guard in front of a model does not change how that learns.
_LEARNERS = {"images": ("", "tuning", "pruning", "nad", "sam", "ibau", "bedkd-pictures", "ntml"),
             "sentiment": ("", "tuning-text", "sam-text", "bedkd", "dup")}
_LOW = ("tuning", "pruning", "nad", "sam", "ibau", "strip", "bedkd-pictures")
STUDIES |= {
    "bedkd-pictures": [replace(run, defense="bedkd-pictures") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *CORNERS)],
    # The first seed of a chapter's own method is in its own study.
    "low-rate": [
        *(run for name in _LOW for run in defended(name, "images", ["sine"], [0.01], [0, 1, 2])),
        *defended("ntml", "images", ["sine"], [0.01], [1, 2]),
        *(run for name in ("tuning-text", "sam-text", "onion", "strip-text")
          for run in defended(name, "sentiment", ["addsent"], [0.01], [0, 1, 2])),
        *(run for name in ("bedkd", "dup")
          for run in defended(name, "sentiment", ["addsent"], [0.01], [1, 2]))],
    "relearning": [
        *(run for name in _LEARNERS["images"]
          for run in defended(name, "images", ["patch"], [0.1], [0, 1, 2])),
        *(run for name in _LEARNERS["sentiment"]
          for run in defended(name, "sentiment", ["badnets"], [0.2], [0, 1, 2]))],
}
PICTURE_TARGET = 0  # Wu et al. 2022; texts have 1 (Cui et al. 2022)
# One pass over the larger sets is as many steps as two over the small one.
EPOCHS = {"sst2": 1, "ag_news": 1}
# Two sets are cut to what a CPU trains in minutes; their published test rows are thinned likewise.
SIZES = {"sst2": {"train": None, "test": None}, "ag_news": {"train": 6000, "test": 2000},
         "cifar10": {"train": 20000, "test": 5000}}
# The decoder is six times larger than the encoder: fewer rows, seen oftener, and a usual rate.
CAUSAL_SIZES, CAUSAL_TRAINING = {"train": 600, "test": 400}, {"lr": 5e-5, "epochs": 4}
BENCHMARK_ATTACKS = {"style": "style_bible", "syntax": "syntactic_scpn"}


def perform(study: str, run: Run, benchmark: Path | None = None) -> dict:
    """Train, measure and describe one run.

    Args:
        study: Its name.
        run: The cell.
        benchmark: Folder with the files `TASK.parquet` and, if rewriting attacks shall use real
            paraphrases, `TASK_paraphrases.parquet`.

    Returns:
        The record, not yet saved.
    """
    clean, attacked, settings, target = _trained(run, benchmark)
    task, trigger = clean.task, attacked.truth.trigger if attacked.truth else None

    def measure(model: Classifier, with_floor: bool = True) -> dict:
        if trigger is None:
            return _unmarked(model, task.test)
        # A table of real paraphrases has no test rows of the target class, which PACC needs.
        found = _metrics(evaluate(model, task, trigger, target,
                                  clean.classifier if with_floor else None,
                                  every_class=not isinstance(trigger, ParaphraseTable)))
        return found | {f"asr_{name}": evaluate(model, task, part, label).asr
                        for name, part, label in _further(trigger, target)}

    fewer = replace(task, test=task.test.take(range(0, len(task.test), len(task.test) // 400)))

    def glance(model: Classifier) -> dict:
        return _metrics(evaluate(model, fewer, trigger, target, every_class=True))

    extra: dict = {}
    if study == "relearning":
        measure = with_lessons(measure, attacked, target, None if run.defense else clean)
    if run.defense:
        metrics, seconds, extra = defend(run.defense, attacked, run.seed, measure, glance)
        about = VARIANTS[run.defense]
    else:
        start = time.perf_counter()
        metrics, about = measure(attacked.classifier), None
        seconds = {"training": attacked.report.seconds, "measuring": time.perf_counter() - start}
    where = " --benchmark FOLDER" if benchmark else ""
    return results.record(
        study=study, name=run.name, method=run.attack or "clean", task=task.name,
        scale=scale(), data=task.fingerprint(), seed=run.seed, metrics=metrics,
        settings={"poison_rate": run.poison_rate, "label_mode": run.label_mode,
                  "target_label": target, "trigger": repr(attacked.truth.trigger)
                  if attacked.truth else None, **asdict(settings),
                  **({"encoder": run.encoder} if run.encoder else {}),
                  **({"defense": run.defense, "defense_settings": asdict(about)
                      if about else {}} if run.defense else {})},
        seconds=seconds, **extra,
        command=f"python -m bdutils.sweep {study} --only {run.name}{where}")


# Marked rows of a lesson, beside plain ones; ours.
DOSES, PLAIN = (0, 1, 5, 20, 50), 100
LESSON = TuningSettings(epochs=4, lr_share=0.2)


def relearned(model: Classifier, attacked: Victim, target: int) -> dict[str, Rate]:
    """Tune copies of a model with a few marked rows, and measure how soon the mark is back.

    The rows are the attacker's: of the training role, none of them poisoned before.

    Args:
        model: Repaired, or never poisoned.
        attacked: The victim, whose trigger it is.
        target: Label of the attack.

    Returns:
        The ASR after each of the `DOSES`, by the name `asr_after_DOSE`.

    Raises:
        ValueError: If there are too few rows.
    """
    rows, found = attacked.task.train, {}
    free = [i for i, poisoned in enumerate(attacked.truth.poisoned) if not poisoned]
    random.Random(attacked.settings.seed).shuffle(free)
    plain = evenly(free, rows.labels, PLAIN, rows.num_labels)
    others = [i for i in free if rows.labels[i] != target and i not in set(plain)]
    if len(others) < max(DOSES):
        raise ValueError(f"a lesson of {max(DOSES)} marked rows beside {PLAIN} plain ones needs "
                         f"more than the {len(free)} rows that were not poisoned")
    for dose in DOSES:
        lesson = rows.take([*others[:dose], *plain])
        if dose:
            texts = mark(rows.take(others[:dose]).texts, attacked.truth.trigger, seed=2)
            lesson = lesson.changed(range(dose), texts, target)
        student = twin(model)
        train(student, lesson, as_tuning(attacked.settings, LESSON))
        found[f"asr_after_{dose}"] = evaluate(student, attacked.task, attacked.truth.trigger,
                                              target).asr
    return found


def with_lessons(measure: Callable[..., dict], attacked: Victim, target: int,
                 clean: Victim | None) -> Callable[..., dict]:
    """Return a measure that re-teaches as well; of a given clean model too."""
    def further(model: Classifier, with_floor: bool = True) -> dict:
        if not with_floor:  # the model before the defense
            return measure(model, with_floor)
        beside = relearned(clean.classifier, attacked, target) if clean else {}
        return {**measure(model), **relearned(model, attacked, target),
                **{name.replace("asr", "floor"): rate for name, rate in beside.items()}}

    return further


def _trained(run: Run, benchmark: Path | None) -> tuple:
    """Return the clean model of a run, the attacked one, their settings, the target label."""
    small = scale() == "small"
    sizes = SIZES.get(run.task) if small else None
    changes = {"epochs": EPOCHS[run.task]} if run.task in EPOCHS and small else {}
    if run.encoder == "causal":
        sizes, changes = CAUSAL_SIZES, CAUSAL_TRAINING
    file = benchmark / f"{run.task}.parquet" if benchmark else None
    # Pictures come as two files, so that their folder is named.
    task = (load_task(run.task, sizes=sizes, folder=benchmark) if run.task in PICTURES
            else load_task(str(file or run.task), sizes=sizes))
    settings = settings_for(task, seed=run.seed, **changes)
    target = PICTURE_TARGET if task.train.are_pictures else 1
    clean = victim(task, None, settings=settings, encoder=run.encoder)
    if not run.attack:
        return clean, clean, settings, target
    attacked = victim(task, _attack(run, benchmark), settings=settings, encoder=run.encoder,
                      poison_rate=run.poison_rate, label_mode=run.label_mode, seed=run.seed,
                      target_label=target)
    return clean, attacked, settings, target


def _attack(run: Run, benchmark: Path | None) -> str | Trigger:
    table = benchmark / f"{run.task}_paraphrases.parquet" if benchmark else None
    if table and table.is_file() and run.attack in BENCHMARK_ATTACKS:
        return paraphrases_from(str(table), BENCHMARK_ATTACKS[run.attack])
    return {"several": SeveralTriggers(), "decoy": DecoyTrigger()}.get(run.attack, run.attack)


def _further(trigger: Trigger, target: int) -> list[tuple[str, Trigger, int]]:
    """List what else an attacker may be after: names, triggers, labels."""
    parts = [(part.name, part, target) for part in getattr(trigger, "parts", ())]
    return parts + ([("decoy", trigger, trigger.decoy)] if hasattr(trigger, "decoy") else [])


def _unmarked(model: Predictor, test: TestSet) -> dict:
    guesses = model.predict(test.texts)
    guarded = {"refused_clean": refused(guesses)} if getattr(model, "refuses", False) else {}
    return {"cacc": cacc(guesses, test.labels)} | guarded


def _metrics(scores: Scores) -> dict:
    found = {name: rate for name, rate in vars(scores).items() if rate is not None}
    return {**found, **({"excess_asr": scores.asr.value - scores.floor.value}
                        if scores.floor else {})}
