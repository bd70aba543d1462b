"""Backdoored models on demand: poisoned, trained and measured once, then taken from the cache.

Texts and pictures take the same way; what differs is said in `settings_for` and `untrained`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

from . import scale
from .assets import cache_dir, entry, sha256_of
from .attacks.checks import answering_for, checked_trigger, short_name
from .attacks.images import PictureTrigger, learned
from .attacks.text import (
    PoisonSettings,
    Trigger,
    Truth,
    poison,
    require_visible,
    triggered,
)
from .distributed import entry_together
from .metrics import Rate, asr, cacc, pacc, ra, refused
from .models.adopt import check_classes
from .models.image import PictureClassifier, write_weights
from .models.text import Classifier, encoder_source
from .roles import DefenderView, Task, TrainingSet
from .training import (
    PictureSettings,
    TrainReport,
    TrainSettings,
    settings_for,
    train,
    untrained,
)

RECIPE = 1  # raise it when a change of code changes what the same settings train


@dataclass(frozen=True)
class Victim:
    """A trained model together with everything an examiner knows about it."""

    classifier: Classifier | PictureClassifier
    """The model."""
    task: Task
    """Its data."""
    train: TrainingSet
    """What it was trained on, poisoned or not."""
    truth: Truth | None
    """What the attacker did, None for a clean model."""
    settings: TrainSettings | PictureSettings
    """Of the training."""
    report: TrainReport
    """Losses and seconds of the training, whenever that was."""

    def defender_view(self, with_pool: bool = True) -> DefenderView:
        """Return the data that a defense may see.

        Args:
            with_pool: Whether the defender has the (poisoned) training set.
        """
        return DefenderView(self.task.reserved, self.train if with_pool else None)


@dataclass(frozen=True)
class Scores:
    """What the examiner measures, each with n and 95 % interval.

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
    refused: Rate | None = None
    """Share of the rows that the ASR counts to which a guard gave no answer."""
    refused_clean: Rate | None = None
    """Share of the rows that CACC counts to which a guard gave no answer."""


def victim(task: Task, attack: str | Trigger | None = "badnets", *,
           settings: TrainSettings | PictureSettings | None = None,
           encoder: str | None = None, **poisoning) -> Victim:
    """Return a model trained on poisoned data, from the cache if it was trained before.

    Args:
        task: The data; its training role is poisoned.
        attack: Name of a built-in trigger, any other trigger, or None for a clean model.
        settings: Of the training; those of the scale in force if None.
        encoder: See `models.text.encoder_source`; pictures have none.
        **poisoning: Fields of `PoisonSettings`, such as poison_rate and target_label.

    Returns:
        The model in evaluation mode, with data and truth.

    Raises:
        ValueError: For an unknown attack or encoder, or settings that cannot be met.

    Source: Gu et al. 2017; training as in `training.train`.
    """
    if task.train.are_pictures and encoder is not None:
        raise ValueError(f"the networks for images have no encoder: leave {encoder!r} out")
    settings = settings or settings_for(task)
    rows, truth = task.train, None
    if attack is not None:
        rows, truth = _poisoned(task.train, attack, PoisonSettings(**poisoning))
    elif poisoning:
        raise ValueError(f"a clean model (attack=None) takes no {sorted(poisoning)}")
    source = scale() if rows.are_pictures else encoder_source(encoder)
    about = {"recipe": RECIPE, "encoder": source if rows.are_pictures else _identity(source),
             "data": rows.fingerprint(), "settings": asdict(settings)}
    attacked = short_name(truth.trigger.name) if truth else "clean"
    name = f"{short_name(task.name)}-{attacked}-{_digest(about)}"
    # At `small` a training takes a few minutes: it starts anew.
    kept = cache_dir() / f"unfinished/{name}.safetensors" if scale() == "full" else None

    def build(folder: Path) -> None:
        fresh = untrained(rows, settings, source)
        if truth is not None and not rows.are_pictures:
            require_visible(truth.trigger, task.train.texts[:200], fresh)
        report = train(fresh, rows, settings, checkpoint=kept)
        fresh.save(folder)
        (folder / "training.json").write_text(json.dumps(asdict(report)), encoding="utf8")

    folder = entry_together(f"models/{name}", build, about)
    if kept:
        kept.unlink(missing_ok=True)
    report = TrainReport(**json.loads((folder / "training.json").read_text(encoding="utf8")))
    kind = PictureClassifier if rows.are_pictures else Classifier
    model = kind.load(folder)
    if isinstance(model, Classifier):
        model.source = source
    return Victim(model, task, rows, truth, settings, report)


def _poisoned(train: TrainingSet, attack: str | Trigger | PictureTrigger,
              settings: PoisonSettings) -> tuple[TrainingSet, Truth]:
    if not train.are_pictures:
        trigger = checked_trigger(attack, train)
        with answering_for(trigger, train.texts, settings.seed):
            return poison(train, trigger, settings)
    return armed(attack, train, settings.target_label).poison(train, settings)


def armed(attack: str | PictureTrigger, train: TrainingSet, target_label: int) -> PictureTrigger:
    """Return a trigger for pictures; one that must be learned comes with its networks.

    Args:
        attack: Name or trigger.
        train: Clean rows.
        target_label: Of the attack.

    Raises:
        ValueError: For an unknown attack.
    """
    trigger = checked_trigger(attack, train)
    if not hasattr(trigger, "teach") or trigger.nets is not None:
        return trigger
    about = {"recipe": RECIPE, "trigger": repr(trigger), "data": train.fingerprint(),
             "target_label": target_label, "network": scale()}
    name = f"triggers/{short_name(trigger.name)}-{_digest(about)}"
    folder = entry(name, lambda folder: write_weights(
        learned(trigger, train, target_label).nets, folder / "nets.safetensors"), about)
    return learned(trigger, train, target_label, load_file(folder / "nets.safetensors"))


def evaluate(model: Classifier, task: Task, trigger: str | Trigger | PictureTrigger,
             target_label: int = 1, clean_model: Classifier | None = None,
             every_class: bool = False) -> Scores:
    """Measure a model on the test role, beside a model that was never poisoned.

    Args:
        model: To be measured.
        task: Whose test set.
        trigger, target_label: Of the attack.
        clean_model: Gives the floor of the ASR and the PACC to aim at.
        every_class: Mark rows of the target class too, which PACC needs.

    Raises:
        ValueError: For an unknown attack, or a model of other classes.

    Source: definitions in `metrics`.
    """
    check_classes(model, task.test.label_names)
    trigger = (armed(trigger, task.train, target_label) if task.train.are_pictures
               else checked_trigger(trigger, task.train))
    with answering_for(trigger, task.test.texts, 1):
        marked = triggered(task.test, trigger, target_label, every_class=every_class)
    labels, guesses = marked.labels, model.predict(marked.texts)
    clean = clean_model.predict(marked.texts) if clean_model else None
    unmarked, guard = model.predict(task.test.texts), getattr(model, "refuses", False)
    return Scores(
        cacc(unmarked, task.test.labels),
        asr(guesses, labels, target_label), ra(guesses, labels, target_label),
        asr(clean, labels, target_label) if clean else None,
        pacc(guesses, labels) if every_class else None,
        pacc(clean, labels) if clean and every_class else None,
        refused([p for p, y in zip(guesses, labels, strict=True) if y != target_label])
        if guard else None,
        refused(unmarked) if guard else None)


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
