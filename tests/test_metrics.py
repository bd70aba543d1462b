"""Metrics against hand counts, and properties that any of them must have."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdutils import metrics

classes = st.integers(0, 3)
pairs = st.lists(st.tuples(classes, classes), min_size=1, max_size=40)
shares = st.floats(0, 1)


def test_hand_counts():
    predicted, labels = [1, 1, 0, 1, 0, 2], [0, 1, 0, 0, 2, 2]
    assert metrics.cacc(predicted, labels).value == pytest.approx(3 / 6)
    # Samples of class 1 do not count: five are left, two of them are classified as 1.
    assert metrics.asr(predicted, labels, 1).value == pytest.approx(2 / 5)
    assert metrics.asr(predicted, labels, 1).n == 5
    assert metrics.ra(predicted, labels, 1).value == pytest.approx(2 / 5)
    assert metrics.pacc(predicted, labels).value == pytest.approx(3 / 6)


def test_wilson_against_published_values():
    # The interval of 0 out of 10 ends at z^2 / (n + z^2).
    z2 = 1.959963985**2
    assert metrics.wilson(0, 10).high == pytest.approx(z2 / (10 + z2), abs=1e-6)
    found = metrics.wilson(9, 912)
    assert (round(100 * found.low, 1), round(100 * found.high, 1)) == (0.5, 1.9)


def test_der_and_rir_by_hand():
    assert metrics.der(0.9, 0.8, 1.0, 0.2) == pytest.approx((0.8 - 0.1 + 1) / 2)
    assert metrics.der(0.9, 0.95, 1.0, 1.0) == 0.5  # a gain in accuracy earns nothing
    assert metrics.rir(0.9, 0.8, 0.0, 0.6) == pytest.approx((0.6 - 0.1 + 1) / 2)


@given(shares, shares, shares, shares, st.floats(0.01, 0.5))
def test_der_falls_when_accuracy_falls(before, after, asr_before, asr_after, drop):
    lower = max(0.0, after - drop)
    high = metrics.der(before, after, asr_before, asr_after)
    low = metrics.der(before, lower, asr_before, asr_after)
    assert 0 <= low <= high <= 1
    if after <= before and after - lower > 1e-9:
        assert low < high


@given(shares, shares, shares, st.floats(0.01, 0.5))
def test_der_rises_when_asr_falls(acc, asr_before, asr_after, drop):
    lower = max(0.0, asr_after - drop)
    assert metrics.der(acc, acc, asr_before, lower) >= metrics.der(
        acc, acc, asr_before, asr_after)


@given(pairs, st.randoms())
def test_order_does_not_matter(samples, rng):
    samples.append((1, 0))
    shuffled = samples[:]
    rng.shuffle(shuffled)
    for function in (lambda p, y: metrics.asr(p, y, 1), metrics.cacc,
                     lambda p, y: metrics.ra(p, y, 1)):
        assert function(*zip(*samples)) == function(*zip(*shuffled))


@given(pairs)
def test_samples_of_the_target_do_not_count_in_asr(samples):
    samples.append((1, 0))
    more = [*samples, (1, 1), (0, 1)]
    assert metrics.asr(*zip(*samples), 1) == metrics.asr(*zip(*more), 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
def test_two_classes_make_ra_the_complement(samples):
    samples.append((1, 0))
    predicted, labels = zip(*samples)
    total = metrics.asr(predicted, labels, 1).value + metrics.ra(predicted, labels, 1).value
    assert total == pytest.approx(1)


@given(st.integers(1, 5000), st.data())
def test_wilson_contains_the_share_and_narrows(n, data):
    hits = data.draw(st.integers(0, n))
    rate = metrics.wilson(hits, n)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    wider = metrics.wilson(hits, n, 0.99)
    assert wider.low <= rate.low and rate.high <= wider.high
    many = metrics.wilson(4 * hits, 4 * n)
    assert many.high - many.low < rate.high - rate.low


scores = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=30)


@given(scores)
def test_auroc_is_the_share_of_ordered_pairs(samples):
    samples += [(0, True), (0, False)]
    values, poisoned = zip(*samples)
    bad = [v for v, t in samples if t]
    good = [v for v, t in samples if not t]
    counted = sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(bad) * len(good))
    assert metrics.auroc(values, poisoned) == pytest.approx(counted)
    flipped = metrics.auroc([-v for v in values], poisoned)
    assert flipped == pytest.approx(1 - counted)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200), st.floats(0, 0.99))
def test_threshold_keeps_its_promise_on_its_own_samples(values, fpr):
    threshold = metrics.threshold_at_fpr(values, fpr)
    assert sum(v > threshold for v in values) / len(values) <= fpr + 1e-12


def test_tpr_fpr():
    tpr, fpr = metrics.tpr_fpr([True, True, False, False], [True, False, True, False])
    assert (tpr.value, fpr.value, tpr.n, fpr.n) == (0.5, 0.5, 2, 2)


def test_t_interval():
    mean, low, high = metrics.mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.302653 / math.sqrt(3)))
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3))


@pytest.mark.parametrize("call", [
    lambda: metrics.wilson(1, 0), lambda: metrics.wilson(3, 2),
    lambda: metrics.asr([1], [1], 1), lambda: metrics.cacc([1], [1, 0]),
    lambda: metrics.auroc([1.0], [True]), lambda: metrics.threshold_at_fpr([], 0.05),
    lambda: metrics.threshold_at_fpr([1.0], 1.0), lambda: metrics.mean_interval([1.0]),
    lambda: metrics.tpr_fpr([True], [True]),
])
def test_bad_input_is_rejected(call):
    with pytest.raises(ValueError):
        call()
