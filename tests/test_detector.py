"""The detector of DUP: scores, threshold, evidence and a relative by hand, and what it may see."""

import ast
import inspect
import itertools
import math
from dataclasses import replace
from functools import cache, partial
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.checks import has_ranges, near
from helpers.texts import CLEAN, NAMES, TRAIN, TWO_LAYERS, WORDS, at, detector, made
from helpers.walls import SECRETS, names_in
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import calinski_harabasz_score

from bdutils.attacks import adaptive
from bdutils.defenses import detector as dt
from bdutils.defenses.base import check_range
from bdutils.defenses.detector import DetectorConfig, Flags, Moments
from bdutils.probing import hidden_states
from bdutils.roles import CleanSet


def random_states(n, layers=3, dims=4):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, layers, dims, generator=generator, dtype=torch.float64)
    return states * torch.arange(1.0, dims + 1) + torch.arange(layers)[:, None]


def summed(states, labels, classes=2):
    sums = Moments.none(classes, *states.shape[1:])
    if len(labels):
        sums.add(states, labels)
    return sums


# ------------------------------------------------------------- sums and scores


def check_DetectorConfig(kind):
    has_ranges(kind, [("shrinkage", 1.0), ("weight", 0.0), ("weight", 1.0), ("layers", 1)],
                 [("shrinkage", 0.0), ("shrinkage", 1.01), ("fpr", 0.0), ("fpr", 1.0),
                  ("weight", -0.01), ("weight", 1.01), ("weight", math.nan), ("layers", 0)])


def check_mean_and_covariance(mean_and_covariance):
    # Layer 0: x is 0, 2, 0, 2 and y is 0, 0, 4, 4: means 1 and 2, variances 1 and 4, and
    # mean(xy) = 8 / 4 = 1 * 2 leaves nothing. Layer 1: both means are 1, mean(xx) = 6 / 4,
    # mean(yy) = 14 / 4, mean(xy) = (4 + 3 - 1) / 4 = 1.5; take 1 off each.
    points = [[[0, 0], [0, 0]], [[2, 0], [2, 2]], [[0, 4], [1, 3]], [[2, 4], [1, -1]]]
    for labels in ([0] * 4, [0, 1, 1, 1]):  # the classes are pooled
        mean, covariance = mean_and_covariance(summed(torch.tensor(points).double(), labels))
        assert mean.tolist() == [[1, 2], [1, 1]]
        assert covariance.tolist() == [[[1, 0], [0, 4]], [[0.5, 0.5], [0.5, 2.5]]]


@settings(max_examples=5)
@given(st.permutations(range(24)), st.sets(st.integers(1, 23)))
def test_whatever_order_and_chunks_the_statistics_are_those_of_numpy_and_sklearn(order, cuts):
    states, labels = random_states(24), [0, 1, 3] * 8  # nobody has class 2
    states += torch.tensor(labels)[:, None, None] * torch.ones(3, 1).tril()
    sums = Moments.none(4, 3, 4)
    shapes = [t.shape for t in vars(sums).values()]
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 24]):
        sums.add(states[order[start:stop]], [labels[i] for i in order[start:stop]])
    assert [t.shape for t in vars(sums).values()] == shapes  # they do not grow with n
    assert sums.counts.tolist() == [8, 8, 0, 8]
    for layer, mean, covariance, index in zip(states.unbind(1), *dt.mean_and_covariance(sums),
                                              dt.class_index(sums)):
        assert np.allclose(mean, layer.mean(0), atol=1e-12)
        assert np.allclose(covariance, np.cov(layer.numpy(), rowvar=False, ddof=0), atol=1e-10)
        assert index.item() == near(calinski_harabasz_score(layer, labels))


def check_class_index(class_index):
    # Of three classes nobody has the second. First layer: centers 1 (three points) and 5 (one),
    # mean 2; between 3 * 1 + 1 * 9 = 12, within 1 + 1 + 0 + 0 = 2: (12 / 1) / (2 / 2). Second:
    # the same far from zero. Third: centers 2 and 2: nothing between. Fourth: nothing within.
    layers = torch.tensor([[0, 2, 1, 5], [-40, -38, -39, -35], [1, 3, 2, 2], [1, 1, 1, 5]])
    found = class_index(summed(layers.T[:, :, None].double(), [0, 0, 0, 2], classes=3))
    assert found.tolist() == near([12.0, 12.0, 0.0, 1.0])
    # Three classes of two points about -4, 0 and 4: between 2 * 16 * 2 = 64, within 6 * 1.
    column = torch.tensor([-5.0, -3, -1, 1, 3, 5]).double()[:, None, None]
    three = class_index(summed(column, [0, 0, 1, 1, 2, 2], classes=3))
    assert three.tolist() == near([(64 / 2) / (6 / 3)])


@pytest.mark.parametrize("function, labels, message", [
    (dt.mean_and_covariance, [1], "1 samples have no covariance: give more clean samples or"),
    (dt.class_index, [0, 0, 0], "3 samples of 1 classes: the layer index needs two"),
    (dt.class_index, [1, 0], "2 samples of 2 classes: .* and more samples than classes")])
def test_too_few_samples_are_rejected(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(summed(random_states(len(labels)), labels))


def check_distance(distance):
    # Diagonal: (2 / 2)^2 + (3 / 3)^2 = 2. Correlated: the inverse of ((2, 1), (1, 2)) is
    # ((2, -1), (-1, 2)) / 3, which gives 2/3 along the diagonal and 6/3 across it.
    covariance = torch.tensor([[[4.0, 0], [0, 9]], [[2, 1], [1, 2]]])
    states = torch.tensor([[[12.0, 23], [1, 2]], [[8, 17], [1, 0]], [[10, 26], [0, 1]]])
    found = distance(states, torch.tensor([[10.0, 20], [0, 1]]), torch.linalg.cholesky(covariance))
    root = math.sqrt
    assert found.tolist() == [near(far) for far in ([root(2), root(2 / 3)], [root(2)] * 2, [2, 0])]


def check_transition(transition):
    for moves, wanted in (
            ([[1, 2], [-3, -6], [0.5, 1]], 1.0),  # rank one: all along one line
            ([[0, 0], [5, 1], [0, 0]], 1.0),  # one move only
            ([[2, 0, 0], [0, 2, 0], [0, 0, 2]], 1 / 3),  # equal and orthogonal
            ([[3, 0], [0, 1]], 3 / 4),
            ([[0, 0], [0, 0]], 0.0)):
        path = torch.tensor([[1.0] * len(moves[0]), *moves], dtype=torch.float64).cumsum(0)
        for scale, shift in ((1, 0), (1e-3, 50), (1e3, -50)):
            assert transition(scale * path[None] + shift).tolist() == near([wanted], abs=1e-6)


SCORED = (*TRAIN.inputs[:10], "no", " ".join(WORDS))  # the longest pads the others


@cache
def scorer(pooling):
    chosen = replace(TWO_LAYERS, pooling=pooling)
    found = dt.fit_detector(made(), CLEAN, CLEAN, chosen)
    score = partial(dt.raw_scores, made(), mean=found.mean, root=found.root,
                    layers=found.layers, pooling=pooling)
    return score, torch.cat([score([text]) for text in SCORED])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@settings(max_examples=5)
@given(order=st.permutations(range(12)), count=st.integers(1, 12), size=st.integers(1, 12))
def test_a_score_is_the_texts_own(pooling, order, count, size):
    """Whatever the order, the batch and its padding, and how many texts are streamed at once."""
    score, alone = scorer(pooling)
    assert alone.shape == (12, 2) and alone.std(0).min() > 0.01
    indices = order[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dt, "stream", partial(dt.stream, size=size))
        found = score([SCORED[i] for i in indices])
    assert torch.allclose(found, alone[indices], atol=2e-5)


# ------------------------------------------------------- one score, one threshold

# Means 2 and 0.4, spreads 1 and 0.2: in units of these two they are at -1 and +1.
TWO = torch.tensor([[1.0, 0.2], [3.0, 0.6]])


def check_fuse(fuse):
    # (4 - 2) / 1 = 2 and (0.5 - 0.4) / 0.2 = 0.5; more in one of them is more by its weight.
    raw = torch.tensor([[4.0, 0.5], [5.0, 0.5], [4.0, 0.7]])
    for weight, base in ((1.0, 2.0), (0.0, 0.5), (0.5, 1.25), (0.9, 1.85)):
        assert fuse(raw, TWO, weight).tolist() == near([base, base + weight, base + 1 - weight])
    # What is constant among clean samples is left in its own unit.
    still = torch.tensor([[2.0, 0.4]] * 5)
    assert fuse(torch.tensor([[2.5, 0.3]]), still, 0.5).tolist() == near([(0.5 - 0.1) / 2])


def check_threshold_at(threshold_at):
    # From -1 to +1, and 1 - fpr of the way up.
    for fpr, wanted in ((0.05, 0.9), (0.2, 0.6), (0.5, 0.0)):
        assert threshold_at(TWO, 0.5, fpr) == near(wanted)
    assert threshold_at(at([-1.0, 1.0]), 0.75, 0.05) == near(0.75 * 0.9)


def test_center_and_layers_come_from_calibration_and_only_the_scale_from_others(monkeypatch):
    # Texts are numbers of made-up states.
    states, labels = random_states(60, 4, 3), tuple(i % 2 for i in range(60))
    for layer, gap in enumerate((0.5, 8.0, 2.0, 4.0)):  # layers 1, 3, 2, 0 in this order
        states[:, layer] += gap * torch.tensor(labels)[:, None]
    monkeypatch.setattr(dt, "stream", lambda model, texts, pooling: (
        states[[int(t) for t in texts[i:i + 7]]] for i in range(0, len(texts), 7)))
    clean = CleanSet(tuple(map(str, range(60))), labels, NAMES)
    fit = partial(dt.fit_detector, None)
    first, second = clean.take(range(40)), clean.take(range(59, 39, -1))
    for count, layers in ((1, (1,)), (2, (1, 3)), (3, (1, 3, 2)), (9, (1, 3, 2, 0))):
        one = fit(first, second, replace(TWO_LAYERS, layers=count))
        assert one.layers == layers and one.labels == second.labels
        assert torch.equal(one.clean, dt.raw_scores(
            None, second.inputs, one.mean, one.root, layers, "cls"))
    few = fit(first, second.take(range(5)), one.config)
    assert all(torch.equal(getattr(one, n), getattr(few, n)) for n in ("mean", "root", "index"))
    assert torch.equal(few.clean, one.clean[:5]) and few.layers == one.layers
    other = fit(first.take(range(20)), second, one.config)
    assert not any(torch.equal(getattr(one, n), getattr(other, n)) for n in ("mean", "root"))


def test_the_flags_of_a_real_model_are_those_of_plain_numpy(monkeypatch):
    """All states at once, inverse and singular values by numpy, threshold by quantile."""
    monkeypatch.setattr(dt, "stream", partial(dt.stream, size=7))
    first, second = CLEAN.take(range(30)), CLEAN.take(range(30, 60))
    chosen = replace(TWO_LAYERS, fpr=0.3, weight=0.7)
    fitted = dt.fit_detector(made(), first, second, chosen)
    found = dt.detect(made(), fitted, TRAIN.inputs)
    states = [hidden_states(made(), part.inputs)[:, 1:].double().numpy()
              for part in (first, second, TRAIN)]
    index = [calinski_harabasz_score(states[0][:, i], first.labels) for i in range(3)]
    layers = sorted(range(3), key=lambda i: -index[i])[:2]
    assert fitted.index.tolist() == near(index, rel=1e-3) and fitted.layers == tuple(layers)
    raw = []
    for part in states[1:]:
        far = []
        for i in layers:
            covariance = np.cov(states[0][:, i], rowvar=False, ddof=0)
            covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / 16 * np.eye(16)
            off = part[:, i] - states[0][:, i].mean(0)
            far.append(np.sqrt(np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off)))
        values = np.linalg.svd(np.diff(part, axis=1), compute_uv=False)
        raw.append(np.stack([np.mean(far, 0), values[:, 0] / values.sum(1)], 1))
    clean, scanned = ((part - raw[0].mean(0)) / raw[0].std(0) @ (0.7, 0.3) for part in raw)
    line = np.quantile(clean, 0.7)
    assert found.threshold == pytest.approx(line, abs=1e-4)
    assert np.allclose(found.scores, scanned, atol=1e-4)
    assert found.indices == tuple(np.flatnonzero(scanned > line)) and 0 < len(found.indices) < 50


def check_flags_by_chance(flags_by_chance):
    assert flags_by_chance(1, 3, 0, 5) == near(3 / 8)  # one of these 3 is the largest of 8
    assert flags_by_chance(2, 3, 2, 5) == near(1 / 2)  # (5 * 1 + 10 * 3) / 70: see below
    assert flags_by_chance(0, 0, 2, 5) == near(1.0)  # a label that the training set has not
    assert flags_by_chance(3, 10, 5, 5) == 1.0  # all clean samples lie above, too
    assert flags_by_chance(3, 10, 0, 0) == 1.0  # there are none


@pytest.mark.parametrize("m, n", [*itertools.product(range(1, 5), repeat=2)])
def test_the_chance_of_flags_is_a_count_of_rankings(m, n):
    """Every way to mix m threshold and n training samples in one order is as likely as another."""
    mixes = [*itertools.combinations(range(m + n), m)]  # places of the first, from above
    for above in range(m):
        # The threshold is a threshold sample that has so many of its kind above it.
        counts = [places[above] - above for places in mixes]
        for flagged in range(n + 2):
            wanted = sum(count >= flagged for count in counts) / len(counts)
            assert dt.flags_by_chance(flagged, n, above, m) == near(wanted, abs=1e-12)


def check_purity_of(purity_of):
    # A tenth of the threshold samples lie above, so 100 clean samples would give 10 flags.
    for flagged, wanted in ((40, 0.75), (20, 0.5), (10, 0.0), (5, 0.0), (0, 0.0)):
        assert purity_of(flagged, 100, 2, 20) == near(wanted)
    assert purity_of(7, 100, 0, 20) == 1.0
    assert purity_of(7, 100, 0, 0) == 0.0


def check_evidence_by_class(evidence_by_class):
    # In units of the ten clean samples their distances are -0.5 (eight times) and 2 (twice: both
    # are of class 1). Flags 1, 2, 3 and 7 carry the labels 1, 1, 0 and 2.
    judge = detector(torch.tensor([[1.0, 0.0]] * 8 + [[5.0, 0.0]] * 2), (0,) * 5 + (1,) * 5,
                     weight=1.0)
    flags = Flags((1, 2, 3, 7), None, None, 1.0)
    found = evidence_by_class(judge, flags, (0, 1, 1, 0, 1, 0, 0, 2))
    assert [suspect.indices for suspect in found] == [(3,), (1, 2), (7,)]
    # Class 0: 1 of 4 samples against 0 of 5, so one of 4 is the largest of 9. Class 1: 2 of 3
    # against 2 of 5; of the four largest of 8 at most two are threshold samples: 35 / 70. Class 2
    # cannot be compared with anything.
    assert [suspect.chance for suspect in found] == near([4 / 9, 1 / 2, 1.0])
    assert [suspect.purity for suspect in found] == near([1.0, 1 - 3 * 2 / 5 / 2, 0.0])
    # With a distance of exactly the threshold a sample is not above it: the largest of four is
    # one of the training set's two. A label that it has not is judged as well.
    half = detector(at([-1.0, 1.0] * 2), (0, 0, 1, 1), weight=1.0)
    assert evidence_by_class(half, Flags((0,), None, None, 1.0), (0, 0)) == [
        ((0,), near(1 / 2), 1.0), ((), near(1.0), 0.0)]


def check_class_wise(class_wise):
    # Means (0, 0) and (4, 6); about them 1 + 1 + 0 + 0 and 0 + 0 + 4 + 4 over four points leave
    # diag(0.5, 2), whose trace is 2.5. Shrunk by a fifth: 0.4 + 0.25 and 1.6 + 0.25.
    states = torch.tensor([[-1, 0], [1, 0], [4, 4], [4, 8]])[:, None].double()
    means, root = class_wise(summed(states, [0, 0, 1, 1]), 0.2)
    assert means.tolist() == [[[0, 0]], [[4, 6]]]
    assert (root @ root.mT)[0].flatten().tolist() == near([0.65, 0, 0, 1.85])


def check_class_distance(class_distance):
    # From (0, 0) and (10, 0) in units of 2 and 1: 2 and 1 against 3 and 1; 3.5 against 1.5.
    means, root = torch.tensor([[[0.0, 0]], [[10, 0]]]), torch.tensor([[[2.0, 0], [0, 1]]])
    found = class_distance(torch.tensor([[[4.0, 1]], [[7, 0]]]), means, root)
    assert found.flatten().tolist() == near([math.sqrt(5), 1.5])


# Samples 1, 0, 2, 3 of a training set in which 1 and 3 carry the trigger. The clean ones of the
# target class are the two in the middle: (0, 0) and (2, 0) in the first layer, (0, 0) and
# (0, 4) in the second. The embedding and the second token are far away.
HITS, BATCH = [False, True, False, True, True], [1, 0, 2, 3]
FIRST, SECOND = [[1, 3], [0, 0], [2, 0], [1, 0]], [[2, 2], [0, 0], [0, 4], [0, 2]]


def shadow(build, labels=(1, 1, 1, 0), indices=BATCH):
    first, second = (torch.tensor([[state, [99, -99]] for state in layer], dtype=torch.float64,
                                  requires_grad=True) for layer in (FIRST, SECOND))
    logits = torch.zeros(4, 2, dtype=torch.float64)
    outputs = SimpleNamespace(logits=logits, hidden_states=(1e3 * first, first, second))
    value = build(HITS, 1, 0.5)(outputs, {"indices": indices, "labels": torch.tensor(labels)})
    gradients = torch.autograd.grad(value, (first, second)) if value.requires_grad else None
    return value.item(), gradients


def check_shadow_loss(shadow_loss):
    # Centers (1, 0) and (0, 2), about which the kin have variances (1, 0) and (0, 4), on average
    # 0.5 and 2. The hits' means (1, 1.5) and (1, 2) are (0, 1.5) and (1, 0) off.
    value, gradients = shadow(shadow_loss)
    assert value == near(log(2) + 0.5 * ((1.5 ** 2 / 2) / 0.5 + (1 / 2) / 2) / 2)
    # Only the first token of the hits is moved, each by half of what the mean is moved by.
    for gradient, wanted in zip(gradients, ([0, 1.5 / 4], [1 / 16, 0])):
        assert gradient[[0, 3], 0].tolist() == [near(wanted)] * 2
        assert not gradient[[1, 2]].any() and not gradient[:, 1].any()
    # Without a hit or without kin it is the plain loss; a single one of the kin has no spread.
    for changes in ({"labels": (1, 0, 0, 1)}, {"indices": [0, 2, 0, 2]},
                    {"indices": [1, 3, 4, 1]}):
        assert shadow(shadow_loss, **changes) == (near(log(2)), None)
    assert math.isfinite(shadow(shadow_loss, labels=(1, 1, 0, 0))[0])


def altered(sums, **changes):
    """Return the same sums but for some of them."""
    return Moments(**{**vars(sums), **changes})


def below(raw, clean, weight):
    return dt.fuse(clean, clean, weight)


def lone(found):
    """Return a set's first class alone, and nothing of the others."""
    return [found[0]] * len(found)


FLAWS = {  # of each function: what it would be with a slip, which its check must notice
    check_mean_and_covariance: [
        lambda sums: dt.mean_and_covariance(altered(sums, totals=2 * sums.totals)),
        lambda sums: dt.mean_and_covariance(altered(sums, totals=0 * sums.totals)),
        lambda sums: dt.mean_and_covariance(altered(sums, squares=sums.squares * 4 / 3)),
        lambda sums: dt.mean_and_covariance(altered(sums, totals=sums.totals[:1]))],
    check_distance: [
        lambda states, mean, root: dt.distance(states, 0 * mean, root),
        lambda *given: dt.distance(*given).square(),
        lambda states, mean, root: dt.distance(states, mean, root.mT),
        lambda states, mean, root: dt.distance(states, mean, torch.linalg.inv(root)),
        lambda states, mean, root: (states - mean).norm(dim=2)],
    check_class_index: [
        lambda sums: dt.class_index(sums) * 2,
        lambda sums: dt.class_index(sums) + 1,
        lambda sums: dt.class_index(altered(sums, totals=sums.totals.flip(0))),
        lambda sums: torch.where(dt.class_index(sums) == 1, torch.inf, dt.class_index(sums))],
    check_transition: [
        lambda states: dt.transition(states).square(),
        lambda states: 1 - dt.transition(states),
        lambda states: dt.transition(torch.cat([0 * states[:, :1], states], 1)),
        lambda states: dt.transition(states.mT),
        lambda states: dt.transition(states).clamp(min=0.1)],
    check_fuse: [
        lambda raw, clean, weight: dt.fuse(raw, clean, 1 - weight),
        lambda raw, clean, weight: dt.fuse(raw, raw, weight),
        lambda raw, clean, weight: dt.fuse(raw, clean + 1, weight),
        lambda raw, clean, weight: dt.fuse(raw, clean, weight) / 2,
        lambda raw, clean, weight: dt.fuse(raw, clean, 1.0),
        below],
    check_threshold_at: [
        lambda clean, weight, fpr: dt.threshold_at(clean, weight, 1 - fpr),
        lambda clean, weight, fpr: dt.threshold_at(clean, 1 - weight, fpr),
        lambda clean, weight, fpr: dt.fuse(clean, clean, weight).max().item()],
    check_flags_by_chance: [
        lambda flagged, n, above, m: dt.flags_by_chance(flagged + 1, n, above, m),
        lambda flagged, n, above, m: 1 - dt.flags_by_chance(flagged, n, above, m),
        lambda flagged, n, above, m: dt.flags_by_chance(flagged, m, above, n),
        lambda flagged, n, above, m: dt.flags_by_chance(flagged, n, max(0, above - 1), m),
        lambda flagged, n, above, m: 0.0 if above == m else dt.flags_by_chance(
            flagged, n, above, m)],
    check_purity_of: [
        lambda flagged, n, above, m: 1 - n * above / m / flagged if flagged and m else 0.0,
        lambda flagged, n, above, m: dt.purity_of(flagged, m, above, n),
        lambda *given: 1 - dt.purity_of(*given),
        lambda flagged, n, above, m: dt.purity_of(flagged, n, above, m or 1),
        lambda flagged, n, above, m: dt.purity_of(flagged, n, above, m) if above else 0.0],
    check_evidence_by_class: [
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, labels)[::-1],
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, (0,) * len(labels)),
        lambda judge, flags, labels: dt.evidence_by_class(
            replace(judge, labels=judge.labels[::-1]), flags, labels),
        lambda judge, flags, labels: dt.evidence_by_class(
            judge, flags._replace(threshold=flags.threshold - 1e-6), labels),
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, labels)[:len({*labels})],
        lambda *given: lone(dt.evidence_by_class(*given))],
    check_class_wise: [
        lambda sums, shrinkage: dt.class_wise(sums, 0.0),
        lambda sums, shrinkage: dt.class_wise(altered(sums, counts=sums.counts * 2), shrinkage),
        lambda sums, shrinkage: dt.class_wise(altered(sums, squares=2 * sums.squares), shrinkage)],
    check_class_distance: [
        lambda states, means, root: dt.distance(states, means[0], root),
        lambda states, means, root: dt.distance(states, means.mean(0), root),
        lambda states, means, root: -dt.class_distance(-states, -means, -root)],
    check_shadow_loss: [
        lambda hits, target, weight: adaptive.shadow_loss(hits, target, -weight),
        lambda hits, target, weight: adaptive.shadow_loss(hits, target, 1.0),
        lambda hits, target, weight: adaptive.shadow_loss(hits, 1 - target, weight),
        lambda hits, target, weight: adaptive.shadow_loss(hits[::-1], target, weight),
        lambda hits, target, weight: adaptive.shadow_loss([False] * 5, target, weight)],
}


def right(check):
    name = check.__name__.removeprefix("check_")
    return getattr(dt, name, None) or getattr(adaptive, name)


@pytest.mark.parametrize("check", [*FLAWS, check_DetectorConfig])
def test_functions_are_what_plain_arithmetic_says(check):
    check(right(check))


@pytest.mark.parametrize("check, flawed", [
    pytest.param(check, flawed, id=f"{check.__name__.removeprefix('check_')} {number}")
    for check, found in FLAWS.items() for number, flawed in enumerate(found)])
def test_a_flaw_is_noticed(check, flawed):
    with pytest.raises(AssertionError):
        check(flawed)


@pytest.mark.parametrize("holds", [True, False])
def test_a_range_that_is_not_checked_or_never_met_is_noticed(monkeypatch, holds):
    monkeypatch.setattr(dt, "check_range", lambda config, _: check_range(config, holds))
    with pytest.raises(AssertionError):
        check_DetectorConfig(DetectorConfig)


# ----------------------------------------------------------------------- roles


def test_the_detector_knows_nothing_of_attacks_victims_and_test_data():
    # The attacker who knows the detector stands elsewhere, so names are found where they are.
    assert SECRETS & names_in(ast.parse(inspect.getsource(adaptive))) == {"target_label"}
    assert not names_in(ast.parse(inspect.getsource(dt))) & {*SECRETS, "shadow_loss"}
