"""Backdoored models on demand: poisoned, trained and measured once, then taken from the cache.

Texts and images go the same way; what differs is said in `training_for` and `untrained`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import scale
from .assets import cache_dir, sha256_of
from .attacks.base import PoisonConfig, PoisonRecord, Trigger, triggered
from .attacks.image import IMAGE_TRIGGERS
from .attacks.text import TEXT_TRIGGERS, require_visible
from .defenses.base import Callback, Context, Predictor, ignore
from .distributed import entry_together
from .metrics import HIGH_FLOOR, Rate, asr, cacc, pacc, ra, rejected, shows_backdoor
from .models.adopt import check_classes
from .models.image import ImageClassifier
from .models.text import Classifier, encoder_source
from .roles import Examples, Task, TrainSet
from .training import Model, Training, TrainReport, train, training_for, untrained

RECIPE = 1  # raise it when a change of code changes what the same training makes


@dataclass(frozen=True)
class Victim:
    """A trained model together with everything an evaluator knows about it."""

    classifier: Model
    """The model."""
    task: Task
    """Its data."""
    train: TrainSet
    """What it was trained on, poisoned or not."""
    record: PoisonRecord | None
    """What the attacker did, None for a clean model."""
    training: Training
    """How it was trained."""
    report: TrainReport
    """Losses and seconds of the training, whenever that was."""

    def context(self, *, train: bool = True, clean: int | None = None,
                callback: Callback = ignore) -> Context:
        """Return what a defender gets of this victim.

        Args:
            train: Whether they have the (poisoned) training set.
            clean: How many clean samples, as many of each class; all if None.
            callback: See `Context`.
        """
        return Context(self.classifier,
                       self.task.clean if clean is None else self.task.clean.stratified(clean),
                       self.train if train else None,  # type: ignore[arg-type]
                       self.training, callback)


@dataclass(frozen=True)
class Scores:
    """What the evaluator measures, each with n and 95% interval.

    What was not asked for is None.
    """

    cacc: Rate
    """See `metrics`."""
    asr: Rate
    """See `metrics`."""
    ra: Rate
    """See `metrics`."""
    floor: Rate | None = None
    """ASR of a model that was never poisoned."""
    pacc: Rate | None = None
    """See `metrics`."""
    clean_pacc: Rate | None = None
    """PACC of a model that was never poisoned."""
    rejected: Rate | None = None
    """Share of the samples that the ASR counts which an input filter rejects."""
    rejected_clean: Rate | None = None
    """Share of the samples that CACC counts which an input filter rejects."""

    @property
    def is_backdoor(self) -> bool | None:
        """Whether the ASR shows a backdoor; None without a floor. See `metrics.shows_backdoor`."""
        return shows_backdoor(self.asr.value, self.floor.value) if self.floor else None


def trigger_for(attack: str | Trigger, samples: Examples) -> Trigger:
    """Return a trigger that is meant for some samples.

    Args:
        attack: Name of a built-in trigger, or any other trigger.
        samples: That shall get it.

    Raises:
        ValueError: For an unknown name, and for what is no trigger, or none for these samples.
    """
    kind, base = ("images", "ImageTrigger") if samples.are_images else ("texts", "TextTrigger")
    known: Mapping[str, Trigger] = IMAGE_TRIGGERS if samples.are_images else TEXT_TRIGGERS
    if isinstance(attack, str):
        if attack not in known:
            raise ValueError(f"unknown attack {attack!r} on {kind}: use one of {sorted(known)}, "
                             "or a trigger object")
        return known[attack]
    if inspect.isclass(attack):
        raise ValueError(f"{attack.__name__} is a class: give an object of it, as in "
                         f"{attack.__name__}()")
    what, name = type(attack).__name__, getattr(attack, "name", None)
    # Not by its class: in chapter 3 that is the page's own, and not the one of the package.
    if getattr(attack, "for_images", None) is not samples.are_images:
        raise ValueError(f"{what} is no trigger for {kind}: give an object of a class below "
                         f"{base}, or one of {sorted(known)}")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the trigger {what} has the name {name!r}: give it a text as `name`")
    return attack


def victim(task: Task, attack: str | Trigger | None = "badnets", *,
           training: Training | None = None,
           encoder: str | None = None, **poisoning: Any) -> Victim:
    """Return a model trained on poisoned data, from the cache if it was trained before.

    Args:
        task: The data; its training set is poisoned.
        attack: Name of a built-in trigger, any other trigger, or None for a clean model.
        training: How it is trained; as usual at the scale in force if None.
        encoder: See `models.text.encoder_source`; images have none.
        **poisoning: Fields of `PoisonConfig`, such as poison_rate and target_label.

    Returns:
        The model in evaluation mode, with its data and what the attacker did.

    Raises:
        ValueError: For an unknown attack or encoder, or a config that cannot be met.

    Source: Gu et al. 2017; training as in `training.train`.
    """
    if task.train.are_images and encoder is not None:
        raise ValueError(f"the networks for images have no encoder: leave {encoder!r} out")
    if attack is None and poisoning:
        raise ValueError(f"a clean model (attack=None) takes no {sorted(poisoning)}")
    training = training or training_for(task)
    data, record = task.train, None
    if attack is not None:
        config = PoisonConfig(**poisoning)
        trigger = trigger_for(attack, data).prepare(data, config.target_label)
        data, record = trigger.poison(data, config)
    source = scale() if data.are_images else encoder_source(encoder)
    folder = _trained(task, data, record, training, source)
    report = TrainReport(**json.loads((folder / "training.json").read_text(encoding="utf8")))
    report = replace(report, losses=tuple(report.losses))
    model = (ImageClassifier if data.are_images else Classifier).load(folder)
    if isinstance(model, Classifier):
        model.source = source
    return Victim(model, task, data, record, training, report)


def _trained(task: Task, data: TrainSet, record: PoisonRecord | None, training: Training,
             source: str) -> Path:
    """Return the folder of a trained model, which is a cache entry."""
    about = {"recipe": RECIPE, "encoder": source if data.are_images else _identity(source),
             "data": data.fingerprint(), "settings": asdict(training)}
    attack = short_name(record.trigger.name) if record else "clean"
    name = f"{short_name(task.name)}-{attack}-{_digest(about)}"
    # At `small` a training takes a few minutes: it starts anew.
    kept = cache_dir() / f"unfinished/{name}.safetensors" if scale() == "full" else None

    def build(folder: Path) -> None:
        model = untrained(data, training, source)
        if record is not None and isinstance(model, Classifier):
            require_visible(record.trigger, task.train.inputs[:200], model)
        report = train(model, data, training, checkpoint=kept)
        model.save(folder)
        (folder / "training.json").write_text(json.dumps(asdict(report)), encoding="utf8")

    folder = entry_together(f"models/{name}", build, about)
    if kept:
        kept.unlink(missing_ok=True)
    return folder


def evaluate(model: Predictor, task: Task, trigger: str | Trigger, target_label: int = 1,
             clean_model: Predictor | None = None, every_class: bool = False) -> Scores:
    """Measure a model on the test set, beside a model that was never poisoned.

    It warns if the floor is so high that no ASR shows a backdoor.

    Args:
        model: To be measured.
        task: Whose test set.
        trigger, target_label: Of the attack.
        clean_model: Gives the floor of the ASR and the PACC to aim at.
        every_class: Put the trigger into samples of the target class too, which PACC needs.

    Raises:
        ValueError: For an unknown attack, or a model of other classes.

    Source: definitions in `metrics`.
    """
    check_classes(model, task.test.label_names)
    trigger = trigger_for(trigger, task.train).prepare(task.train, target_label)
    attacked = triggered(task.test, trigger, target_label, every_class=every_class)
    labels, predicted = attacked.labels, model.predict(attacked.inputs)
    floor = clean_model.predict(attacked.inputs) if clean_model else None
    on_clean = model.predict(task.test.inputs)
    filters = getattr(model, "rejects", False)
    scores = Scores(
        cacc(on_clean, task.test.labels),
        asr(predicted, labels, target_label), ra(predicted, labels, target_label),
        asr(floor, labels, target_label) if floor else None,
        pacc(predicted, labels) if every_class else None,
        pacc(floor, labels) if floor and every_class else None,
        rejected([p for p, y in zip(predicted, labels, strict=True) if y != target_label])
        if filters else None,
        rejected(on_clean) if filters else None)
    if scores.floor and scores.floor.value > HIGH_FLOOR:
        warnings.warn(f"the trigger {trigger.name!r} fools a model that was never poisoned on "
                      f"{scores.floor.value:.0%} of the samples: an ASR with it is no evidence of "
                      "a backdoor",
                      stacklevel=2)
    return scores


def short_name(name: str) -> str:
    """Return a name as a part of a file's name: short, and without signs that have a meaning.

    Args:
        name: Of a trigger or a task.
    """
    kept = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return kept[:40] or "own"


def _digest(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _identity(source: str) -> str:
    """Name an encoder by the checksum of its weights, or by its hub id."""
    folder = Path(source)
    manifest = folder / "manifest.json"
    if manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf8"))["sha256"]["model.safetensors"]
    if not folder.is_dir():
        return source
    # A reader's own folder may change: its content counts, not its place.
    files = [path for path in sorted(folder.iterdir())
             if path.suffix in (".safetensors", ".json", ".txt", ".model")]
    return _digest({path.name: sha256_of(path) for path in files})
