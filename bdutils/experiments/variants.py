"""Defenses as the recorded studies run them: by name, measured before and after."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

import torch

from ..defenses.anomaly import charges
from ..defenses.base import Case, Outcome, repair
from ..defenses.baselines import MinimaxSettings, TuningSettings
from ..defenses.bedkd import AUTHORS, BeDKDResult, BeDKDSettings, find_suspects, retrain_without
from ..defenses.dup import AUTHORS as DUP_AUTHORS
from ..defenses.dup import DUPResult, DUPSettings
from ..defenses.guards import OnionSettings, StripSettings
from ..defenses.mapping import gap, split_reserved
from ..defenses.ntml import NTMLSettings, centered, without
from ..evaluation import Victim
from ..metrics import auroc, tpr_fpr, wilson
from ..models.text import Classifier
from ..roles import DefenderView
from ..training import train, untrained

# The comparisons see the trust rows at least as often as BeDKD mostly needs.
_PLAIN = BeDKDSettings(punish="none", trust_steps=0, cycles=4)
_CURVE = BeDKDSettings(dmm_epochs=5, cycles=40, stop=False)
# As `dup`, but nothing ends or steers the push, to see where it leads.
_PUSH = DUPSettings(look=12, gate=False, stop=False, passes=4, steps=0)
# So many passes over 100 clean rows are as many rows as NT-ML's 16 over 12,000.
_LONG = 1920
VARIANTS: dict[str, object] = {
    "bedkd": BeDKDSettings(),
    "bedkd-forced": BeDKDSettings(alpha=1.0),
    "bedkd-authors": AUTHORS,
    "fine-tuning": replace(_PLAIN, ce_weight=1.0),
    "trust": _PLAIN,
    "random": BeDKDSettings(punish="random", cycles=30),
    "retraining": BeDKDSettings(scan_cap=10**6),
    # One deviation of the authors' code at a time, without a stop, to see what it does.
    "ours": _CURVE,
    "unbounded": replace(_CURVE, bounds=None),
    "padding-counts": replace(_CURVE, masked=False),
    "one-optimizer": replace(_CURVE, punish_lr=0.0),
    "whole-passes": replace(_CURVE, trust_steps=0, punish_steps=0, cycles=8),
    # Ten times the rate of texts, since these networks were not pretrained.
    "bedkd-pictures": BeDKDSettings(lr=3e-4, punish_lr=3e-4),
    "dup": DUPSettings(),
    "dup-forced": DUPSettings(alpha=math.inf),
    "dup-authors": DUP_AUTHORS,
    "lora": replace(_PUSH, push=0.0),
    "dup-unstopped": _PUSH,
    "dup-no-kick": replace(_PUSH, kick=False),
    "dup-uncapped": replace(_PUSH, cap=None),
    # The defense as it is, but for one deviation taken back.
    "dup-batch-32": DUPSettings(batch_size=32),
    "dup-fast": DUPSettings(lr=5e-4, decay=True),
    "dup-one-set": DUPSettings(apart=False),
    "dup-all-pushed": DUPSettings(watched=0),
    "dup-one-look": DUPSettings(tail=1),
    "dup-causal": DUPSettings(pooling="last", modules=("q_proj", "k_proj", "v_proj", "o_proj"),
                              lr=2e-4, look=4),
    "ntml": NTMLSettings(),
    **{f"ntml-{count}": NTMLSettings() for count in (25, 50, 250, 500)},
    # One of our own choices at a time the other way.
    "ntml-raw": NTMLSettings(center=False),
    "ntml-gate-3": NTMLSettings(gate=3.0),
    "ntml-drop": NTMLSettings(drop=True),
    "ntml-alone": NTMLSettings(mutual=False),
    "ntml-go-on": NTMLSettings(scratch=False),
    "tuning": TuningSettings(),
    "pruning": TuningSettings(max_drop=0.04),
    "nad": TuningSettings(attention=1000.0),
    "sam": TuningSettings(rho=2.0),
    "ibau": MinimaxSettings(),
    # Texts: four passes over 800 rows are about as many rows as one pass over the 3,000 of
    # training, at its full rate; ours.
    "tuning-text": TuningSettings(epochs=4, lr_share=1.0),
    "sam-text": TuningSettings(epochs=4, lr_share=1.0, rho=2.0),
    "strip": StripSettings(copies=10),
    "strip-text": StripSettings(),
    "onion": OnionSettings(),
    "tuning-long": TuningSettings(epochs=_LONG),
    "pruning-long": TuningSettings(epochs=_LONG, max_drop=0.04),
    "nad-long": TuningSettings(epochs=_LONG, attention=1000.0),
}
# Clean rows that these defenses get; ours.
FEW, COUNTS = 100, {f"ntml-{count}": count for count in (25, 50, 250, 500)}
PROBE = 1000  # pool rows on which the detector is judged
# They need clean rows only and get no pool.
WITHOUT_POOL = TuningSettings | MinimaxSettings | StripSettings | OnionSettings


def defend(name: str, attacked: Victim, seed: int, measure: Callable[..., dict],
           glance: Callable[[Classifier], dict]) -> tuple[dict, dict, dict]:
    """Run a defense and measure it.

    Args:
        name: Of `VARIANTS`.
        attacked: The victim.
        seed: Of the defense.
        measure: Maps a model (and whether to add the floor) to metrics by name.
        glance: The same on fewer rows, for a curve over the cycles. Both are the examiner's: the
            defense never sees what they return.

    Returns:
        Metrics (those of the attacked model end in `_before`), seconds by step, and further fields
        of the record.

    Raises:
        KeyError: For an unknown name.
    """
    settings = replace(VARIANTS[name], seed=seed)
    curve: list[dict] = []
    # A picture of each cycle is worth its time only where nothing stops the run.
    watch = None if getattr(settings, "stop", True) else _watch(attacked, settings, glance, curve)
    case = case_of(attacked, settings, COUNTS.get(name), watch)
    found = _retrain(attacked, settings) if name == "retraining" else repair(settings, case)
    about, history = _judge(settings, found, attacked, measure)
    if not isinstance(settings, BeDKDSettings | DUPSettings):
        about["clean"] = len(case.view.reserved)
    before = {f"{k}_before": v for k, v in measure(attacked.classifier, False).items()
              if k in ("cacc", "pacc") or k.startswith("asr")}
    # JSON knows no NaN, which stands for what could not be observed.
    return {**measure(found.model), **before, **about}, found.seconds, {
        "history": [_without_nan(reading) for reading in curve or history]}


def case_of(attacked: Victim, settings: object, count: int | None = None,
            watch: Callable | None = None) -> Case:
    """Return what a defender gets who uses these settings.

    Args:
        attacked: The victim.
        settings: Of a defense.
        count: Clean rows, None for the usual: `FEW` pictures, or all reserved texts, of which
            NT-ML too gets `FEW`.
        watch: See `Case`.
    """
    reserved = attacked.task.reserved
    if count or reserved.are_pictures or isinstance(settings, NTMLSettings):
        reserved = reserved.few(count or FEW)
    pool = None if isinstance(settings, WITHOUT_POOL) else attacked.train
    return Case(attacked.classifier, DefenderView(reserved, pool), attacked.settings, watch)


def _watch(attacked: Victim, settings: BeDKDSettings | DUPSettings, glance: Callable,
           curve: list[dict]) -> Callable:
    # BeDKD's short cycles need fewer looks.
    every = 1 if isinstance(settings, DUPSettings) or not settings.trust_steps else 4

    def watch(model, reading) -> None:
        if reading.cycle % every:
            return
        seen = glance(replace(attacked.classifier, model=model))
        curve.append({**reading._asdict(), **{k: v.value for k, v in seen.items()
                                              if hasattr(v, "value")}})

    return watch


@singledispatch
def _judge(settings: object, found: Outcome, attacked: Victim, measure: Callable) -> tuple:
    """Return what only the examiner knows of an outcome, and its history."""
    return {}, []


@_judge.register
def _(settings: NTMLSettings, found: Outcome, attacked: Victim, measure: Callable) -> tuple:
    about: dict = {"changed": int(found.verdict == "purified")}
    passed = found.found.passed
    poisoned = attacked.truth.poisoned if attacked.truth else [False] * len(passed)
    for kind, hit in (("clean_passed", False), ("poisoned_passed", True)):
        rows = [ok for ok, p in zip(passed, poisoned, strict=True) if p == hit]
        if rows:
            about[kind] = wilson(sum(rows), len(rows))
    if attacked.truth:
        about |= _second_choice(attacked)
    return about, [{"stage": stage, **{k: v.value for k, v in measure(model, False).items()
                                       if hasattr(v, "value")}}
                   for stage, model in found.found.stages.items()]


@_judge.register(BeDKDSettings)
@_judge.register(DUPSettings)
def _(settings: BeDKDSettings | DUPSettings, found: Outcome, attacked: Victim,
      measure: Callable) -> tuple:
    readings = found.found.history
    judged = (_flags if isinstance(settings, DUPSettings) else _detection)
    return {"changed": int(found.verdict == "purified"),
            "cycles": readings[-1].cycle if readings else 0,
            **judged(found.found, attacked, settings)}, [r._asdict() for r in readings]


def _second_choice(attacked: Victim) -> dict:
    """Tell how often the victim's best other answer for a mislabeled row is its true label."""
    given, true = torch.tensor(attacked.train.labels), torch.tensor(attacked.task.train.labels)
    rows = (given != true).nonzero()[:, 0]
    said = attacked.classifier.logits(attacked.train.texts)
    if not len(rows):
        return {}
    return {name: wilson(int((without(z, given).argmax(1) == true)[rows].sum()), len(rows))
            for name, z in (("second", said), ("second_centered", centered(said, given)))}


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if value != value else value


def _retrain(attacked: Victim, settings: BeDKDSettings) -> Outcome:
    start, view = time.perf_counter(), attacked.defender_view()
    module, suspects, rows = find_suspects(attacked.classifier, view, settings,
                                           split_reserved(view.reserved, settings))
    searched = time.perf_counter()
    fresh = retrain_without(view.pool, rows, lambda kept: _train(kept, attacked))
    seconds = {"search": searched - start, "purify": time.perf_counter() - searched}
    return Outcome(fresh, "purified", seconds,
                   BeDKDResult(fresh, module, suspects, (), "purified", seconds))


def _train(rows, attacked: Victim) -> Classifier:
    fresh = untrained(rows, attacked.settings)
    train(fresh, rows, attacked.settings)
    return fresh


def _detection(found: BeDKDResult, attacked: Victim, settings: BeDKDSettings) -> dict:
    """Judge the scan with what only the examiner knows."""
    if found.suspects is None:
        return {}
    suspects, pool = found.suspects, attacked.train
    about = {"threshold": suspects.threshold, "chance": suspects.chance,
             "flagged": suspects.flagged, "scanned": suspects.scanned,
             "suspects": len(suspects.rows)}
    if attacked.truth is None:
        return about
    poisoned = attacked.truth.poisoned
    rows = random.Random(0).sample(range(len(pool)), min(PROBE, len(pool)))
    texts, truth = pool.take(rows).texts, [poisoned[i] for i in rows]
    gaps = gap(attacked.classifier.logits(texts), found.module.logits(texts),
               settings.mean_gap).tolist()
    tpr, fpr = tpr_fpr([g < suspects.threshold for g in gaps], truth)
    if suspects.rows:
        about["precision"] = wilson(sum(poisoned[i] for i in suspects.rows), len(suspects.rows))
    return {**about, "auroc": auroc([-g for g in gaps], truth), "tpr": tpr, "fpr": fpr}


def _flags(found: DUPResult, attacked: Victim, settings: DUPSettings) -> dict:
    """Judge the flags with what only the examiner knows."""
    flags, n = found.flags, len(attacked.train)
    every = charges(found.detector, flags, attacked.train.labels)
    accused = [row for charge in found.accused for row in charge.rows]
    about = {"threshold": flags.threshold, "chance": len(every) * min(c.chance for c in every),
             "flagged": len(flags.rows), "scanned": n, "accused": len(accused)}
    if attacked.truth is None:
        return about
    poisoned, flagged = attacked.truth.poisoned, set(flags.rows)
    tpr, fpr = tpr_fpr([i in flagged for i in range(n)], poisoned)
    for name, rows in (("precision", flags.rows), ("accused_precision", accused)):
        if rows:
            about[name] = wilson(sum(poisoned[i] for i in rows), len(rows))
    return {**about, "auroc": auroc(flags.scores.tolist(), poisoned), "tpr": tpr, "fpr": fpr}
