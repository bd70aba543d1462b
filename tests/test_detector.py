"""The detector of DUP: scores, threshold, evidence and a relative by hand, and what it may see."""

import ast
import inspect
import math
from dataclasses import replace
from functools import cache, partial
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.checks import has_ranges, near
from helpers.texts import CLEAN, NAMES, PUBLISHED, TRAIN, WORDS, detector, made
from helpers.walls import SECRETS, names_in
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
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
    return Moments.of(states, torch.tensor(labels), classes)


# ------------------------------------------------------------- sums and scores


def check_DetectorConfig(kind):
    has_ranges(kind, [("shrinkage", 1.0), ("weight", 0.0), ("weight", 1.0), ("layers", 1),
                      ("folds", 1), ("choose", "index"), ("fuse", "weighted")],
                 [("shrinkage", 0.0), ("shrinkage", 1.01), ("fpr", 0.0), ("fpr", 1.0),
                  ("weight", -0.01), ("weight", 1.01), ("weight", math.nan), ("layers", 0),
                  ("folds", 0), ("choose", "best"), ("fuse", "sum")])


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
@given(st.permutations(range(24)))
def test_in_any_order_the_statistics_are_those_of_numpy_and_sklearn(order):
    states, labels = random_states(24), [0, 1, 3] * 8  # nobody has class 2
    states += torch.tensor(labels)[:, None, None] * torch.ones(3, 1).tril()
    sums = summed(states[order], [labels[i] for i in order], 4)
    # They do not grow with n.
    assert [t.shape for t in vars(sums).values()] == [(4,), (4, 3, 4), (3, 4, 4)]
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
    chosen = replace(PUBLISHED, pooling=pooling)
    found = dt.fit_detector(made(), CLEAN, chosen, CLEAN)
    score = partial(dt.raw_scores, made(), means=found.means, roots=found.roots, pooling=pooling)
    return score, torch.cat([score([text]) for text in SCORED])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@settings(max_examples=5)
@given(order=st.permutations(range(12)), count=st.integers(1, 12), size=st.integers(1, 12))
def test_a_score_is_the_texts_own(pooling, order, count, size):
    """Whatever the order, the batch and its padding, and how many texts are streamed at once."""
    score, alone = scorer(pooling)
    assert alone.shape == (12, 4) and alone.std(0).min() > 0.01
    indices = order[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dt, "stream", partial(dt.stream, size=size))
        found = score([SCORED[i] for i in indices])
    assert torch.allclose(found, alone[indices], atol=2e-5)


def from_numbers(monkeypatch, states):
    """Let texts be numbers of made-up states, seven at a time."""
    monkeypatch.setattr(dt, "stream", lambda model, texts, pooling: (
        states[[int(t) for t in texts[i:i + 7]]] for i in range(0, len(texts), 7)))


def numbered(labels):
    return CleanSet(tuple(map(str, range(len(labels)))), tuple(labels), NAMES)


def test_no_clean_sample_is_scored_by_a_fit_that_has_seen_it(monkeypatch):
    states = random_states(60, 4, 12)
    from_numbers(monkeypatch, states)
    clean = numbered([0, 1] * 30)
    found = dt.fit_detector(None, clean, DetectorConfig(folds=4))
    assert found.means.shape == (4, 4, 12) and found.clean.shape == (60, 5)
    assert found.labels.tolist() == list(clean.labels)
    for i in (0, 17, 42):
        others = [j for j in range(60) if j % 4 != i % 4]
        one = dt.fit_detector(None, clean.take(others), PUBLISHED, clean.take([i]))
        assert torch.allclose(one.clean[0], found.clean[i], atol=1e-9)
        # Training sample number i is scored by the same fit, which has not seen it either.
        again = dt.raw_scores(None, clean.inputs, found.means, found.roots, "cls")
        assert torch.allclose(again, found.clean, atol=1e-9)
    # Seen, samples look closer than they are: the reason for the folds.
    whole = dt.fit_detector(None, clean, PUBLISHED, clean).clean
    assert whole[:, :4].mean() < 0.95 * found.clean[:, :4].mean()
    with pytest.raises(ValueError, match="one fold needs other clean samples"):
        dt.fit_detector(None, clean, PUBLISHED)


# ------------------------------------------------------- one score, one threshold

# Means 2 and 0.4, spreads 1 and 0.2: in units of these two they are at -1 and +1.
TWO = torch.tensor([[1.0, 0.2], [3.0, 0.6]])


def check_standardize(standardize):
    raw = torch.tensor([[4.0, 0.5], [2.0, 0.2]])
    assert standardize(raw, TWO).flatten().tolist() == near([2.0, 0.5, 0.0, -1.0])
    # What is constant among clean samples is left in its own unit.
    still = torch.tensor([[2.0, 0.4]] * 5)
    assert standardize(raw[:1], still).flatten().tolist() == near([2.0, 0.1])


def check_fuse(fuse):
    # (4 - 2) / 1 = 2 and (0.5 - 0.4) / 0.2 = 0.5; more in one of them is more by its weight.
    raw = torch.tensor([[4.0, 0.5], [5.0, 0.5], [4.0, 0.7]])
    for weight, base in ((1.0, 2.0), (0.0, 0.5), (0.5, 1.25), (0.9, 1.85)):
        assert fuse(raw, TWO, weight).tolist() == near([base, base + weight, base + 1 - weight])


def check_p_values(p_values):
    clean = torch.tensor([[1.0, 8.0], [3.0, 6.0], [2.0, 7.0]])
    new = torch.tensor([[0.0, 9.0], [2.0, 5.0], [2.5, 7.0], [9.0, 8.5]])
    # Of three clean samples so many are as large, and the new one itself makes a fourth.
    assert (4 * p_values(new, clean)).tolist() == [[4, 1], [3, 4], [2, 3], [1, 1]]
    # Each of the three among the three.
    assert (3 * p_values(clean, clean, own=True)).flatten().tolist() == near([3, 1, 1, 3, 2, 2])
    many = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    assert (p_values(many, many, own=True) <= 0.05).sum() == 25


def check_by_label(by_label):
    raw = torch.tensor([[12.0], [1.0], [3.0], [5.0]])
    clean, known = torch.tensor([[10.0], [0.0], [14.0], [2.0]]), torch.tensor([1, 0, 1, 0])
    # Class 1 has mean 12 and spread 2, class 0 has 1 and 1; nobody is like the third.
    found = by_label(dt.standardize, raw, torch.tensor([1, 0, 0, 2]), clean, known)
    assert found.flatten()[:3].tolist() == near([0.0, 0.0, 2.0])
    assert found[3].item() == near((5 - 6.5) / (clean.std(correction=0).item()))
    summed_up = by_label(lambda a, b: a.sum(1) + b.sum(), raw, torch.tensor([1, 0, 0, 1]),
                         clean, known)
    assert summed_up.tolist() == near([36.0, 3.0, 5.0, 29.0])


def odds(count, n):
    return log((count + 0.5) / (n - count + 0.5))


def error(*pairs):
    return math.sqrt(sum(1 / (count + 0.5) + 1 / (n - count + 0.5) for count, n in pairs))


FOUR = ((30, 100), (8, 90), (3, 40), (2, 50))


def check_evidence_of(evidence_of):
    found = [z.item() for z in evidence_of(*(
        (torch.tensor(float(count)), torch.tensor(n)) for count, n in FOUR))]
    target, others, clean, rest = (odds(*pair) for pair in FOUR)
    assert found == near([(target - clean) / error(FOUR[0], FOUR[2]),
                          (target - others - clean + rest) / error(*FOUR)])


def check_label_evidence(label_evidence):
    # As many samples with label 1, and with others, as in the four pairs.
    def flags(*pairs):
        return torch.tensor([i < count for count, n in pairs for i in range(n)])

    labels, known = (torch.tensor([1] * a + [0] * (b // 2) + [2] * (b // 2))
                     for a, b in ((100, 90), (40, 50)))
    high, clean = flags(*FOUR[:2]), flags(*FOUR[2:])
    wanted = dt.evidence_of(*((torch.tensor(float(c)), torch.tensor(n)) for c, n in FOUR))
    assert [z.item() for z in label_evidence(high, labels, clean, known, 1)] == near(
        [z.item() for z in wanted])
    both = label_evidence(torch.stack([high, ~high], 1), labels,
                          torch.stack([clean, clean], 1), known, 1)
    assert [z.shape for z in both] == [(2,), (2,)] and both[1][0].item() == near(wanted[1].item())


def test_flags_that_a_clean_model_raises_more_for_one_label_are_no_contrast():
    """A label that is flagged more among clean samples as well is not suspected for that."""
    for_all = dt.evidence_of(*((torch.tensor(float(c)), torch.tensor(n)) for c, n in (
        (300, 2000), (60, 2000), (60, 400), (12, 400))))
    assert all(abs(z.item()) < 0.3 for z in for_all)
    # Where only the training set has the contrast, it is evidence.
    only = dt.evidence_of(*((torch.tensor(float(c)), torch.tensor(n)) for c, n in (
        (600, 2000), (100, 2000), (20, 400), (20, 400))))
    assert min(z.item() for z in only) > 4


def labelled(n, layers, seed):
    """Return scores (n, layers + 1) of two labels with scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    noise = torch.randn(n, layers + 1, generator=generator, dtype=torch.float64)
    return (1 + 4 * labels[:, None]) * noise + 10 * labels[:, None], labels


def judged(seed=0, shift=0.0, layer=1, **changes):
    """Return a detector and the scores of a training set with a fifth of poison in label 1."""
    clean, known = labelled(400, 3, 100 + seed)
    raw, labels = labelled(1600, 3, seed)
    poisoned = (labels == 1) & (torch.arange(1600) % 5 < 2)
    raw[poisoned, layer] += shift * 5
    config = DetectorConfig(layers=1, **changes)
    judge = dt.Detector(None, None, torch.tensor([3.0, 2.0, 1.0]), clean, known, config)
    return judge, raw, labels, poisoned


def check_choose_layers(choose_layers):
    for layer in (0, 1, 2):
        judge, raw, labels, _ = judged(shift=2.5, layer=layer)
        assert choose_layers(raw, labels, judge) == (layer,)
        # Poison of the other label is found as well.
        judge = replace(judge, labels=1 - judge.labels)
        assert choose_layers(raw, 1 - labels, judge) == (layer,)
    index = replace(judge, config=replace(judge.config, choose="index", layers=2))
    assert choose_layers(raw, labels, index) == (0, 1)


def check_joint_scores(joint_scores):
    judge, raw, labels, poisoned = judged(shift=2.5)
    scores = joint_scores(raw, labels, judge, (1,))
    for label in (0, 1):
        mine, kin = labels == label, judge.labels == label
        p = dt.p_values(raw[mine][:, [1, -1]], judge.clean[kin][:, [1, -1]])
        assert torch.allclose(scores[mine], -p.log().sum(1))
    clean = joint_scores(judge.clean, judge.labels, judge, (1,), own=True)
    # Large where poisoned; of the clean ones one label is flagged as often as the other.
    high = scores > clean.quantile(0.95)
    rates = [high[chosen].double().mean().item() for chosen in (
        poisoned, (labels == 1) & ~poisoned, labels == 0)]
    assert rates[0] > 0.5 and max(rates[1:]) < 0.1
    plain = replace(judge, config=replace(judge.config, by_label=False, fuse="weighted"))
    assert torch.allclose(joint_scores(raw, labels, plain, (0, 2)), dt.fuse(
        dt.in_pairs(raw, (0, 2)), dt.in_pairs(judge.clean, (0, 2)), 0.5))


def test_without_labels_the_wider_one_is_flagged_more_on_clean_data():
    """Labels have scales of their own: the reason to compare with the same label."""
    rates = {}
    for by_label in (True, False):
        judge, raw, labels, _ = judged(by_label=by_label)
        scores = dt.joint_scores(raw, labels, judge, (0, 1))
        clean = dt.joint_scores(judge.clean, judge.labels, judge, (0, 1), own=True)
        high = scores > clean.quantile(0.95)
        rates[by_label] = [high[labels == y].double().mean().item() for y in (0, 1)]
    assert max(rates[True]) < 0.08 and min(rates[True]) > 0.02
    assert rates[False][1] > 0.08 and rates[False][0] < 0.02


def test_the_published_form_calibrates_on_one_part_and_takes_its_scale_from_another(monkeypatch):
    states, labels = random_states(60, 4, 3), tuple(i % 2 for i in range(60))
    for layer, gap in enumerate((0.5, 8.0, 2.0, 4.0)):  # layers 1, 3, 2, 0 in this order
        states[:, layer] += gap * torch.tensor(labels)[:, None]
    from_numbers(monkeypatch, states)
    clean = numbered(labels)
    fit = partial(dt.fit_detector, None)
    first, second = clean.take(range(40)), clean.take(range(59, 39, -1))
    for count, layers in ((1, (1,)), (2, (1, 3)), (3, (1, 3, 2)), (9, (1, 3, 2, 0))):
        one = fit(first, replace(PUBLISHED, layers=count), second)
        assert dt.detect(None, one, clean.inputs, labels).layers == layers
        assert one.labels.tolist() == list(second.labels)
        assert torch.equal(one.clean, dt.raw_scores(
            None, second.inputs, one.means, one.roots, "cls"))
    few = fit(first, one.config, second.take(range(5)))
    assert all(torch.equal(getattr(one, n), getattr(few, n)) for n in ("means", "roots", "index"))
    assert torch.equal(few.clean, one.clean[:5])
    other = fit(first.take(range(20)), one.config, second)
    assert not any(torch.equal(getattr(one, n), getattr(other, n)) for n in ("means", "roots"))


def test_the_flags_of_a_real_model_are_those_of_plain_numpy(monkeypatch):
    """All states at once, inverse and singular values by numpy, threshold by quantile."""
    monkeypatch.setattr(dt, "stream", partial(dt.stream, size=7))
    first, second = CLEAN.take(range(30)), CLEAN.take(range(30, 60))
    chosen = replace(PUBLISHED, fpr=0.3, weight=0.7)
    fitted = dt.fit_detector(made(), first, chosen, second)
    found = dt.detect(made(), fitted, TRAIN.inputs, TRAIN.labels)
    states = [hidden_states(made(), part.inputs)[:, 1:].double().numpy()
              for part in (first, second, TRAIN)]
    index = [calinski_harabasz_score(states[0][:, i], first.labels) for i in range(3)]
    layers = sorted(range(3), key=lambda i: -index[i])[:2]
    assert fitted.index.tolist() == near(index, rel=1e-3) and found.layers == tuple(layers)
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


def check_purity_of(purity_of):
    # A tenth of the clean samples lie above. Of 100 samples 40 are flagged: 33.3 are poisoned, and
    # a tenth of the other 66.7 makes the rest.
    for flagged, wanted in ((40, 5 / 6), (19, 10 / 19), (10, 0.0), (5, 0.0), (0, 0.0)):
        assert purity_of(flagged, 100, 2, 20) == near(wanted)
    assert purity_of(7, 100, 0, 20) == 1.0
    assert purity_of(7, 100, 0, 0) == purity_of(7, 100, 5, 5) == 0.0


def check_evidence_by_class(evidence_by_class):
    # Of ten clean samples two lie above, both of class 1. Flags 1, 2, 3 and 7 carry the labels
    # 1, 1, 0 and 2.
    judge = detector((0,) * 5 + (1,) * 5)
    scores = torch.tensor([0.0, 2, 2, 2, 0, 0, 0, 2])
    flags = Flags((1, 2, 3, 7), scores, None, 1.0, torch.tensor([0.0] * 8 + [2.0] * 2), ())
    found = evidence_by_class(judge, flags, (0, 1, 1, 0, 1, 0, 0, 2))
    assert [suspect.indices for suspect in found] == [(3,), (1, 2), (7,)]
    assert [suspect.purity for suspect in found] == near([1.0, (1 - 3 * 2 / 5 / 2) / 0.6, 0.0])
    pairs = {0: ((1, 4), (3, 4), (0, 5), (2, 5)), 1: ((2, 3), (2, 5), (2, 5), (0, 5)),
             2: ((1, 1), (3, 7), (0, 0), (2, 10))}
    for label, four in pairs.items():
        target, others, clean, rest = (odds(*pair) for pair in four)
        assert found[label].excess == near((target - clean) / error(four[0], four[2]))
        assert found[label].contrast == near((target - others - clean + rest) / error(*four))
        assert found[label].chance == near(norm.sf(found[label].excess))
    # With exactly the threshold a sample is not above it. A label that the training set has not
    # is judged as well.
    half = flags._replace(indices=(0,), scores=torch.tensor([2.0, 1.0]),
                          clean=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    few = evidence_by_class(detector((0, 0, 1, 1)), half, (0, 0))
    assert [c.indices for c in few] == [(0,), ()]
    assert [c.purity for c in few] == [1.0, 0.0]


def false_alarms(rule, runs=40):
    """Return how often a rule raises an alarm on made-up clean models, half with a wide label."""
    alarms = 0
    for seed in range(runs):
        judge, raw, labels, _ = judged(seed, by_label=seed % 2 == 0)
        layers = dt.choose_layers(raw, labels, judge)
        scores = dt.joint_scores(raw, labels, judge, layers)
        clean = dt.joint_scores(judge.clean, judge.labels, judge, layers, own=True)
        line = clean.quantile(0.95).item()
        z = [dt.label_evidence(scores > line, labels, clean > line, judge.labels, y)
             for y in (0, 1)]
        high = (scores > line).double()
        ones, zeros = ((high[labels == y].sum(), (labels == y).sum()) for y in (1, 0))
        z2 = (odds(*(x.item() for x in ones)) - odds(*(x.item() for x in zeros))) / error(
            *(tuple(x.item() for x in pair) for pair in (ones, zeros)))
        alarms += rule(z, abs(z2))
    return alarms / runs


def test_the_contrast_inside_the_training_set_alone_would_suspect_clean_models():
    """Where one label has a wider scale, its samples are flagged more, poison or not."""
    assert false_alarms(lambda z, z2: any(e > 4 and c > 3 for e, c in z)) == 0.0
    assert false_alarms(lambda z, z2: z2 > 3) > 0.3


def test_power_grows_with_the_poison_and_with_the_clean_samples():
    def power(planted=1382, tpr=0.9, each=400, sizes=(3450, 2080), **options):
        return dt.power(tpr, 0.05, planted, sizes, (each, each), **options)

    assert power() > 0.99 and power(planted=0) == 0.0
    few = [power(planted=n) for n in (50, 150, 300, 1000)]
    assert few == sorted(few) and few[0] < 0.05 < 0.9 < few[-1]
    small = [power(each=n, planted=800) for n in (50, 100, 200, 400)]
    assert small == sorted(small) and small[0] < 0.3 < 0.7 < small[-1]
    # Either cut alone leaves more.
    assert power(planted=300, cuts=(4.0, -math.inf)) >= power(planted=300)
    assert power(planted=300, cuts=(-math.inf, 3.0)) >= power(planted=300)
    assert power(tpr=0.05) < 0.01  # poisoned samples that look like clean ones


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
    check_standardize: [
        lambda raw, clean: dt.standardize(raw, raw),
        lambda raw, clean: dt.standardize(raw, clean + 1),
        lambda raw, clean: (raw - clean.mean(0)) / clean.std(0),
        lambda raw, clean: (raw - clean.mean(0)) / clean.std(0, correction=0)],
    check_fuse: [
        lambda raw, clean, weight: dt.fuse(raw, clean, 1 - weight),
        lambda raw, clean, weight: dt.fuse(raw, clean, weight) / 2,
        lambda raw, clean, weight: dt.fuse(raw, clean, 1.0)],
    check_p_values: [
        lambda raw, clean, own=False: dt.p_values(-raw, -clean, own),
        lambda raw, clean, own=False: dt.p_values(raw, clean),
        lambda raw, clean, own=False: dt.p_values(raw, clean, own=True),
        lambda raw, clean, own=False: dt.p_values(raw, clean[:, [0, 0]] if clean.shape[1] > 1
                                                  else clean, own)],
    check_by_label: [
        lambda compare, raw, labels, clean, known: compare(raw, clean),
        lambda compare, raw, labels, clean, known: dt.by_label(
            compare, raw, labels, clean, 1 - known),
        lambda compare, raw, labels, clean, known: dt.by_label(
            compare, raw, labels.sort().values, clean, known)],
    check_evidence_of: [
        lambda target, others, clean, rest: dt.evidence_of(target, others, rest, clean),
        lambda target, others, clean, rest: dt.evidence_of(others, target, clean, rest),
        lambda *four: dt.evidence_of(*four)[::-1],
        lambda *four: dt.evidence_of(*((c + 0.5, n + 1) for c, n in four))],
    check_label_evidence: [
        lambda high, labels, clean, known, label: dt.label_evidence(
            ~high, labels, clean, known, label),
        lambda high, labels, clean, known, label: dt.label_evidence(
            high, labels, clean, known, 0),
        lambda high, labels, clean, known, label: dt.label_evidence(
            clean, known, high, labels, label)],
    check_choose_layers: [
        lambda raw, labels, judge: dt.choose_layers(-raw, labels, judge),
        lambda raw, labels, judge: tuple(range(judge.config.layers)),
        lambda raw, labels, judge: dt.choose_layers(raw, labels, replace(
            judge, config=replace(judge.config, choose="contrast")))],
    check_joint_scores: [
        lambda raw, labels, judge, layers, own=False: dt.joint_scores(
            raw, labels, judge, (0,), own),
        lambda raw, labels, judge, layers, own=False: dt.joint_scores(
            raw, 1 - labels, judge, layers, own),
        lambda raw, labels, judge, layers, own=False: dt.joint_scores(
            raw, labels, replace(judge, config=replace(judge.config, by_label=False)),
            layers, own),
        lambda raw, labels, judge, layers, own=False: dt.joint_scores(
            raw, labels, replace(judge, config=replace(judge.config, fuse="fisher")),
            layers, own)],
    check_purity_of: [
        lambda flagged, n, above, m: max(0, 1 - n * above / m / flagged) if flagged and m else 0.0,
        lambda flagged, n, above, m: dt.purity_of(flagged, m, above, n),
        lambda *given: 1 - dt.purity_of(*given),
        lambda flagged, n, above, m: dt.purity_of(flagged, n, above, m or 1),
        lambda flagged, n, above, m: dt.purity_of(flagged, n, above, m) if above else 0.0],
    check_evidence_by_class: [
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, labels)[::-1],
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, (0,) * len(labels)),
        lambda judge, flags, labels: dt.evidence_by_class(
            replace(judge, labels=judge.labels.flip(0)), flags, labels),
        lambda judge, flags, labels: dt.evidence_by_class(
            judge, flags._replace(threshold=flags.threshold - 1e-6), labels),
        lambda judge, flags, labels: dt.evidence_by_class(judge, flags, labels)[:len({*labels})],
        lambda *given: [c._replace(excess=c.contrast) for c in dt.evidence_by_class(*given)],
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
