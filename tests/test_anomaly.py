"""The detector of DUP: scores, threshold, evidence and relatives by hand, and what it may see."""

import ast
import inspect
import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.checks import has_ranges, near, unnoticed
from helpers.texts import NAMES, POOL, RESERVED, TWO_LAYERS, WORDS, at, detector, made
from helpers.walls import SECRETS, names_in
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import calinski_harabasz_score

from bdutils.defenses import anomaly
from bdutils.defenses.anomaly import Flags, Moments
from bdutils.probing import hidden_states
from bdutils.roles import ReservedSet


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


def check_DetectorSettings(kind):
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
    assert [t.shape for t in vars(sums).values()] == shapes  # they grow with no row
    assert sums.counts.tolist() == [8, 8, 0, 8]
    for rows, mean, covariance, index in zip(states.unbind(1), *anomaly.mean_and_covariance(sums),
                                             anomaly.class_index(sums)):
        assert np.allclose(mean, rows.mean(0), atol=1e-12)
        assert np.allclose(covariance, np.cov(rows.numpy(), rowvar=False, ddof=0), atol=1e-10)
        assert index.item() == near(calinski_harabasz_score(rows, labels))


def check_class_index(class_index):
    # Of three classes nobody has the second. First layer: centers 1 (three rows) and 5 (one),
    # mean 2; between 3 * 1 + 1 * 9 = 12, within 1 + 1 + 0 + 0 = 2: (12 / 1) / (2 / 2). Second:
    # the same far from zero. Third: centers 2 and 2: nothing between. Fourth: nothing within.
    layers = torch.tensor([[0, 2, 1, 5], [-40, -38, -39, -35], [1, 3, 2, 2], [1, 1, 1, 5]])
    found = class_index(summed(layers.T[:, :, None].double(), [0, 0, 0, 2], classes=3))
    assert found.tolist() == near([12.0, 12.0, 0.0, 1.0])
    # Three classes of two rows about -4, 0 and 4: between 2 * 16 * 2 = 64, within 6 * 1.
    column = torch.tensor([-5.0, -3, -1, 1, 3, 5]).double()[:, None, None]
    three = class_index(summed(column, [0, 0, 1, 1, 2, 2], classes=3))
    assert three.tolist() == near([(64 / 2) / (6 / 3)])


@pytest.mark.parametrize("function, labels, message", [
    (anomaly.mean_and_covariance, [1], "1 rows have no covariance: give more reserved rows or"),
    (anomaly.class_index, [0, 0, 0], "3 rows of 1 classes: the layer index needs two classes"),
    (anomaly.class_index, [1, 0], "2 rows of 2 classes: .* and more rows than classes")])
def test_too_few_rows_are_refused(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(summed(random_states(len(labels)), labels))


def check_distance(distance):
    # Diagonal: (2 / 2)^2 + (3 / 3)^2 = 2. Correlated: the inverse of ((2, 1), (1, 2)) is
    # ((2, -1), (-1, 2)) / 3, which gives 2/3 along the diagonal and 6/3 across it.
    covariance = torch.tensor([[[4.0, 0], [0, 9]], [[2, 1], [1, 2]]])
    states = torch.tensor([[[12.0, 23], [1, 2]], [[8, 17], [1, 0]], [[10, 26], [0, 1]]])
    found = distance(states, torch.tensor([[10.0, 20], [0, 1]]), torch.linalg.cholesky(covariance))
    root = math.sqrt
    assert found.tolist() == [near(row) for row in ([root(2), root(2 / 3)], [root(2)] * 2, [2, 0])]


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


SCORED = (*POOL.texts[:10], "no", " ".join(WORDS))  # the longest pads the others


@cache
def scorer(pooling):
    chosen = replace(TWO_LAYERS, pooling=pooling)
    found = anomaly.fit_detector(made(), RESERVED, RESERVED, chosen)
    score = partial(anomaly.raw_scores, made(), mean=found.mean, root=found.root,
                    layers=found.layers, settings=chosen)
    return score, torch.cat([score([text]) for text in SCORED])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@settings(max_examples=5)
@given(order=st.permutations(range(12)), count=st.integers(1, 12), size=st.integers(1, 12))
def test_a_score_is_the_texts_own(pooling, order, count, size):
    """Whatever the order, the batch and its padding, and how many texts are streamed at once."""
    score, alone = scorer(pooling)
    assert alone.shape == (12, 2) and alone.std(0).min() > 0.01
    rows = order[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anomaly, "stream", partial(anomaly.stream, size=size))
        found = score([SCORED[i] for i in rows])
    assert torch.allclose(found, alone[rows], atol=2e-5)


# ------------------------------------------------------- one score, one threshold

# Means 2 and 0.4, spreads 1 and 0.2: in units of clean rows these two are at -1 and +1.
CLEAN = torch.tensor([[1.0, 0.2], [3.0, 0.6]])


def check_fuse(fuse):
    # (4 - 2) / 1 = 2 and (0.5 - 0.4) / 0.2 = 0.5; more in one of them is more by its weight.
    raw = torch.tensor([[4.0, 0.5], [5.0, 0.5], [4.0, 0.7]])
    for weight, base in ((1.0, 2.0), (0.0, 0.5), (0.5, 1.25), (0.9, 1.85)):
        assert fuse(raw, CLEAN, weight).tolist() == near([base, base + weight, base + 1 - weight])
    # What is constant among clean rows is left in its own unit.
    still = torch.tensor([[2.0, 0.4]] * 5)
    assert fuse(torch.tensor([[2.5, 0.3]]), still, 0.5).tolist() == near([(0.5 - 0.1) / 2])


def check_cut(cut):
    # From -1 to +1, and 1 - fpr of the way up.
    for fpr, wanted in ((0.05, 0.9), (0.2, 0.6), (0.5, 0.0)):
        assert cut(CLEAN, 0.5, fpr) == near(wanted)
    assert cut(at([-1.0, 1.0]), 0.75, 0.05) == near(0.75 * 0.9)


def test_center_and_layers_come_from_calibration_rows_and_only_the_scale_from_others(monkeypatch):
    # Texts are numbers of made-up states.
    states, labels = random_states(60, 4, 3), tuple(i % 2 for i in range(60))
    for layer, gap in enumerate((0.5, 8.0, 2.0, 4.0)):  # layers 1, 3, 2, 0 in this order
        states[:, layer] += gap * torch.tensor(labels)[:, None]
    monkeypatch.setattr(anomaly, "stream", lambda model, texts, pooling: (
        states[[int(t) for t in texts[i:i + 7]]] for i in range(0, len(texts), 7)))
    rows = ReservedSet(tuple(map(str, range(60))), labels, NAMES)
    first, second, fit = rows.take(range(40)), rows.take(range(59, 39, -1)), partial(
        anomaly.fit_detector, None)
    for count, layers in ((1, (1,)), (2, (1, 3)), (3, (1, 3, 2)), (9, (1, 3, 2, 0))):
        one = fit(first, second, replace(TWO_LAYERS, layers=count))
        assert one.layers == layers and one.labels == second.labels
        assert torch.equal(one.clean, anomaly.raw_scores(
            None, second.texts, one.mean, one.root, layers, TWO_LAYERS))
    few = fit(first, second.take(range(5)), one.settings)
    assert all(torch.equal(getattr(one, n), getattr(few, n)) for n in ("mean", "root", "index"))
    assert torch.equal(few.clean, one.clean[:5]) and few.layers == one.layers
    other = fit(first.take(range(20)), second, one.settings)
    assert not any(torch.equal(getattr(one, n), getattr(other, n)) for n in ("mean", "root"))


def test_the_flags_of_a_real_model_are_those_of_plain_numpy(monkeypatch):
    """All states at once, inverse and singular values by numpy, threshold rows by quantile."""
    monkeypatch.setattr(anomaly, "stream", partial(anomaly.stream, size=7))
    first, second = RESERVED.take(range(30)), RESERVED.take(range(30, 60))
    chosen = replace(TWO_LAYERS, fpr=0.3, weight=0.7)
    fitted = anomaly.fit_detector(made(), first, second, chosen)
    found = anomaly.detect(made(), fitted, POOL.texts)
    states = [hidden_states(made(), rows.texts)[:, 1:].double().numpy()
              for rows in (first, second, POOL)]
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
    clean, pool = ((part - raw[0].mean(0)) / raw[0].std(0) @ (0.7, 0.3) for part in raw)
    line = np.quantile(clean, 0.7)
    assert found.threshold == pytest.approx(line, abs=1e-4)
    assert np.allclose(found.scores, pool, atol=1e-4)
    assert found.rows == tuple(np.flatnonzero(pool > line)) and 0 < len(found.rows) < 50


def check_flags_by_chance(flags_by_chance):
    assert flags_by_chance(1, 3, 0, 5) == near(3 / 8)  # the largest of 8 is one of the pool's 3
    assert flags_by_chance(2, 3, 2, 5) == near(1 / 2)  # (5 * 1 + 10 * 3) / 70: see below
    assert flags_by_chance(0, 0, 2, 5) == near(1.0)  # a label that the pool has not
    assert flags_by_chance(3, 10, 5, 5) == 1.0  # all clean rows lie above, too
    assert flags_by_chance(3, 10, 0, 0) == 1.0  # there are none


@pytest.mark.parametrize("m, n", [*itertools.product(range(1, 5), repeat=2)])
def test_the_chance_of_flags_is_a_count_of_rankings(m, n):
    """Every way to mix m threshold rows and n pool rows in one order is as likely as another."""
    mixes = [*itertools.combinations(range(m + n), m)]  # places of the threshold rows, from above
    for above in range(m):
        # The threshold is a threshold row that has so many of its kind above it.
        counts = [places[above] - above for places in mixes]
        for flagged in range(n + 2):
            wanted = sum(count >= flagged for count in counts) / len(counts)
            assert anomaly.flags_by_chance(flagged, n, above, m) == near(wanted, abs=1e-12)


def check_purity_of(purity_of):
    # A tenth of the threshold rows lie above, so a clean pool of 100 would give 10 flags.
    for flagged, wanted in ((40, 0.75), (20, 0.5), (10, 0.0), (5, 0.0), (0, 0.0)):
        assert purity_of(flagged, 100, 2, 20) == near(wanted)
    assert purity_of(7, 100, 0, 20) == 1.0
    assert purity_of(7, 100, 0, 0) == 0.0


def check_charges(charges):
    # In units of the ten clean rows their distances are -0.5 (eight times) and 2 (twice: both
    # are of class 1). Flags 1, 2, 3 and 7 of the pool carry the labels 1, 1, 0 and 2.
    judge = detector(torch.tensor([[1.0, 0.0]] * 8 + [[5.0, 0.0]] * 2), (0,) * 5 + (1,) * 5,
                     weight=1.0)
    found = charges(judge, Flags((1, 2, 3, 7), None, None, 1.0), (0, 1, 1, 0, 1, 0, 0, 2))
    assert [charge.rows for charge in found] == [(3,), (1, 2), (7,)]
    # Class 0: 1 of 4 rows against 0 of 5, so one of 4 is the largest of 9. Class 1: 2 of 3
    # against 2 of 5; of the four largest of 8 at most two are threshold rows: 35 / 70. Class 2
    # cannot be compared with anything.
    assert [charge.chance for charge in found] == near([4 / 9, 1 / 2, 1.0])
    assert [charge.purity for charge in found] == near([1.0, 1 - 3 * 2 / 5 / 2, 0.0])
    # With a distance of exactly the threshold a row is not above it: the largest of four rows is
    # one of the pool's two. A label that the pool has not is judged as well.
    half = detector(at([-1.0, 1.0] * 2), (0, 0, 1, 1), weight=1.0)
    assert charges(half, Flags((0,), None, None, 1.0), (0, 0)) == [
        ((0,), near(1 / 2), 1.0), ((), near(1.0), 0.0)]


def check_class_wise(class_wise):
    # Means (0, 0) and (4, 6); about them 1 + 1 + 0 + 0 and 0 + 0 + 4 + 4 over four rows leave
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


class Sure:
    """Stands for a classifier: as sure as 1 / 2, or as `firm` where a text says so."""

    def __init__(self, firm):
        self.firm, self.seen = firm, []

    def logits(self, texts):
        self.seen += texts
        p = torch.tensor([self.firm if "cf" in text.split() else 0.5 for text in texts])
        return torch.stack([p, 1 - p], 1).log() + 7.0  # logits have no fixed level


def check_strip_scores(strip_scores):
    firm = 0.9 * log(0.9) + 0.1 * log(0.1)
    kept = strip_scores(Sure(0.9), ["a b", "cf b c", "d"], ["x y"], copies=4, swap=0.0)
    assert kept.tolist() == near([-log(2), firm, -log(2)])
    gone = strip_scores(Sure(0.9), ["a b", "cf b c"], ["x y"], copies=4, swap=1.0)
    assert gone.tolist() == near([-log(2)] * 2)
    new = strip_scores(Sure(0.9), ["a b", "c"], ["cf cf"], copies=4, swap=1.0)
    assert new.tolist() == near([firm] * 2)
    # Half of the words go: the trigger stays in some of the copies, and the mean is over them.
    model = Sure(0.9)
    both = strip_scores(model, ["cf b c d", "a b c d"], ["x y", "z"], copies=40)
    assert [sum(word in "xyz" for word in text.split()) for text in model.seen] == [2] * 80
    stays = sum("cf" in text.split() for text in model.seen[:40])
    assert 8 < stays < 32 and {len({*t.split()} & {*"xy"}) for t in model.seen} == {0, 1, 2}
    assert both.tolist() == near([(stays * firm - (40 - stays) * log(2)) / 40, -log(2)])


def test_a_strip_score_is_the_texts_own_and_repeatable():
    texts, others = ["cf b c d", "a cf", "a b c d e cf g h"], ["x y", "z", "u v w"]
    state = random.getstate()
    found = anomaly.strip_scores(Sure(0.99), texts, others)
    alone = [anomaly.strip_scores(Sure(0.99), [text], others).item() for text in texts]
    assert found.tolist() == alone and random.getstate() == state


def costs_of(text):
    costs = {"a": 1.0, "good": 2.0, "film": 3.0, "zq": 50.0}
    return sum(costs[word] for word in text.split())


def check_word_falls(word_falls):
    assert word_falls("a good zq film", costs_of) == [1.0, 2.0, 50.0, 3.0]
    assert word_falls("zq", costs_of) == []  # a single word cannot go


def check_onion_scores(onion_scores):
    found = onion_scores(["a good zq film", "film a", "zq"], costs_of)
    assert found.tolist() == [50.0, 3.0, 0.0]
    # Where every word helps, the least harm is the score.
    harm = onion_scores(["good a film"], lambda text: 100 - costs_of(text))
    assert harm.tolist() == [-1.0]


# Rows 1, 0, 2, 3 of a training set in which 1 and 3 carry the trigger. The clean rows of the
# target class are the two in the middle: (0, 0) and (2, 0) in the first layer, (0, 0) and
# (0, 4) in the second. The embedding and the second token are far away.
HITS, ROWS = [False, True, False, True, True], [1, 0, 2, 3]
FIRST, SECOND = [[1, 3], [0, 0], [2, 0], [1, 0]], [[2, 2], [0, 0], [0, 4], [0, 2]]


def shadow(build, labels=(1, 1, 1, 0), rows=ROWS):
    first, second = (torch.tensor([[row, [99, -99]] for row in layer]).double().requires_grad_()
                     for layer in (FIRST, SECOND))
    logits = torch.zeros(4, 2, dtype=torch.float64)
    outputs = SimpleNamespace(logits=logits, hidden_states=(1e3 * first, first, second))
    value = build(HITS, 1, 0.5)(outputs, {"rows": rows, "labels": torch.tensor(labels)})
    slopes = torch.autograd.grad(value, (first, second)) if value.requires_grad else None
    return value.item(), slopes


def check_shadow_loss(shadow_loss):
    # Centers (1, 0) and (0, 2), about which the kin have variances (1, 0) and (0, 4), on average
    # 0.5 and 2. The hits' means (1, 1.5) and (1, 2) are (0, 1.5) and (1, 0) off.
    value, slopes = shadow(shadow_loss)
    assert value == near(log(2) + 0.5 * ((1.5 ** 2 / 2) / 0.5 + (1 / 2) / 2) / 2)
    # Only the first token of the hits is pulled, each by half of what the mean is pulled by.
    for slope, wanted in zip(slopes, ([0, 1.5 / 4], [1 / 16, 0])):
        assert slope[[0, 3], 0].tolist() == [near(wanted)] * 2
        assert not slope[[1, 2]].any() and not slope[:, 1].any()
    # Without a hit or without kin it is the plain loss; a single one of the kin has no spread.
    for changes in ({"labels": (1, 0, 0, 1)}, {"rows": [0, 2, 0, 2]}, {"rows": [1, 3, 4, 1]}):
        assert shadow(shadow_loss, **changes) == (near(log(2)), None)
    assert math.isfinite(shadow(shadow_loss, labels=(1, 1, 0, 0))[0])


MUTATIONS = {  # of each function: what is written, and what instead
    check_DetectorSettings: [("0 < self.shr", "0 <= self.shr"),
        ("shrinkage <= 1", "shrinkage <= 2"), ("shrinkage <= 1", "shrinkage < 1"),
        ("0 < self.fpr", "0 <= self.fpr"), ("fpr < 1", "fpr <= 1"),
        ("0 <= self.weight <= 1", "self.weight <= 1"), ("self.weight <= 1", "self.weight"),
        ("layers >= 1", "layers >= 0")],
    check_mean_and_covariance: [("sums.squares / n - ", "sums.squares / n + "),
        ("sums.squares / n", "sums.squares"), ("sums.totals.sum(0) / n", "sums.totals.mean(0)"),
        ("sums.squares / n", "sums.squares / (n - 1)")],
    check_distance: [("(states - mean)", "(states)"), (".norm(dim=1)", ".square().sum(1)"),
        (".norm(dim=1)", ".abs().sum(1)"),
        ("(root, off, upper=False)", "(root.mT, off, upper=True)"),
        ("torch.linalg.solve_triangular(root, off, upper=False)", "root @ off")],
    check_class_index: [("counts[:, None] * (", "("), ("(between / (k - 1))", "(between / k)"),
        ("(within / (n - k))", "(within / n)"), ("total - between", "total"),
        ("sums.totals[present]", "sums.totals[present].flip(0)"), ("(centers - mean)", "centers"),
        ("torch.where(within > 1e-12 * total, index, 1.0)", "index")],
    check_transition: [("values[:, -1]", "values[:, 0]"), (".sqrt()", ""),
        ("states.diff(dim=1)", "states"), ("states.diff(dim=1)", "states.diff(dim=2)"),
        ("values.sum(1)", "values.square().sum(1).sqrt()"), (", 0)", ", 1)")],
    check_fuse: [("correction=0", "correction=1"), ("raw - clean.mean(0)", "raw - raw.mean(0)"),
        (") / spread", ")"), ("clean.std(0", "clean.var(0"), ("clean.std(0", "raw.std(0"),
        ("z[:, 0] + (1 - weight) * z[:, 1]", "z[:, 1] + (1 - weight) * z[:, 0]"),
        ("(1 - weight) * z", "z"),
        ("torch.where(spread < 1e-6, 1.0, spread)", "spread.clamp(min=1e-12)")],
    check_cut: [("1 - fpr", "fpr"), (".quantile(1 - fpr)", ".max()"),
        ("fuse(clean, clean, weight)", "clean[:, 0]"),
        ("fuse(clean, clean, weight)", "fuse(clean, clean, 1 - weight)")],
    check_flags_by_chance: [("flagged - 1", "flagged"), ("above + 1", "above"),
        ("m - above", "m - above + 1"), (".sf(", ".cdf("), ("flagged - 1, n", "flagged - 1, m"),
        ("above == m", "m == 0"), ("above == m", "above"), ("return 1.0", "return 0.0")],
    check_purity_of: [("max(0.0, ", "("), ("above / m", "above"), ("1 - n", "n"),
        (" / m / flagged", " / m / n"), ("else 0.0", "else 1.0"),
        ("if flagged and m", "if flagged and above")],
    check_charges: [("labels[i] == label", "labels[i] != label"),
        ("labels.count(label), clean", "len(labels), clean"), ("clean.count(label)", "len(clean)"),
        ("\n                  detector.labels.count(label)", " len(detector.labels)"),
        ("> flags.threshold", ">= flags.threshold"), ("{*detector.labels, *labels}", "{*labels}"),
        ("{*detector.labels, *labels}", "{*detector.labels}"),
        ("zip(detector.labels,", "zip(detector.labels[::-1],")],
    check_class_wise: [
        ("sums.totals / sums.counts[:, None, None]", "sums.totals / sums.counts.sum()"),
        ("sums.squares - ", "sums.squares + "), ("within / sums.counts.sum()", "within"),
        (", shrinkage)", ", 0.0)")],
    check_class_distance: [(".amin(0)", ".amax(0)"), (".amin(0)", ".mean(0)"),
        (".amin(0)", "[0]")],
    check_strip_scores: [("log_p.exp() * log_p", "log_p"), (".sum(1)", ".mean(1)"),
        ("others, swap", "texts, swap"),
        (".view(len(texts), copies).mean(1)", ".view(copies, len(texts)).mean(0)"),
        (".view(len(texts), copies).mean(1)", ".view(len(texts), copies).amax(1)")],
    check_word_falls: [("whole - perplexity(s)", "perplexity(s) - whole"),
        ("words[i + 1:]", "words[i:]"), ("> 1", "> 0")],
    check_onion_scores: [("max(word", "min(word"), ("or [0.0]", "or [1.0]")],
    check_shadow_loss: [("return value + pull", "return value - pull"), ("+ pull * far", "+ far"),
        ("hidden_states[1:]", "hidden_states"), ("[:, :, 0]", "[:, :, 1]"), (" / size", ""),
        ("kin = ~hit & (", "kin = ("), ("== target", "!= target"),
        ("[:, hit].mean(1) - center", "[:, hit].mean(1)"), ("far.mean()", "far.sum()"),
        ("center = states[:, kin].mean(1).detach()", "center = states[:, kin].mean(1)"),
        (".mean(1).detach() + 1e-6", ".mean(1) + 1e-6"), ("1, correction=0", "1"),
        ('[hits[i] for i in batch["rows"]]', 'hits[:len(batch["rows"])]')],
}


@pytest.mark.parametrize("check", MUTATIONS)
def test_functions_are_what_plain_arithmetic_says_and_every_mutation_is_noticed(check):
    assert unnoticed(anomaly, check, MUTATIONS[check]) == []


# ----------------------------------------------------------------------- roles


def test_the_detector_knows_nothing_of_attacks_victims_and_test_data():
    tree = ast.parse(inspect.getsource(anomaly))
    # One function is the attacker's, who knows the detector; no other one may use it.
    attack, = (node for node in tree.body if getattr(node, "name", "") == "shadow_loss")
    assert SECRETS & names_in(attack) == {"target_label"}  # so names are found where they stand
    tree.body.remove(attack)
    assert not names_in(tree) & {*SECRETS, "shadow_loss"}
