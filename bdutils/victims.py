"""Backdoored models on demand: poisoned, trained and measured once, then taken from the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from .assets import entry
from .attacks.text import (
    TRIGGERS,
    PoisonSettings,
    Trigger,
    Truth,
    poison,
    require_visible,
    triggered,
)
from .data import DefenderView, Task, TrainingSet
from .metrics import Rate, asr, cacc, pacc, ra
from .models import Classifier, encoder_source
from .training import TrainReport, TrainSettings, train

RECIPE = 1  # raise it when a change of code changes what the same settings train


@dataclass(frozen=True)
class Victim:
    """A trained model together with everything an examiner knows about it.

    Fields: classifier: the model; task: its data; train: what it was trained on, poisoned or
    not; truth: what the attacker did, None for a clean model; settings: of the training;
    report: losses and seconds of the training, whenever that was.
    """

    classifier: Classifier
    task: Task
    train: TrainingSet
    truth: Truth | None
    settings: TrainSettings
    report: TrainReport

    def defender_view(self, with_pool: bool = True) -> DefenderView:
        """Return the data that a defense may see.

        Args: with_pool: whether the defender has the (poisoned) training set.
        Source: ours.
        """
        return DefenderView(self.task.reserved, self.train if with_pool else None)


@dataclass(frozen=True)
class Scores:
    """What the examiner measures, each with n and 95 % interval.

    Fields: cacc, asr, ra, pacc: see `metrics`; floor, clean_pacc: ASR and PACC of a model that
    was never poisoned. What was not asked for is None.
    """

    cacc: Rate
    asr: Rate
    ra: Rate
    floor: Rate | None = None
    pacc: Rate | None = None
    clean_pacc: Rate | None = None


def victim(task: Task, attack: str | Trigger | None = "badnets", *,
           settings: TrainSettings | None = None, encoder: str | None = None,
           **poisoning) -> Victim:
    """Return a model trained on poisoned data, from the cache if it was trained before.

    Args:
        task: the data; its training role is poisoned.
        attack: name of a built-in trigger, any other trigger, or None for a clean model.
        settings: of the training; those of the scale in force if None.
        encoder: see `models.encoder_source`.
        poisoning: fields of `PoisonSettings`, such as poison_rate and target_label.
    Returns: the model in evaluation mode, with data and truth.
    Raises: ValueError for an unknown attack or settings that cannot be met.
    Source: Gu et al. 2017; training as in `training.train`.
    """
    settings = settings or TrainSettings.at()
    rows, truth = task.train, None
    if attack is not None:
        rows, truth = poison(task.train, _trigger(attack), PoisonSettings(**poisoning))
    elif poisoning:
        raise ValueError(f"a clean model (attack=None) takes no {sorted(poisoning)}")
    source = encoder_source(encoder)
    about = {"recipe": RECIPE, "encoder": _identity(source), "data": rows.fingerprint(),
             "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        fresh = untrained(rows.num_labels, settings, source)
        if truth is not None:
            require_visible(truth.trigger, task.train.texts[:200], fresh)
        report = train(fresh, rows, settings)
        fresh.save(folder)
        (folder / "training.json").write_text(json.dumps(asdict(report)), encoding="utf8")

    name = truth.trigger.name if truth else "clean"
    folder = entry(f"models/{task.name}-{name}-{digest}", build, about)
    report = TrainReport(**json.loads((folder / "training.json").read_text(encoding="utf8")))
    return Victim(Classifier.load(folder), task, rows, truth, settings, report)


def untrained(num_labels: int, settings: TrainSettings,
              source: str | None = None) -> Classifier:
    """Return an encoder, that of the scale if None, with a fresh head, as `settings` want it.

    Source: ours.
    """
    return Classifier.new(num_labels, source=source, dropout=settings.dropout,
                          seed=settings.seed, max_length=settings.max_length)


def evaluate(model: Classifier, task: Task, trigger: str | Trigger, target_label: int = 1,
             clean_model: Classifier | None = None, every_class: bool = False) -> Scores:
    """Measure a model on the test role, beside a model that was never poisoned.

    Args: model: to be measured; task: whose test set; trigger, target_label: of the attack;
        clean_model: gives the floor of the ASR and the PACC to aim at; every_class: mark rows
        of the target class too, which PACC needs.
    Source: definitions in `metrics`.
    """
    marked = triggered(task.test, _trigger(trigger), target_label, every_class=every_class)
    labels, guesses = marked.labels, model.predict(marked.texts)
    clean = clean_model.predict(marked.texts) if clean_model else None
    return Scores(
        cacc(model.predict(task.test.texts), task.test.labels),
        asr(guesses, labels, target_label), ra(guesses, labels, target_label),
        asr(clean, labels, target_label) if clean else None,
        pacc(guesses, labels) if every_class else None,
        pacc(clean, labels) if clean and every_class else None)


def _trigger(attack: str | Trigger) -> Trigger:
    if not isinstance(attack, str):
        return attack
    if attack not in TRIGGERS:
        raise ValueError(f"unknown attack {attack!r}: use one of {sorted(TRIGGERS)}, or a "
                         "trigger object")
    return TRIGGERS[attack]


@cache
def _identity(source: str) -> str:
    """Name an encoder by the checksum of its weights, or by its hub id."""
    manifest = Path(source) / "manifest.json"
    if not manifest.is_file():
        return source
    return json.loads(manifest.read_text(encoding="utf8"))["sha256"]["model.safetensors"]

