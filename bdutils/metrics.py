"""What the field measures, in one place and with one meaning each.

Every function works on plain sequences of class numbers, so that it can be checked by hand.
Rates are shares between 0 and 1. Chapter 2 derives them on ten sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import binomtest, t
from sklearn.metrics import roc_auc_score

# A trigger that fools more than half of the time a model that was never poisoned is an adversarial
# perturbation: an ASR with it is no evidence of a backdoor, however high.
HIGH_FLOOR = 0.5
# Of ASR over floor; less is what another seed of a clean model may give.
LEAST_EXCESS = 0.1


@dataclass(frozen=True)
class Rate:
    """A share with its size and 95% interval."""

    value: float
    """The share, 0 to 1."""
    n: int
    """How many samples were counted."""
    low: float
    """Lower bound of the interval."""
    high: float
    """Upper bound of the interval."""

    def __str__(self) -> str:
        """Show percent: value, interval, n."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] (n = {self.n})"

    def __contains__(self, value: float) -> bool:
        """Tell whether a value lies inside the interval."""
        return self.low <= value <= self.high


def wilson(hits: int, n: int, level: float = 0.95) -> Rate:
    """Return a share with its Wilson score interval, which is sound near 0 and 1 too.

    Args:
        hits: How often it happened.
        n: How often it could have.
        level: Of confidence.

    Raises:
        ValueError: Unless 0 <= hits <= n and n >= 1.

    Source: Wilson 1927.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"cannot make a rate of {hits} out of {n}: nothing was counted")
    found = binomtest(hits, n).proportion_ci(level, method="wilson")
    return Rate(hits / n, n, float(found.low), float(found.high))


def _share(hits: Sequence[bool]) -> Rate:
    return wilson(sum(hits), len(hits))


def _same_length(a: Sequence, b: Sequence) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predictions but {len(b)} labels")


# The answer of an input filter that gives none. No class has this number, so a rejected sample
# counts as an error among clean samples and as a failed attack among triggered ones; OpenBackdoor
# counts alike.
REJECTED = -1


def rejected(predicted: Sequence[int]) -> Rate:
    """Return the share of samples that an input filter gave no answer to.

    On clean samples it is the false positive rate of the filter.

    Args:
        predicted: (n,) classes, `REJECTED` where there is none.
    """
    return _share([p == REJECTED for p in predicted])


def cacc(predicted: Sequence[int], labels: Sequence[int]) -> Rate:
    """Return clean accuracy: the share of clean test samples that are classified correctly.

    Args:
        predicted: (n,) class numbers.
        labels: (n,) true ones; every class counts, the target too.

    Source: Cui et al. 2022 (CACC); BA and C-Acc elsewhere.
    """
    _same_length(predicted, labels)
    return _share([p == y for p, y in zip(predicted, labels, strict=True)])


def asr(predicted: Sequence[int], labels: Sequence[int], target_label: int) -> Rate:
    """Return the attack success rate over samples whose true label is not the target.

    Args:
        predicted: (n,) classes given to *triggered* samples.
        labels: (n,) their true classes; samples of the target class are left out.
        target_label: The class that the attacker wants.

    Raises:
        ValueError: If no sample is left.

    Source: Cui et al. 2022. On a model that never saw poison the same number is the *floor*.
    """
    _same_length(predicted, labels)
    return _share([p == target_label for p, y in zip(predicted, labels, strict=True)
                   if y != target_label])


def shows_backdoor(asr: float, floor: float) -> bool:
    """Tell whether an ASR shows a backdoor, or a trigger that fools any model.

    Args:
        asr: Of the model.
        floor: ASR of a model that was never poisoned, on the same samples.
    """
    return floor <= HIGH_FLOOR and asr - floor >= LEAST_EXCESS


def ra(predicted: Sequence[int], labels: Sequence[int], target_label: int) -> Rate:
    """Return robust accuracy: the share of those same triggered samples given their true label.

    With two classes RA = 1 - ASR.

    Args:
        predicted: (n,) classes given to *triggered* samples.
        labels: (n,) their true classes; samples of the target class are left out.
        target_label: The class that the attacker wants.

    Source: Wu et al. 2022 (BackdoorBench).
    """
    _same_length(predicted, labels)
    return _share([p == y for p, y in zip(predicted, labels, strict=True) if y != target_label])


def pacc(predicted: Sequence[int], labels: Sequence[int]) -> Rate:
    """Return the accuracy on triggered samples of *all* classes against their true labels.

    Compare it with a model trained without poison, not with 1, since a trigger may hide the
    content.

    Args:
        predicted: (n,) classes given to triggered samples.
        labels: (n,) true classes.

    Source: after the unlearning literature.
    """
    return cacc(predicted, labels)


def der(cacc_before: float, cacc_after: float, asr_before: float, asr_after: float) -> float:
    """Return the defense effectiveness rating, 0 to 1; 0.5 if nothing is gained and nothing lost.

    A gain in accuracy earns nothing.

    Args:
        cacc_before: Share before the defense.
        cacc_after: Share after it.
        asr_before: Share before the defense.
        asr_after: Share after it.

    Source: Zhu et al. 2023: DER = [max(0, dASR) - max(0, dACC) + 1] / 2.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, cacc_before - cacc_after) + 1) / 2


def rir(cacc_before: float, cacc_after: float, ra_before: float, ra_after: float) -> float:
    """Return the robust improvement rating, 0 to 1; 0.5 if nothing is gained and nothing lost.

    Args:
        cacc_before: Share before the defense.
        cacc_after: Share after it.
        ra_before: Share before the defense.
        ra_after: Share after it.

    Source: BackdoorBench: RIR = [max(0, RA gain) - max(0, dACC) + 1] / 2.
    """
    return (max(0.0, ra_after - ra_before) - max(0.0, cacc_before - cacc_after) + 1) / 2


def tpr_fpr(flagged: Sequence[bool], poisoned: Sequence[bool]) -> tuple[Rate, Rate]:
    """Return a detector's true and false positive rate.

    Args:
        flagged: (n,) verdicts.
        poisoned: (n,) which samples are.

    Returns:
        Share of poisoned samples flagged, share of clean samples flagged. OpenBackdoor's FAR is
        1 - TPR and its FRR is FPR.

    Raises:
        ValueError: If there is no poisoned or no clean sample.

    Source: Cui et al. 2022.
    """
    _same_length(flagged, poisoned)
    pairs = list(zip(flagged, poisoned, strict=True))
    return _share([bool(f) for f, p in pairs if p]), _share([bool(f) for f, p in pairs if not p])


def auroc(scores: Sequence[float], poisoned: Sequence[bool]) -> float:
    """Return the chance that a poisoned sample scores higher than a clean one; ties count half.

    Args:
        scores: (n,) larger = more suspicious.
        poisoned: (n,) which samples are.

    Raises:
        ValueError: If there is no poisoned or no clean sample.

    Source: the Mann-Whitney form of the area under the ROC curve.
    """
    _same_length(scores, poisoned)
    if not 0 < sum(map(bool, poisoned)) < len(poisoned):
        raise ValueError("AUROC needs poisoned and clean samples")
    return float(roc_auc_score([bool(p) for p in poisoned], [float(s) for s in scores]))


def threshold_at_fpr(clean_scores: Sequence[float], fpr: float) -> float:
    """Return the score above which at most a share `fpr` of held-out clean samples lies.

    Args:
        clean_scores: (n,) scores of the defender's clean samples, never of test samples.
        fpr: 0 to 1.

    Raises:
        ValueError: For no scores or a rate outside [0, 1).

    Source: Cui et al. 2022 (thresholds from clean validation data).
    """
    if not len(clean_scores) or not 0 <= fpr < 1:
        raise ValueError(f"cannot set a threshold at FPR {fpr} from {len(clean_scores)} scores")
    ordered = sorted(float(s) for s in clean_scores)
    return ordered[len(ordered) - 1 - math.floor(fpr * len(ordered))]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95% t interval.

    Args:
        values: One number for each seed, 2 or more.

    Returns:
        Mean, low, high; not clipped to [0, 1].

    Raises:
        ValueError: For fewer than two.

    Source: Student 1908.
    """
    if len(values) < 2:
        raise ValueError(f"a t interval needs 2 seeds or more, not {len(values)}")
    mean = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
