"""Defenses as the recorded studies run them: by name, measured before and after."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..defenses.abl import ABL
from ..defenses.ac import ActivationClustering
from ..defenses.base import Context, EpochLog, Outcome, ignore
from ..defenses.bedkd import AUTHORS, BeDKD, find_suspects
from ..defenses.clp import CLP
from ..defenses.cube import CUBE
from ..defenses.detector import evidence_by_class
from ..defenses.dup import AUTHORS as DUP_AUTHORS
from ..defenses.dup import DUP, search, suspects_of
from ..defenses.fineprune import FinePruning
from ..defenses.finetune import FineTuning, FineTuningSweep, TuneConfig
from ..defenses.ft_sam import FTSAM
from ..defenses.ibau import IBAU
from ..defenses.mapping import gap
from ..defenses.nad import NAD
from ..defenses.ntml import NTML, centered, without
from ..defenses.onion import ONION
from ..defenses.retrain import retrained
from ..defenses.spectral import SpectralSignatures
from ..defenses.strip import STRIP
from ..evaluation import Victim
from ..metrics import Rate, auroc, tpr_fpr, wilson
from ..training import Model


def changed(config: Any, **changes: Any) -> Any:
    """Return a configuration with some fields changed, those of its parts too.

    Args:
        config: A frozen dataclass of configurations.
        **changes: Values by field; `part__field` is a field of a part.
    """
    for place, value in changes.items():
        name, _, inner = place.partition("__")
        config = replace(config, **{
            name: changed(getattr(config, name), **{inner: value}) if inner else value})
    return config


# The comparisons see the clean samples at least as often as BeDKD mostly needs.
_PLAIN = BeDKD(punish="none", trust_steps=0, cycles=4)
_CURVE = changed(BeDKD(cycles=40, stop=False), module__epochs=5)
# As `dup`, but nothing ends or steers the unlearning, to see where it leads.
_FREE = changed(DUP(), unlearning__match=False, stopping__eval_every=12, stopping__stop=False,
                unlearning__epochs=4, unlearning__min_steps=0)
_TEXT = TuneConfig(epochs=4, lr_share=1.0)
# As many samples as NT-ML's 16 epochs over 12,000, before its new labels.
_LONG = TuneConfig(epochs=1920)
VARIANTS: dict[str, Any] = {  # a registered class each
    "bedkd": BeDKD(),
    "bedkd-forced": changed(BeDKD(), scan__alpha=1.0),
    "bedkd-authors": AUTHORS,
    "fine-tuning": changed(_PLAIN, loss__ce_weight=1.0),
    "trust": _PLAIN,
    "random": BeDKD(punish="random", cycles=30),
    "retraining": changed(BeDKD(), scan__max_flagged=10**6),
    # One deviation of the authors' code at a time, without a stop, to see what it does.
    "ours": _CURVE,
    "unbounded": changed(_CURVE, loss__bounds=None),
    "padding-counts": changed(_CURVE, loss__masked=False),
    "one-optimizer": replace(_CURVE, punish_lr=0.0),
    "whole-epochs": replace(_CURVE, trust_steps=0, punish_steps=0, cycles=8),
    # Ten times the rate of texts, since these networks were not pretrained.
    "bedkd-images": BeDKD(lr=3e-4, punish_lr=3e-4),
    "dup": DUP(),
    "dup-forced": DUP(alpha=math.inf),
    "dup-retraining": DUP(),
    "dup-authors": DUP_AUTHORS,
    "lora": changed(_FREE, unlearning__weight=0.0),
    "dup-unstopped": _FREE,
    "dup-no-unlikelihood": changed(_FREE, unlearning__unlikelihood=False),
    "dup-uncapped": changed(_FREE, unlearning__cap=None),
    # The defense as it is, but for one deviation taken back.
    "dup-batch-32": changed(DUP(), unlearning__batch_size=32),
    "dup-fast": changed(DUP(), unlearning__lr=5e-4, unlearning__decay=True),
    "dup-one-set": DUP(disjoint=False),
    "dup-all-unlearned": DUP(monitored=0),
    "dup-causal": changed(DUP(), detector__pooling="last", unlearning__lr=2e-4,
                          adapter__modules=("q_proj", "k_proj", "v_proj", "o_proj"),
                          stopping__eval_every=4),
    "ntml": NTML(),
    # One of our own choices at a time the other way.
    "ntml-raw": changed(NTML(), pair__center=False),
    "ntml-gate-3": NTML(gate=3.0),
    "ntml-drop": NTML(self_share=0.0),
    "ntml-alone": NTML(mutual=False),
    "ntml-go-on": NTML(scratch=False),
    "ntml-global": changed(NTML(), judge__form="global"),
    # The form of the first records: every class is judged, and rejected samples are relabeled.
    "ntml-relabel": changed(NTML(drop=False, self_share=0.0), judge__form="global"),
    "ft": FineTuning(),
    "fp": FinePruning(),
    "nad": NAD(),
    "ft_sam": FTSAM(),
    "ibau": IBAU(),
    # Texts: four epochs over 800 samples are about as many samples as one over the 3,000 of
    # training, at its full rate; ours.
    "ft-text": FineTuning(_TEXT),
    "ft_sam-text": FTSAM(_TEXT),
    "strip": STRIP(copies=10),
    "strip-text": STRIP(),
    "onion": ONION(),
    "spectral": SpectralSignatures(),
    "ac": ActivationClustering(),
    "abl": ABL(),
    "cube": CUBE(),
    "clp": CLP(),
    "ft_sweep": FineTuningSweep(),
    "ft_sweep-text": FineTuningSweep(_TEXT),
    "ft-long": FineTuning(_LONG),
    "fp-long": FinePruning(_LONG),
    "nad-long": NAD(_LONG),
    # Are more clean images better, or are they more steps? As few steps as with 100 images, and
    # as many as with 2,500.
    "ft-brief": FineTuning(TuneConfig(epochs=3)),
    "ft-steps": FineTuning(TuneConfig(epochs=988)),
    # And is it the given network that they repair, or do they train a new one? See `defend`.
    "anew": FineTuningSweep(),
}
# Clean samples that defenses of images get, and those with a number in their name; ours.
CLEAN_IMAGES = 100
COUNTS = {f"{name}-{count}": count for names, counts in (
    (("ntml",), (25, 50, 250, 500)), (("bedkd", "dup", "ft-text"), (50, 100, 200, 400)),
    (("ft", "fp", "nad", "ft_sam", "ibau"), (25, 500, 2500)),
    (("ft_sweep", "ft-brief", "anew"), (2500,)), (("ft-steps",), (100,)))
    for name in names for count in counts}
VARIANTS |= {name: VARIANTS[name.rpartition("-")[0]] for name in COUNTS}
PROBE = 1000  # training samples on which the scan is judged
# These get the training set; all others need clean samples only.
WITH_TRAIN_SET = BeDKD | DUP | NTML | SpectralSignatures | ActivationClustering | ABL | CUBE


def defend(name: str, attacked: Victim, seed: int, measure: Callable[..., dict],
           quick_eval: Callable[[Model], dict]) -> tuple[dict, dict, dict]:
    """Run a defense and measure it.

    Args:
        name: Of `VARIANTS`.
        attacked: The victim.
        seed: Of the defense.
        measure: Maps a model (and whether to add the floor) to metrics by name.
        quick_eval: The same on fewer samples, for a curve over the cycles. Both are the
            evaluator's: the defense never sees what they return.

    Returns:
        Metrics (those of the attacked model end in `_before`), seconds by step, and further fields
        of the record.

    Raises:
        KeyError: For an unknown name.
    """
    defense = replace(VARIANTS[name], seed=seed)
    curve: list[dict] = []
    context = context_for(attacked, defense, COUNTS.get(name),
                          _callback(attacked, defense, quick_eval, curve))
    if name.startswith("anew"):  # the same steps from a network that has learned nothing
        context = replace(context, classifier=context.new_model(context.training))
    outcome = (_without_flagged(context, defense) if name == "dup-retraining" else
               _retrain(context, defense) if name == "retraining" else defense(context))
    about, history = _judge(defense, outcome, attacked, measure)
    if name in COUNTS or not isinstance(defense, BeDKD | DUP):
        about["clean"] = len(context.clean)
    before = {f"{k}_before": v for k, v in measure(attacked.classifier, False).items()
              if k in ("cacc", "pacc") or k.startswith("asr")}
    # JSON knows no NaN, which stands for what could not be observed.
    return {**measure(outcome.model), **before, **about}, dict(outcome.seconds), {
        "history": [_without_nan(log) for log in curve or history]}


def context_for(attacked: Victim, defense: object, count: int | None = None,
                callback: Callable = ignore) -> Context:
    """Return what a defender gets who uses this defense.

    Args:
        attacked: The victim.
        defense: One of `VARIANTS`.
        count: Clean samples, None for the usual: `CLEAN_IMAGES`, or all clean texts, of which
            NT-ML too gets so many.
        callback: See `Context`.
    """
    if attacked.task.clean.are_images or isinstance(defense, NTML):
        count = count or CLEAN_IMAGES
    return attacked.context(train=isinstance(defense, WITH_TRAIN_SET), clean=count,
                            callback=callback)


def _callback(attacked: Victim, defense: Any, quick_eval: Callable,
              curve: list[dict]) -> Callable:
    """Return a callback that keeps a curve: worth its time only where nothing stops the run."""
    unlearning = isinstance(defense, DUP)
    stops = defense.stopping.stop if unlearning else getattr(defense, "stop", True)
    if stops:
        return ignore
    # BeDKD's short cycles need fewer evaluations.
    every = 1 if unlearning or not defense.trust_steps else 4

    def callback(model: torch.nn.Module, log: EpochLog) -> None:
        if log.cycle % every == 0:
            seen = quick_eval(replace(attacked.classifier, model=model))
            curve.append(log._asdict() | _values(seen))

    return callback


def _values(metrics: dict) -> dict[str, float]:
    return {name: rate.value for name, rate in metrics.items() if isinstance(rate, Rate)}


def _judge(defense: object, outcome: Outcome, attacked: Victim,
           measure: Callable) -> tuple[dict, list[dict]]:
    """Return what only the evaluator knows of an outcome, and its history."""
    changed = {"changed": int(outcome.verdict == "purified")}
    if isinstance(defense, NTML):
        stages = [{"stage": stage, **_values(measure(model, False))}
                  for stage, model in outcome.report["stages"].items()]
        return changed | _gate(outcome, attacked), stages
    if isinstance(defense, BeDKD | DUP):
        logs = [log._asdict() for log in outcome.history]
        cycles = logs[-1]["cycle"] if logs else 0
        if isinstance(defense, DUP):
            return {**changed, "cycles": cycles, **_flags(outcome, attacked)}, logs
        judged, gaps = _scan(outcome, attacked, defense)
        return {**changed, "cycles": cycles, **judged}, logs or gaps
    return {key: outcome.report[key] for key in ("lr_share",) if key in outcome.report}, []


def _gate(outcome: Outcome, attacked: Victim) -> dict:
    """Judge which given labels NT-ML accepted."""
    passed, about = outcome.report["passed"], {}
    poisoned = attacked.record.poisoned if attacked.record else [False] * len(passed)
    about["largest_share"], about["runner_up"] = outcome.report["shares"].topk(2)[0].tolist()
    for name, kind in (("clean_passed", False), ("poisoned_passed", True)):
        chosen = [ok for ok, p in zip(passed, poisoned, strict=True) if p == kind]
        if chosen:
            about[name] = wilson(sum(chosen), len(chosen))
    return about | (_second_choice(attacked) if attacked.record else {})


def _second_choice(attacked: Victim) -> dict:
    """Tell how often the victim's best other answer for a mislabeled sample is its true label."""
    given, true = torch.tensor(attacked.train.labels), torch.tensor(attacked.task.train.labels)
    mislabeled = (given != true).nonzero()[:, 0]
    logits = attacked.classifier.logits(attacked.train.inputs)
    if not len(mislabeled):
        return {}
    ways = {"second": logits, "second_centered": centered(logits, given)}
    return {name: _share((without(z, given).argmax(1) == true)[mislabeled].tolist())
            for name, z in ways.items()}


def _share(hits: Iterable[bool]) -> Rate:
    hits = list(hits)
    return wilson(sum(hits), len(hits))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if value != value else value


def _retrain(context: Context, defense: BeDKD) -> Outcome:
    """Train anew without the suspects of BeDKD's scan, as many as there are."""
    context.require("retraining", train=True, training=True)
    start = time.perf_counter()
    module, suspects = find_suspects(context, defense)
    return _trained_anew(context, suspects.indices, start,
                         {"module": module, "suspects": suspects})


def _without_flagged(context: Context, defense: DUP) -> Outcome:
    """Train anew without the samples that DUP suspects; without suspects change nothing."""
    context.require("retraining", train=True, training=True)
    start = time.perf_counter()
    detector, flags, evidence = search(context, (), defense)
    suspects = suspects_of(flags, evidence, defense)
    return _trained_anew(context, [i for label in suspects for i in label.indices], start,
                         {"detector": detector, "flags": flags, "suspects": suspects})


def _trained_anew(context: Context, dropped: Sequence[int], start: float, report: dict) -> Outcome:
    """Train anew without what a search that began at `start` has found."""
    searched = time.perf_counter()
    outcome = retrained(context, dropped, context.training.seed)
    return replace(outcome, report=report | dict(outcome.report),
                   seconds={"search": searched - start, "purify": time.perf_counter() - searched})


def _scan(outcome: Outcome, attacked: Victim, defense: BeDKD) -> tuple[dict, list[dict]]:
    """Judge BeDKD's scan with what only the evaluator knows, and return the gaps it saw."""
    suspects, module = outcome.report["suspects"], outcome.report["module"]
    if suspects is None:
        return {}, []
    about = {"threshold": suspects.threshold, "chance": suspects.chance,
             "flagged": suspects.flagged, "scanned": suspects.scanned,
             "suspects": len(suspects.indices), **{
                 name: value for name, value in outcome.report.items()
                 if isinstance(value, float)}}
    n = len(attacked.train)
    poisoned = attacked.record.poisoned if attacked.record else (False,) * n
    probe = random.Random(0).sample(range(n), min(PROBE, n))
    inputs, labels = attacked.train.take(probe).inputs, [poisoned[i] for i in probe]
    gaps = gap(attacked.classifier.logits(inputs), module.logits(inputs),
               defense.scan.mean_gap).tolist()
    outlines = _histogram({"held_out": suspects.held_out_gaps.tolist(), **{
        name: [g for g, bad in zip(gaps, labels) if bad == kind]
        for name, kind in (("clean", False), ("poisoned", True))}})
    if attacked.record is None:
        return about, outlines
    tpr, fpr = tpr_fpr([g < suspects.threshold for g in gaps], labels)
    if suspects.indices:
        about["precision"] = _share(poisoned[i] for i in suspects.indices)
    return {**about, "auroc": auroc([-g for g in gaps], labels), "tpr": tpr, "fpr": fpr}, outlines


def _histogram(groups: dict[str, list[float]], bins: int = 40) -> list[dict]:
    """Return for each bin from 0 to 1 its upper edge, and what share of each group is in it."""
    counts = {name: torch.histc(torch.tensor(values), bins, 0, 1) / len(values)
              for name, values in groups.items() if values}
    return [{"gap": (i + 1) / bins} | {
        name: round(share[i].item(), 4) for name, share in counts.items()} for i in range(bins)]


def _flags(outcome: Outcome, attacked: Victim) -> dict:
    """Judge DUP's flags with what only the evaluator knows."""
    flags, n = outcome.report["flags"], len(attacked.train)
    evidence = evidence_by_class(outcome.report["detector"], flags, attacked.train.labels)
    suspects = [i for found in outcome.report["suspects"] for i in found.indices]
    about = {"threshold": flags.threshold, "flagged": len(flags.indices), "scanned": n,
             "chance": len(evidence) * min(found.chance for found in evidence),
             "suspect_samples": len(suspects)}
    if attacked.record is None:
        return about
    poisoned, flagged = attacked.record.poisoned, set(flags.indices)
    tpr, fpr = tpr_fpr([i in flagged for i in range(n)], poisoned)
    for name, chosen in (("precision", flags.indices), ("suspect_precision", suspects)):
        if chosen:
            about[name] = _share(poisoned[i] for i in chosen)
    return {**about, "auroc": auroc(flags.scores.tolist(), poisoned), "tpr": tpr, "fpr": fpr}
