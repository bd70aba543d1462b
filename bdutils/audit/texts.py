"""Texts: the search of DUP (chapters 7 and 8).

The hidden states of training samples are compared with those of clean samples, label by label. A
backdoor shows as one label whose samples are flagged far more often than its clean ones, and than
those of the other labels.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom, norm
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

from ..defenses.base import Context, Outcome
from ..defenses.detector import (
    Detector,
    Flags,
    SuspectClass,
    detect,
    evidence_by_class,
    fit_detector,
    power,
)
from ..defenses.dup import DUP, repair_suspects, suspects_of
from ..metrics import Rate, cacc, wilson
from ..models.adopt import class_names, first_token_is_blind
from ..models.text import Classifier
from ..plotting import BLACK, BLUE, RED
from ..roles import TrainSet
from .base import Audit, Finding, drawing

METHOD = "DUP, detection-guided unlearning"
OPENED = "`AutoModelForSequenceClassification.from_pretrained` and `AutoTokenizer.from_pretrained`"
LEAST = 20  # clean samples of each class to go on
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # shares of poisoned samples whose discovery is stated
# What share of the poisoned samples the detector flags, as recorded in chapter 7: inserted words
# and sentences 92% and more, rewritten texts about half.
FLAGGED = {"a word or sentence is inserted": 0.9, "texts are rewritten": 0.5}
PHRASES = 5  # shown of each label
CHANCE = 1e-3  # that some phrase of a label is flagged so often, if flags knew no phrases


@dataclass(frozen=True)
class Phrase:
    """A word, or up to four in a row, in the flagged samples of a label."""

    text: str
    """In lower case."""
    flagged: int
    """Flagged samples of the label that hold it."""
    of_label: int
    """All samples of the label that hold it."""
    of_all: int
    """All training samples that hold it."""
    evidence: bool
    """Whether half of its samples or more are flagged and 95% have the label, by no chance."""


@dataclass(frozen=True)
class TextFinding(Finding):
    """What the flags say of one label."""

    clean: Rate
    """The share that is flagged of clean samples."""
    excess: float
    """Log odds of a flag less those of clean samples, in standard errors."""
    contrast: float
    """How much more they exceed those of the other labels, in standard errors."""
    phrases: tuple[Phrase, ...]
    """What its flagged samples share; a phrase may be evidence where their number is none."""
    power: Mapping[str, tuple[float, ...]]
    """Kind of trigger -> probability that each of `RATES` would be found."""


@dataclass(frozen=True)
class TextAudit(Audit):
    """What was found in texts."""

    flags: Flags
    """Scores of all training samples."""
    detector: Detector
    """What it learned from the clean samples."""
    template = "audit_texts.html.j2"

    def flagged(self, train: TrainSet) -> pd.DataFrame:
        """Return the flagged samples, those of suspect labels and high scores first."""
        suspect = {finding.name for finding in self.suspects}
        table = pd.DataFrame([{
            "sample": i, "label": train.label_names[train.labels[i]],
            "suspect": train.label_names[train.labels[i]] in suspect,
            "score": round(float(self.flags.scores[i]), 3), "text": train.inputs[i]}
            for i in self.flags.indices], columns=["sample", "label", "suspect", "score", "text"])
        return table.sort_values(["suspect", "score"], ascending=False)

    def shown(self, context: Context) -> dict[str, Any]:
        """Return the power and two figures."""
        return {"rates": RATES, "lowest": lambda kind, i: min(
                    finding.power[kind][i] for finding in self.findings),
                "scores": _score_figure(self, context.train), "curve": _power_figure(self)}

    def record(self) -> dict[str, Any]:
        """Return what `audit.json` says of the findings."""
        return super().record() | {"flagged": len(self.flags.indices), "rates": RATES}


class _WithBar(Sequence):
    """Texts that move a bar when they are read."""

    def __init__(self, texts: Sequence[str], bar: tqdm) -> None:
        self.texts, self.bar = texts, bar

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.texts[index]
        self.bar.update(len(chosen) if isinstance(index, slice) else 1)
        return chosen


def prepared(context: Context, config: DUP | None = None) -> DUP:
    """Return the configuration for a model.

    A decoder is read at its last token, since its first one sees no other.

    Args:
        context: With the model and clean samples.
        config: Of DUP.
    """
    config, classifier = config or DUP(), cast(Classifier, context.classifier)
    long = max(classifier.encode(context.clean.inputs[:8]), key=len)
    blind = config.detector.pooling == "cls" and first_token_is_blind(classifier.model, long)
    return replace(config, detector=replace(config.detector, pooling="last")) if blind else config


def search(context: Context, config: DUP, quiet: bool = True) -> TextAudit:
    """Look for a backdoor.

    Args:
        context: A classifier of texts, its training set and clean samples.
        config: From `prepared`, by which the detector is fitted and evidence is weighed.
        quiet: Whether no bar is shown.

    Raises:
        ValueError: Without a training set, or for a model whose states do not differ.
    """
    start = time.perf_counter()
    context.require("the audit", train=True)
    classifier, train, clean = cast(Classifier, context.classifier), context.train, context.clean
    accuracy = cacc(classifier.predict(clean.inputs), clean.labels)
    with tqdm(total=len(train) + len(clean), unit=" texts", disable=quiet) as bar:
        detector = fit_detector(classifier, clean, config.detector)
        bar.update(len(clean))
        flags = detect(classifier, detector, _WithBar(train.inputs, bar), train.labels)
    evidence = evidence_by_class(detector, flags, train.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none is the verdict here
        suspects = suspects_of(flags, evidence, config)
    labels = torch.cat([torch.tensor(train.labels), detector.labels]).unique().tolist()
    findings = [_finding(label, found, found in suspects, (train, detector, flags), config)
                for label, found in zip(labels, evidence, strict=True)]
    findings.sort(key=lambda finding: -finding.contrast)
    return TextAudit(tuple(findings), accuracy, time.perf_counter() - start, flags, detector)


def _finding(label: int, found: SuspectClass, suspect: bool,
             seen: tuple[TrainSet, Detector, Flags], config: DUP) -> TextFinding:
    train, detector, flags = seen
    mine = [i for i, y in enumerate(train.labels) if y == label]
    known = detector.labels == label
    above = int((flags.clean[known] > flags.threshold).sum())
    phrases = _phrases(train, label, found.indices, config.min_suspects)
    return TextFinding(
        train.label_names[label], len(mine), wilson(len(found.indices), len(mine)),
        suspect or any(phrase.evidence for phrase in phrases), wilson(above, int(known.sum())),
        found.excess, found.contrast, phrases,
        _power(len(mine), len(train), known, train.num_labels, config))


def _power(samples: int, n: int, known: torch.Tensor, classes: int, config: DUP
           ) -> dict[str, tuple[float, ...]]:
    """Return how often each share of poisoned samples would be found, see `power`."""
    cuts = float(norm.isf(config.alpha / classes)), config.contrast
    clean = int(known.sum()), int((~known).sum())

    def found(tpr: float, rate: float) -> float:
        planted = round(rate * n)
        rest = max(0, samples - planted)
        if planted > samples or tpr * planted < config.min_suspects:
            return 0.0
        return power(tpr, config.detector.fpr, planted, (rest, n - samples), clean, cuts)

    return {kind: tuple(found(tpr, rate) for rate in RATES) for kind, tpr in FLAGGED.items()}


def repair(context: Context, config: DUP) -> Outcome:
    """Repair a model: by the flags of labels that stand out, else by phrases that do.

    Args:
        context: As for `search`.
        config: From `prepared`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no evidence")  # there may be phrases
        outcome, train = config(context), context.train
    if outcome.report["suspects"]:
        return outcome
    flags, suspects = outcome.report["flags"], []
    for label in sorted(set(train.labels)):
        flagged = [i for i in flags.indices if train.labels[i] == label]
        names = [phrase.text for phrase in _phrases(train, label, flagged, config.min_suspects)
                 if phrase.evidence]
        held = [i for i, text in enumerate(train.inputs)
                if any(f" {name} " in f" {' '.join(text.lower().split())} " for name in names)]
        mine = tuple(i for i in held if train.labels[i] == label)
        if mine:  # as many of them are clean as have another label
            suspects.append(SuspectClass(mine, math.inf, math.inf, 2 - len(held) / len(mine)))
    return repair_suspects(context, suspects, config) if suspects else outcome


def _phrases(train: TrainSet, label: int, flagged: Sequence[int], least: int
             ) -> tuple[Phrase, ...]:
    """Return the phrases that the flagged samples of a label share, the most frequent first."""
    counter = CountVectorizer(ngram_range=(1, 4), binary=True, token_pattern=r"\S+", min_df=3,
                              max_features=20_000)  # so that memory does not grow with the samples
    try:
        counter.fit([train.inputs[i] for i in flagged])
    except ValueError:  # no phrase stands in three of them
        return ()
    held = counter.transform(train.inputs)  # (n, phrases), sparse
    chosen, mine = np.zeros(len(train), bool), np.array(train.labels) == label
    chosen[list(flagged)] = True
    caught, of_label, of_all = (np.asarray(held[side].sum(0))[0]
                                for side in (chosen, mine, slice(None)))
    more = caught / max(1, len(flagged)) - (of_all - caught) / max(1, len(train) - len(flagged))
    chance = binom.sf(caught - 1, of_label, len(flagged) / max(1, mine.sum())) * len(of_all)
    evidence = ((of_label >= least) & (caught >= of_label / 2) & (of_label >= 0.95 * of_all)
                & (chance <= CHANCE))
    names = counter.get_feature_names_out()
    best: list[Phrase] = []
    for i in sorted(range(len(names)), key=lambda i: (
            not evidence[i], -more[i], -len(names[i]))):
        if len(best) == PHRASES or not evidence[i] and more[i] < 0.05:
            break
        if not any(f" {names[i]} " in f" {phrase.text} " for phrase in best):
            best.append(Phrase(str(names[i]), int(caught[i]), int(of_label[i]), int(of_all[i]),
                               bool(evidence[i])))
    return tuple(best)


def _score_figure(found: TextAudit, train: TrainSet) -> str:
    """Draw how the scores of training samples and of clean ones are distributed, by label."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    shown = found.findings[:4]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 2.8), sharey=True,
                                squeeze=False)
    given = torch.tensor(train.labels)
    for ax, finding in zip(axes[0], shown, strict=True):
        label = train.label_names.index(finding.name)
        for scores, color, name in ((found.flags.clean[found.detector.labels == label], BLUE,
                                     "clean"),
                                    (found.flags.scores[given == label], RED, "training")):
            if len(scores):
                sns.ecdfplot(x=scores.tolist(), complementary=True, color=color, label=name, ax=ax)
        ax.axvline(found.flags.threshold, color=BLACK, linestyle=":", linewidth=1)
        ax.set(title=finding.name, xlabel="score", ylabel="share above")
    axes[0][0].legend()
    return drawing(figure)


def _power_figure(found: TextAudit) -> str:
    """Draw the probability of discovery against the share of poisoned samples."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    table = pd.DataFrame([
        {"poisoned samples": 100 * rate, "probability": p, "trigger": kind}
        for finding in found.findings for kind, values in finding.power.items()
        for rate, p in zip(RATES, values, strict=True)])
    figure, ax = plt.subplots(figsize=(5.2, 2.8))
    sns.lineplot(table, x="poisoned samples", y="probability", hue="trigger", style="trigger",
                 markers=True, estimator="min", errorbar=None, ax=ax)
    ax.set(xscale="log", xticks=[100 * r for r in RATES], ylim=(-0.03, 1.03),
           xticklabels=[f"{r:.0%}" for r in RATES], ylabel="probability to be found")
    ax.minorticks_off()
    ax.legend(title=None)
    return drawing(figure)


def repaired(outcome: Outcome, names: Sequence[str]) -> tuple[Classifier, list[int]]:
    """Return a repaired model, and the numbers of the samples that were unlearned.

    Args:
        outcome: Of DUP.
        names: Of the classes, which the model gets if it has none.
    """
    model = cast(Classifier, outcome.model)
    if class_names(model.model) is None:
        model.model.config.id2label = dict(enumerate(names))
        model.model.config.label2id = {name: i for i, name in enumerate(names)}
    return model, [i for suspect in outcome.report["suspects"] for i in suspect.indices]
