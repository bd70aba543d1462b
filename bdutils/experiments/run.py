"""How one run of a study is made: train, attack, defend, measure, and describe it in a record."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import torch

from .. import scale
from ..attacks.base import Trigger
from ..attacks.text import ParaphraseTable, paraphrases_from
from ..data import IMAGE_SETS, IMAGE_SIZES, load_task
from ..defenses.base import Predictor, clone
from ..defenses.finetune import TuneConfig, tuning_config
from ..evaluation import Scores, Victim, evaluate, victim
from ..metrics import Rate, cacc, rejected
from ..roles import Task, TestSet, stratified_subset
from ..training import Model, train, training_for
from . import results
from .attackers import ATTACKERS, DecoyTrigger, SeveralTriggers, hide
from .studies import ON_CLEAN, Run
from .variants import COUNTS, VARIANTS, defend

IMAGE_TARGET = 0  # Wu et al. 2022; texts have 1 (Cui et al. 2022)
# One epoch over the larger sets is as many steps as two over the small one.
EPOCHS = {"sst2": 1, "ag_news": 1}
# Two sets are cut to what a CPU trains in minutes; their published test sets are thinned likewise.
SIZES: dict[str, dict[str, int | None]] = {
    "sst2": {"train": None, "test": None}, "ag_news": {"train": 6000, "test": 2000},
    "cifar10": {"train": 20000, "test": 5000}}
# Ours: a tenth of the epochs of Wu et al. 2022 at ten times their rate, minutes on one GPU.
FULL_TRAINING: dict[str, dict] = {"cifar10": {"epochs": 10, "lr": 0.1}}
# The decoder is six times larger than the encoder: fewer samples, seen oftener, and a usual rate.
CAUSAL_SIZES: dict[str, int | None] = {"train": 600, "test": 400}
CAUSAL_TRAINING = {"lr": 5e-5, "epochs": 4}
BENCHMARK_ATTACKS = {"stylebkd": "style_bible", "synbkd": "syntactic_scpn"}
# Triggered samples of a lesson, beside clean ones; ours.
DOSES, PLAIN = (0, 1, 5, 20, 50), 100
LESSON = TuneConfig(epochs=4, lr_share=0.2)
Measure = Callable[..., dict[str, Rate | float]]


def make_record(study: str, run: Run, benchmark: Path | None = None) -> dict:
    """Train, measure and describe one run.

    Args:
        study: Its name.
        run: The cell.
        benchmark: Folder with the files `TASK.parquet` and, if rewriting attacks shall use real
            paraphrases, `TASK_paraphrases.parquet`.

    Returns:
        The record, not yet saved.
    """
    clean, attacked, target = _trained(run, benchmark)
    measure = _measure(clean, attacked, target)
    if study == "relearning":
        measure = with_relearning(measure, attacked, target, None if run.defense else clean)
    if study == "references":
        measure = on_every_attack(run, clean, benchmark)
    extra: dict = {}
    if run.defense:
        metrics, seconds, extra = defend(run.defense, attacked, run.seed, measure,
                                         _quick_eval(attacked, target))
    else:
        start = time.perf_counter()
        metrics = measure(attacked.classifier)
        seconds = {"training": attacked.report.seconds, "measuring": time.perf_counter() - start}
    scaled = "BDUTILS_SCALE=full " if scale() == "full" else ""
    where = " --benchmark FOLDER" if benchmark else ""
    return results.record(
        study=study, name=run.name, method=run.attack or "clean", task=clean.task.name,
        scale=scale(), data=clean.task.fingerprint(), seed=run.seed, metrics=metrics,
        settings=_settings(run, attacked, target), seconds=seconds, **extra,
        command=f"{scaled}python -m bdutils.sweep {study} --only {run.name}{where}")


def _settings(run: Run, attacked: Victim, target: int) -> dict:
    """Describe what was done, as a record has it."""
    found = {"poison_rate": run.poison_rate, "label_mode": run.label_mode, "target_label": target,
             "trigger": repr(attacked.record.trigger) if attacked.record else None,
             **asdict(attacked.training)}
    if run.encoder:
        found["encoder"] = run.encoder
    if run.defense:
        found |= {"defense": run.defense, "defense_settings": asdict(VARIANTS[run.defense])}
    return found


def _measure(clean: Victim, attacked: Victim, target: int) -> Measure:
    """Return a function that maps a model to what a record holds of it."""
    task = clean.task
    trigger = attacked.record.trigger if attacked.record else None

    def measure(model: Predictor, with_floor: bool = True) -> dict[str, Rate | float]:
        if trigger is None:
            return _without_trigger(model, task.test)
        # A table of real paraphrases has no test samples of the target class, which PACC needs.
        scores = evaluate(model, task, trigger, target, clean.classifier if with_floor else None,
                          every_class=not isinstance(trigger, ParaphraseTable))
        return _metrics(scores) | {f"asr_{name}": evaluate(model, task, part, label).asr
                                   for name, part, label in _further(trigger, target)}

    return measure


def on_every_attack(run: Run, clean: Victim, benchmark: Path | None = None) -> Measure:
    """Return a measure of a model that was never attacked: its floor and PACC for each attack."""
    made = {like.attack: _trained(replace(like, seed=run.seed), benchmark)[1:]
            for like in ON_CLEAN[run.task]}
    records = [(name, attacked.record, target) for name, (attacked, target) in made.items()]

    def measure(model: Predictor, with_floor: bool = True) -> dict[str, Rate | float]:
        found = _without_trigger(model, clean.task.test)
        for name, record, target in records:
            if record is not None:
                scores = evaluate(model, clean.task, record.trigger, target, every_class=True)
                found |= {f"{key}_{name}": rate for key, rate in _metrics(scores).items()
                          if key in ("asr", "pacc")}
        return found
    return measure


def _quick_eval(attacked: Victim, target: int) -> Measure:
    """Return the same on fewer samples, for a curve over the cycles of a defense."""
    test, record = attacked.task.test, attacked.record
    fewer = replace(attacked.task, test=test.take(range(0, len(test), max(1, len(test) // 400))))

    def quick_eval(model: Predictor) -> dict[str, Rate | float]:
        if record is None:
            return {}
        return _metrics(evaluate(model, fewer, record.trigger, target, every_class=True))

    return quick_eval


def relearned(model: Model, attacked: Victim, target: int) -> dict[str, Rate]:
    """Fine-tune copies of a model with a few triggered samples: how soon is the backdoor back?

    The samples are the attacker's: of the training set, none of them poisoned before.

    Args:
        model: Repaired, or never poisoned.
        attacked: The victim, whose trigger it is.
        target: Label of the attack.

    Returns:
        The ASR after each of the `DOSES`, by the name `asr_after_DOSE`.

    Raises:
        ValueError: If there are too few samples, or the model was never attacked.
    """
    if attacked.record is None:
        raise ValueError("a clean model has no trigger to learn again: give an attacked one")
    train_set, trigger, found = attacked.task.train, attacked.record.trigger, {}
    free = [i for i, poisoned in enumerate(attacked.record.poisoned) if not poisoned]
    random.Random(attacked.training.seed).shuffle(free)
    plain = stratified_subset(free, train_set.labels, PLAIN, train_set.num_labels)
    others = [i for i in free if train_set.labels[i] != target and i not in set(plain)]
    if len(others) < max(DOSES):
        raise ValueError(f"a lesson of {max(DOSES)} triggered samples beside {PLAIN} clean ones "
                         f"needs more than the {len(free)} samples that were not poisoned")
    for dose in DOSES:
        lesson = train_set.take([*others[:dose], *plain])
        if dose:
            inputs = trigger.apply(train_set.take(others[:dose]).inputs,
                                   torch.Generator().manual_seed(2))
            lesson = lesson.changed(range(dose), inputs, target)
        student = clone(model)
        train(student, lesson, tuning_config(attacked.training, LESSON, seed=0))
        found[f"asr_after_{dose}"] = evaluate(student, attacked.task, trigger, target).asr
    return found


def with_relearning(measure: Measure, attacked: Victim, target: int,
                    clean: Victim | None) -> Measure:
    """Return a measure that teaches the trigger again as well; to a given clean model too."""
    def further(model: Model, with_floor: bool = True) -> dict[str, Rate | float]:
        if not with_floor:  # the model before the defense
            return measure(model, with_floor)
        floors = relearned(clean.classifier, attacked, target) if clean else {}
        return {**measure(model), **relearned(model, attacked, target),
                **{name.replace("asr", "floor"): rate for name, rate in floors.items()}}

    return further


def _trained(run: Run, benchmark: Path | None) -> tuple[Victim, Victim, int]:
    """Return the clean model of a run, the attacked one, and the target label."""
    small = scale() == "small"
    changes = ({"epochs": EPOCHS[run.task]} if run.task in EPOCHS and small else
               {} if small else FULL_TRAINING.get(run.task, {}))
    if run.encoder == "causal":
        changes = CAUSAL_TRAINING
    task = _task(run.task, benchmark, tuple(sizes_of(run, small).items()), scale())
    training = training_for(task, seed=run.seed, **changes)
    target = IMAGE_TARGET if task.train.are_images else 1
    options: dict = {"training": training, "encoder": run.encoder}
    if not run.attack:
        clean = victim(task, None, **options)
        return clean, clean, target
    # The attacked one first: whoever else wants the clean one may be training it meanwhile.
    attacked = victim(task, _attack(run, benchmark), poison_rate=run.poison_rate,
                      label_mode=run.label_mode, seed=run.seed, target_label=target, **options)
    if run.attack == "hidden":
        attacked = hide(attacked)
    return victim(task, None, **options), attacked, target


def sizes_of(run: Run, small: bool) -> dict[str, int | None]:
    """Return the samples of each role that a run has not as usual.

    Args:
        run: The cell.
        small: Whether this is the scale `small`.
    """
    if run.encoder == "causal":
        return CAUSAL_SIZES
    sizes = dict(SIZES.get(run.task, {})) if small else {}
    clean = COUNTS.get(run.defense, 0)
    # Who holds more images than there usually are meets another split, and so another victim.
    if run.task == "images" and clean > (IMAGE_SIZES["small"]["clean"] or clean):
        sizes["clean"] = clean
    return sizes


@lru_cache(maxsize=2)  # runs of a study follow each other, and nobody changes a task
def _task(name: str, benchmark: Path | None, sizes: tuple, at: str) -> Task:
    if name in IMAGE_SETS:  # two files, so that their folder is named
        return load_task(name, scale=at, sizes=dict(sizes), folder=benchmark)
    file = benchmark / f"{name}.parquet" if benchmark else None
    return load_task(str(file or name), scale=at, sizes=dict(sizes))


def _attack(run: Run, benchmark: Path | None) -> str | Trigger:
    table = benchmark / f"{run.task}_paraphrases.parquet" if benchmark else None
    if table and table.is_file() and run.attack in BENCHMARK_ATTACKS:
        return paraphrases_from(str(table), BENCHMARK_ATTACKS[run.attack])
    attack = run.attack or ""
    return "badnets" if attack == "hidden" else ATTACKERS.get(attack, attack)


def _further(trigger: Trigger, target: int) -> list[tuple[str, Trigger, int]]:
    """List what else an attacker may be after: names, triggers, labels."""
    if isinstance(trigger, SeveralTriggers):
        return [(part.name, part, target) for part in trigger.parts]
    return [("decoy", trigger, trigger.decoy)] if isinstance(trigger, DecoyTrigger) else []


def _without_trigger(model: Predictor, test: TestSet) -> dict[str, Rate | float]:
    predicted = model.predict(test.inputs)
    found: dict[str, Rate | float] = {"cacc": cacc(predicted, test.labels)}
    if getattr(model, "rejects", False):
        found["rejected_clean"] = rejected(predicted)
    return found


def _metrics(scores: Scores) -> dict[str, Rate | float]:
    found: dict[str, Rate | float] = {
        name: rate for name, rate in vars(scores).items() if rate is not None}
    return found | ({"excess_asr": scores.asr.value - scores.floor.value} if scores.floor else {})
