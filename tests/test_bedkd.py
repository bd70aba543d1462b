"""BeDKD: the loss by hand, the search, the stopping rule, and what a defense may see."""

import ast
import copy
import inspect
import itertools
import math
import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.checks import has_ranges, same
from scipy.stats import binom, fisher_exact
from torch import nn

from bdutils.defenses import bedkd as akd
from bdutils.defenses import mapping
from bdutils.defenses.base import (
    Context,
    EpochLog,
    accept_if_harmless,
    line_search,
    log_odds,
    log_odds_excess,
    stratified_split,
)
from bdutils.defenses.bedkd import AUTHORS, BeDKD, Seen, finished, go_back, purify
from bdutils.defenses.mapping import (
    LabelCounts,
    LossConfig,
    ModuleConfig,
    ScanConfig,
    TeacherBatch,
    bedkd_loss,
    chance,
    evidence,
    flip,
    gap,
    purity_of_suspects,
    sample_terms,
    scan,
    teacher_batches,
)
from bdutils.experiments import results
from bdutils.roles import CleanSet, TrainSet

# ---------------------------------------------------------------- the loss

# Two samples, K = 3 classes and T = 3 tokens of d = 2 features. The second lies beyond
# both bounds, the first one below; its own last token is padding and differs wildly.
STUDENT = [[2.0, -1.0, 0.5], [0.3, 0.1, -4.0]]
TEACHER = [[1.5, -0.5, 0.5], [-2.0, 1.5, 0.2]]
LABELS = [0, 2]
FEATURES = [[[0.1, 0.2], [0.3, 0.1], [9.0, 7.0]], [[1.0, -1.0], [2.0, 0.0], [0.0, 3.0]]]
THEIRS = [[[0.0, 0.0], [0.1, 0.4], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]]
MASK = [[1, 1, 0], [1, 1, 1]]
TAU, WEIGHT, BOUNDS = 2.5, 0.3, (0.2, 0.5)
CAPS = (0.2 * math.log(3), 0.5)  # the first in units of ln K


def softmax(logits):
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def terms_by_hand(masked):
    ce = [-math.log(softmax(z)[y]) for z, y in zip(STUDENT, LABELS)]
    kl, mse = [], []
    for z, other in zip(STUDENT, TEACHER):
        p, q = softmax([v / TAU for v in other]), softmax([v / TAU for v in z])
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
    for ours, theirs, mask in zip(FEATURES, THEIRS, MASK):
        kept = [(a - b) ** 2 for h, t, m in zip(ours, theirs, mask) if m or not masked
                for a, b in zip(h, t)]
        mse.append(sum(kept) / len(kept))
    return ce, kl, mse


def loss_by_hand(sign, bounded):
    losses = []
    for z, y, ce, kl, mse in zip(STUDENT, LABELS, *terms_by_hand(masked=True)):
        losses.append(sign * (WEIGHT * ce + (1 - WEIGHT) * (kl + mse)))
        if sign < 0 and bounded:
            unlikely = -math.log(1 - softmax(z)[y])
            far = min(kl, CAPS[0]) + min(mse, CAPS[1])
            losses[-1] = WEIGHT * unlikely - (1 - WEIGHT) * far
    return sum(losses) / 2


def check_loss(sample_terms, bedkd_loss):
    """Compare both functions with plain arithmetic."""
    student, features = torch.tensor(STUDENT), torch.tensor(FEATURES)
    batch = TeacherBatch({}, torch.tensor(LABELS), torch.tensor(TEACHER), torch.tensor(THEIRS),
                         torch.tensor(MASK))
    terms = sample_terms(student, features, batch, TAU)
    for found, wanted in zip(terms, terms_by_hand(masked=True)):
        assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    for sign in (1, -1):
        for bounds in (BOUNDS, None):
            found = bedkd_loss(terms, LossConfig(ce_weight=WEIGHT, bounds=bounds), sign, 3)
            assert found.item() == pytest.approx(loss_by_hand(sign, bounds), rel=1e-5)

    everything = terms_by_hand(masked=False)[2]
    whole = sample_terms(student, features, batch._replace(mask=None), TAU)[2]
    assert whole.tolist() == pytest.approx(everything, rel=1e-5)
    image = batch._replace(mask=None, features=batch.features.view(2, 1, 3, 2))
    pixels = sample_terms(student, features.view(2, 1, 3, 2), image, TAU)[2]
    assert pixels.tolist() == pytest.approx(everything, rel=1e-5)

    # A bound acts on single samples: only the one beyond it loses the gradient of that term.
    trust = [[share / 2] * 2 for share in (WEIGHT, 1 - WEIGHT, 1 - WEIGHT)]
    odds = [p / (1 - p) for p in (softmax(z)[y] for z, y in zip(STUDENT, LABELS))]
    punish = [[-WEIGHT * odd / 2 for odd in odds], *[[-(1 - WEIGHT) / 2, 0.0]] * 2]
    for sign, wanted in ((1, trust), (-1, punish)):
        leaves = [t.detach().requires_grad_() for t in terms]
        bedkd_loss(leaves, LossConfig(ce_weight=WEIGHT, bounds=BOUNDS), sign, 3).backward()
        for leaf, gradient in zip(leaves, wanted):
            assert leaf.grad.tolist() == pytest.approx(gradient, rel=1e-5)


def test_the_example_has_a_sample_on_each_side_of_every_bound():
    for (below, beyond), cap in zip(terms_by_hand(masked=True)[1:], CAPS):
        assert below < cap < beyond


def test_the_loss_is_what_plain_arithmetic_says():
    check_loss(sample_terms, bedkd_loss)


# A flaw changes what goes into the loss, or what comes out of it, in trust steps (with punish
# steps without bounds, which are the same formula) or in bounded punish steps.
def is_bounded(config, sign):
    return sign < 0 and config.bounds is not None


def trust_flaw(change):
    def loss(terms, config, sign, classes):
        return (bedkd_loss if is_bounded(config, sign) else change)(terms, config, sign, classes)
    return sample_terms, loss


def punish_flaw(change):
    def loss(terms, config, sign, classes):
        return (change if is_bounded(config, sign) else bedkd_loss)(terms, config, sign, classes)
    return sample_terms, loss


def without(*places):
    """Return the loss in which some terms count nothing."""
    def loss(terms, config, sign, classes):
        terms = [t.clone() for t in terms]
        for i in places:
            terms[i] = terms[i] * 0
        if is_bounded(config, sign) and 0 in places:
            terms[0] = terms[0] + math.inf  # -ln(1 - p) is 0 there
        return bedkd_loss(terms, config, sign, classes)
    return loss


def swapped(terms, config, sign, classes):
    return bedkd_loss(terms, replace(config, ce_weight=1 - config.ce_weight), sign, classes)


def scaled(factor):
    return lambda terms, *rest: factor * bedkd_loss(terms, *rest)


def near(terms, *rest):
    return 2 * without(1, 2)(terms, *rest) - bedkd_loss(terms, *rest)


def likelihood(terms, config, sign, classes):
    return (without(0)(terms, config, sign, classes) - config.ce_weight * terms[0].mean())


def averaged(place):
    def loss(terms, *rest):
        terms = list(terms)
        terms[place] = terms[place].mean().expand_as(terms[place])
        return bedkd_loss(terms, *rest)
    return loss


def bounded_by(change):
    def loss(terms, config, sign, classes):
        return bedkd_loss(terms, replace(config, bounds=change(*config.bounds, classes)), sign,
                          classes)
    return loss


def term_flaw(place, change):
    """Return the terms with one of them replaced by that of changed arguments."""
    def terms(*arguments):
        made = list(sample_terms(*arguments))
        made[place] = change(*arguments)
        return made
    return terms, bedkd_loss


def reversed_kl(logits, features, batch, tau):
    return sample_terms(batch.logits, features, batch._replace(logits=logits), tau)[1]


def divided_by_all(logits, features, batch, tau):
    if batch.mask is None:
        return sample_terms(logits, features, batch, tau)[2]
    share = batch.mask.sum(1) / batch.mask.shape[1]
    return sample_terms(logits, features, batch, tau)[2] * share


FLAWS = {
    "drop CE": trust_flaw(without(0)),
    "drop KL": trust_flaw(without(1)),
    "drop MSE": trust_flaw(without(2)),
    "drop CE in punish": punish_flaw(without(0)),
    "drop KL in punish": punish_flaw(without(1)),
    "drop MSE in punish": punish_flaw(without(2)),
    "swap the weights": trust_flaw(swapped),
    "swap the weights in punish": punish_flaw(swapped),
    "wrong sign": trust_flaw(scaled(-1)),
    "no sign": trust_flaw(lambda terms, config, sign, k: bedkd_loss(terms, config, 1, k)),
    "wrong sign in punish": punish_flaw(scaled(-1)),
    "near in punish": punish_flaw(near),
    "likelihood in punish": punish_flaw(likelihood),
    "sum over the batch": trust_flaw(scaled(2)),
    "sum over the punished": punish_flaw(scaled(2)),
    "bounds in trust": (sample_terms, lambda terms, config, sign, k: bedkd_loss(
        terms, config, sign if config.bounds is None else -1, k)),
    "no bounds": punish_flaw(lambda terms, config, sign, k: bedkd_loss(
        terms, replace(config, bounds=None), sign, k)),
    "a bound of the batch's KL": punish_flaw(averaged(1)),
    "a bound of the batch's MSE": punish_flaw(averaged(2)),
    "a bound in nats": punish_flaw(bounded_by(lambda kl, mse, k: (kl / math.log(k), mse))),
    "a bound of the features in nats": punish_flaw(
        bounded_by(lambda kl, mse, k: (kl, mse * math.log(k)))),
    "bounds for two classes": punish_flaw(
        lambda terms, config, sign, k: bedkd_loss(terms, config, sign, 2)),
    "swap KL": term_flaw(1, reversed_kl),
    "KL without temperature": term_flaw(1, lambda logits, features, batch, tau: sample_terms(
        logits * tau, features, batch, tau)[1]),
    "factor tau^2": term_flaw(1, lambda *all: sample_terms(*all)[1] * all[-1] ** 2),
    "temperature in CE": term_flaw(0, lambda logits, features, batch, tau: sample_terms(
        logits / tau, features, batch, tau)[0]),
    "ignore the mask": term_flaw(2, lambda logits, features, batch, tau: sample_terms(
        logits, features, batch._replace(mask=None), tau)[2]),
    "mask, but divide by all": term_flaw(2, divided_by_all),
}


@pytest.mark.parametrize("name", FLAWS)
def test_every_flaw_of_the_loss_is_noticed(name):
    with pytest.raises(AssertionError):
        check_loss(*FLAWS[name])


def test_no_flaw_at_all_goes_through_the_same_check():
    # Otherwise an error of the machinery would look like a flaw that was noticed.
    check_loss(*trust_flaw(without()))
    check_loss(*punish_flaw(scaled(1)))
    check_loss(*punish_flaw(bounded_by(lambda kl, mse, classes: (kl, mse))))
    check_loss(*term_flaw(1, lambda *all: sample_terms(*all)[1]))


def pull(margin):
    """Return the first punish step's pull at the gap of two logits, teacher and student equal."""
    logits = torch.tensor([[0.0, margin]], requires_grad=True)
    batch = TeacherBatch({}, torch.tensor([1]), logits.detach(), torch.zeros(1, 1), None)
    terms = sample_terms(logits, torch.zeros(1, 1), batch, TAU)
    bedkd_loss(terms, LossConfig(), -1).backward()
    assert logits.grad.isfinite().all()
    return logits.grad[0, 1].item()


def test_punishing_is_steep_where_the_model_is_confident_and_flat_where_it_is_not():
    pulls = [pull(margin) for margin in (-20.0, -5.0, 0.0, 5.0, 10.0)]
    share = LossConfig().ce_weight
    assert pulls == pytest.approx([share * p for p in (2e-9, 0.0067, 0.5, 0.9933, 1.0)],
                                  rel=0.01, abs=1e-8)


def test_the_most_confident_samples_are_punished_too():
    """Float32 rounds 1 - p to a few digits there, hence the tolerance."""
    assert pull(15.0) == pytest.approx(LossConfig().ce_weight, rel=0.3)


@pytest.mark.parametrize("tau, classes, kept, change", [
    (1.0, 2, 0.70, 0.30), (1.5, 2, 0.63, 0.37), (2.5, 2, 0.455, 0.545), (1.5, 4, 0.63, 0.185)])
def test_the_module_stops_halfway(tau, classes, kept, change):
    # A teacher with 99.99% for class 0, the label says class 1, features are equal. (At a
    # temperature of 2.5 the more confident teachers count: without limit it would be 0.476.)
    teacher = torch.zeros(1, classes, dtype=torch.float64)
    teacher[0, 0] = 9.0
    batch = TeacherBatch({}, torch.tensor([1]), teacher, torch.zeros(1, 1), None)
    logits = torch.zeros_like(teacher).requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10,
                               tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = bedkd_loss(sample_terms(logits, batch.features, batch, tau), LossConfig())
        loss.backward()
        return loss

    solver.step(closure)
    assert logits.detach().softmax(1)[0, 0].item() == pytest.approx(kept, abs=0.006)
    assert gap(teacher, logits.detach(), mean=True).item() == pytest.approx(change, abs=0.006)


# ------------------------------------------------------ batches and labels


def samples_of(role, labels, names=("negative", "positive"), tag="sample"):
    return role(tuple(f"{tag} {i}" for i in range(len(labels))), tuple(labels), names)


@pytest.mark.parametrize("k", [2, 4])
def test_flip_goes_round(k):
    examples = samples_of(CleanSet, [*range(k), 0], tuple("abcd"[:k]))
    assert flip(examples).labels == (*range(1, k), 0, 1)
    assert flip(examples).inputs == examples.inputs
    again = examples
    for _ in range(k):
        again = flip(again)
    assert again == examples


def test_clean_samples_are_divided_once_and_with_equal_shares_of_each_class():
    clean = samples_of(CleanSet, [0] * 40 + [1] * 20)
    parts = stratified_split(clean, BeDKD().shares, 0)
    assert [Counter(part.labels) for part in parts] == [
        {0: 8, 1: 4}, {0: 24, 1: 12}, {0: 8, 1: 4}]
    divided = [sample for part in parts for sample in zip(part.inputs, part.labels)]
    assert sorted(divided) == sorted(zip(clean.inputs, clean.labels))
    assert all(type(part) is CleanSet for part in parts)
    assert stratified_split(clean, BeDKD().shares, 0) == parts
    assert stratified_split(clean, BeDKD().shares, 1) != parts
    assert stratified_split(clean, AUTHORS.shares, 0)[2] is None


@pytest.mark.parametrize("labels", [[0] * 40 + [1] * 2, [0] * 2 + [1] * 40])
def test_too_few_clean_samples_are_rejected(labels):
    with pytest.raises(ValueError, match="2 clean samples of class . cannot be divided"):
        stratified_split(samples_of(CleanSet, labels), BeDKD().shares, 0)


def test_rounding_loses_no_sample():
    """Rounded one by one, three samples would be divided as 1 + 2 + 1."""
    parts = stratified_split(samples_of(CleanSet, [0] * 40 + [1] * 3), BeDKD().shares, 0)
    assert [part.labels.count(1) for part in parts] == [1, 1, 1]


def test_shares_beyond_one_are_rejected():
    with pytest.raises(ValueError, match="sum to 1 at most"):
        stratified_split(samples_of(CleanSet, [0, 1] * 40), (0.5, 0.5, 0.5), 0)


def test_every_sample_is_prepared_once_with_the_teachers_answer(tiny, toy_task):
    clean = toy_task.clean
    batches = teacher_batches(tiny, clean, 6, seed=0)
    assert [len(batch.labels) for batch in batches] == [6, 6, 6, 2]
    found = [(tuple(ids[mask.bool()].tolist()), label) for batch in batches for ids, mask, label
             in zip(batch.inputs["input_ids"], batch.mask, batch.labels.tolist())]
    assert sorted(found) == sorted(zip(map(tuple, tiny.encode(clean.inputs)), clean.labels))
    for batch in batches:
        with torch.no_grad():
            out = tiny.model(**batch.inputs, output_hidden_states=True)
        assert torch.equal(batch.logits, out.logits) and not batch.logits.requires_grad
        assert torch.equal(batch.features, out.hidden_states[-1])
    again = teacher_batches(tiny, clean, 6, seed=0, masked=False)
    assert [b.labels.tolist() for b in again] == [b.labels.tolist() for b in batches]
    assert all(batch.mask is None for batch in again)
    other = teacher_batches(tiny, clean, 6, seed=1)
    assert [b.labels.tolist() for b in other] != [b.labels.tolist() for b in batches]


def test_padding_does_not_move_the_masked_distance(tiny):
    texts = ("dull .", "a long , warm and funny film that never loses its way")
    clean = CleanSet(texts, (0, 1), ("negative", "positive"))
    student = copy.deepcopy(tiny.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn_like(weight)
        together = teacher_batches(tiny, clean, 16, seed=0)[0]
        alone = [teacher_batches(tiny, clean.take([i]), 16, seed=0)[0] for i in range(2)]
        distance = sample_terms(*mapping.read_text(student, together.inputs), together, 1.0)[2]
        single = [sample_terms(*mapping.read_text(student, b.inputs), b, 1.0)[2].item()
                  for b in alone]
    assert sorted(distance.tolist()) == pytest.approx(sorted(single), rel=1e-4)
    assert min(single) > 1e-4


def test_learning_says_how_many_classes_there_are_and_returns_mean_terms(monkeypatch):
    torch.manual_seed(0)
    student, seen = nn.Linear(3, 4), []
    batches = [TeacherBatch({"x": torch.randn(2, 3)}, torch.tensor([0, 3]), torch.randn(2, 4),
                            torch.randn(2, 1, 4), None) for _ in range(2)]
    with torch.no_grad():
        each = [sample_terms(*read_linear(student, b.inputs), b, 2.5) for b in batches]
    wanted = [sum(terms[i].mean().item() for terms in each) / 2 for i in range(3)]

    def loss(terms, config, sign, num_labels):
        seen.append((sign, num_labels))
        return bedkd_loss(terms, config, sign, num_labels)

    monkeypatch.setattr(mapping, "bedkd_loss", loss)
    still = mapping.adam(student, 0.0)
    means = mapping.learn(student, batches, still, LossConfig(), 2.5, -1, read_linear)
    assert means.tolist() == pytest.approx(wanted, rel=1e-5)
    assert seen == [(-1, 4)] * 2 and not student.training
    assert mapping.learn(student, [], still, LossConfig(), 2.5).tolist() == [0.0] * 3


@pytest.mark.parametrize("sign", [1, -1])
def test_learning_goes_near_or_away(linear, sign):
    student, batches = copy.deepcopy(linear[0]), linear[1]
    config = LossConfig(ce_weight=0.5, bounds=None)
    optimizer = mapping.adam(student, 0.01)
    first = mapping.learn(student, batches, optimizer, config, 1.0, sign, read_linear)
    for _ in range(5):
        last = mapping.learn(student, batches, optimizer, config, 1.0, sign, read_linear)
    assert sign * (last.sum() - first.sum()) < 0


def test_the_module_is_a_repeatable_copy(tiny, toy_task):
    before = copy.deepcopy(tiny.model.state_dict())
    batches = teacher_batches(tiny, flip(toy_task.clean), 8, seed=0)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two = (mapping.mapping_module(tiny.model, batches, ModuleConfig(epochs=2), LossConfig(),
                                       lr=1e-3, seed=0) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state()) and not one.training
    assert same(one.state_dict(), two.state_dict()) and same(before, tiny.model.state_dict())
    assert not same(before, one.state_dict())


def test_the_module_has_a_temperature_and_epochs_of_its_own(linear, monkeypatch):
    epochs = []
    monkeypatch.setattr(mapping, "learn", lambda model, batches, optimizer, loss, temperature,
                        sign=1, read=None: epochs.append((temperature, sign, len(batches),
                                                          optimizer.defaults["lr"])))
    mapping.mapping_module(linear[0], linear[1], ModuleConfig(epochs=3), LossConfig(), lr=0.5,
                           seed=0, read=read_linear)
    assert epochs == [(1.5, 1, 2, 0.5)] * 3


def test_ranges():
    has_ranges(LossConfig, [("ce_weight", 0), ("ce_weight", 1)],
               [("ce_weight", -0.1), ("ce_weight", 1.1)])
    has_ranges(ModuleConfig, [("epochs", 1), ("temperature", 0.1)],
               [("epochs", 0), ("temperature", 0)])
    has_ranges(ScanConfig, [("fprs", (0,)), ("fprs", (0.5, 1)), ("max_flagged", 1)],
               [("fprs", (-0.1,)), ("fprs", (0.1, 1.1)), ("fprs", ()), ("max_flagged", 0)])
    has_ranges(BeDKD, [("cycles", 1), ("settle", 1), ("punish_lr", 0), ("trust_steps", 0)],
               [("lr", 0), ("temperature", 0), ("batch_size", 0), ("cycles", 0), ("settle", 0)])


# ----------------------------------------------------------------- the scan


def test_gap_by_hand():
    one, two = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(), torch.tensor([[0.6, 0.4],
                                                                          [0.5, 0.5]]).log()
    assert gap(one, two).tolist() == pytest.approx([0.3, 0.0], abs=1e-6)
    assert gap(one, two, mean=True).tolist() == pytest.approx([0.3, 0.0], abs=1e-6)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_mean_gap_shrinks_with_the_number_of_classes(k):
    generator = torch.Generator().manual_seed(0)
    one, two = (5 * torch.randn(200, k, generator=generator) for _ in range(2))
    half, mean = gap(one, two), gap(one, two, mean=True)
    assert half.min() >= 0 and half.max() <= 1 + 1e-6
    assert torch.allclose(mean, half * 2 / k, atol=1e-6)
    away = 100 * torch.eye(k)
    assert gap(away, away.roll(1, 1)).tolist() == pytest.approx([1.0] * k)


@pytest.mark.parametrize("flagged, scanned, above, clean", [
    (120, 700, 16, 320), (30, 700, 16, 320), (3, 128, 16, 32), (0, 4, 3, 5), (4, 4, 0, 5)])
def test_chance_is_fishers_exact_test(flagged, scanned, above, clean):
    table = [[flagged, scanned - flagged], [above, clean - above]]
    wanted = fisher_exact(table, alternative="greater").pvalue
    assert chance(flagged, scanned, above, clean) == pytest.approx(wanted, rel=1e-6)


def test_chance_without_samples_on_one_side_is_one():
    assert [chance(5, 5, 0, 0), chance(0, 0, 3, 5), chance(0, 0, 0, 0)] == [1.0] * 3


def test_evidence_by_hand():
    # Label 1: 4 of its 5 training samples and none of its 3 clean ones are flagged.
    counts = (LabelCounts(30, 1, 1, 20, 1, 1), LabelCounts(5, 4, 2, 3, 0, 0))
    tail = math.comb(5, 4) * math.comb(3, 0) / math.comb(8, 4)
    assert evidence(counts) == pytest.approx([1.0, 2 * tail])
    assert evidence(counts, thresholds=3) == pytest.approx([1.0, 6 * tail])
    assert evidence((LabelCounts(300, 3, 3), LabelCounts(300, 100, 90))) == [1.0, 1.0]


def drawn(rng, poisoned, rates=(0.01, 0.06), scanned=1500, clean=320):
    """Return counts of a model that is much surer of one class than of the other."""
    counts = []
    for label, rate in enumerate(rates):
        bad = poisoned if label else 0
        flags, above = rng.binomial(scanned, rate) + bad, rng.binomial(clean, rate)
        counts.append(LabelCounts(scanned + bad, flags, flags, clean, above, above))
    return tuple(counts)


def by_share(counts):
    """Compare with a label's share of the data, as if all labels were flagged alike."""
    flagged, scanned = (sum(own[i] for own in counts) for i in (1, 0))
    return [min(1.0, len(counts) * float(
        binom.sf(own.flagged - 1, flagged, own.scanned / scanned))) for own in counts]


def against_other_labels(counts):
    """Compare what labels the flags have, as the rule before did, which has little power."""
    flags, above = (sum(own[i] for own in counts) for i in (1, 4))
    return [min(1.0, len(counts) * chance(own.flagged, flags, own.clean_flagged, above))
            for own in counts]


def check_evidence(rule):
    """Draw 400 models without and 200 with a backdoor, of which 60 or 150 samples are found."""
    rng = np.random.default_rng(0)
    alarms = [min(rule(drawn(rng, 0))) < 0.02 for _ in range(400)]
    assert sum(alarms) <= 14  # 8 at the stated rate, and two deviations more
    for rates, poisoned in (((0.01, 0.03), 150), ((0.06, 0.06), 150), ((0.02, 0.02), 100)):
        found = [rule(drawn(rng, poisoned, rates))[1] < 1e-3 for _ in range(100)]
        assert sum(found) >= 80


def test_false_alarms_are_as_rare_as_stated():
    check_evidence(evidence)


@pytest.mark.parametrize("flaw", [
    by_share,
    against_other_labels,
    lambda counts: evidence(tuple(own._replace(clean_flagged=13) for own in counts)),
    lambda counts: evidence(counts)[::-1],
    lambda counts: [1.0, 1.0]])
def test_every_flaw_of_the_evidence_is_noticed(flaw):
    with pytest.raises(AssertionError):
        check_evidence(flaw)


def check_purity(purity_of_suspects):
    """Expect the share that is poisoned when clean samples are suspects at a known rate."""
    # 200 of 1,000 samples are poisoned, 5% of the other 800 are suspects; the other label has as
    # many suspects as by chance.
    own = LabelCounts(1000, 300, 240, 400, 40, 20)
    other = LabelCounts(1000, 100, 50, 400, 40, 20)
    assert purity_of_suspects((own,)) == pytest.approx(200 / 240)
    assert purity_of_suspects((own, other)) == pytest.approx(200 / 290)
    assert purity_of_suspects((other, other)) == 0
    assert math.isnan(purity_of_suspects((LabelCounts(9, 0, 0, 9, 0, 0),)))
    assert purity_of_suspects((LabelCounts(9, 9, 9, 3, 3, 3),)) == 0  # no sample moves
    assert purity_of_suspects((LabelCounts(9, 9, 9),)) == 1.0  # nothing is known


def test_purity_by_hand():
    check_purity(purity_of_suspects)


@pytest.mark.parametrize("flaw", [
    lambda counts: 1.0,
    lambda counts: purity_of_suspects([own._replace(clean_suspects=own.clean_flagged)
                                       for own in counts]),
    lambda counts: purity_of_suspects([own._replace(suspects=own.flagged) for own in counts]),
    lambda counts: purity_of_suspects([own._replace(scanned=own.scanned // 2) for own in counts]),
    lambda counts: sum(max(0, own.suspects - own.scanned * own.clean_suspects / max(1, own.clean))
                       for own in counts) / (sum(own.suspects for own in counts) or math.nan)])
def test_every_flaw_of_the_purity_is_noticed(flaw):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_purity(flaw)


class Table:
    """Stands for a classifier: fixed probabilities for each text."""

    def __init__(self, table):
        self.table = table

    def logits(self, texts):
        return torch.tensor([self.table[text] for text in texts]).log()


def stage(gaps, labels=None, guesses=None, tag="sample"):
    """Return a training set, and two classifiers with these gaps and guesses on it."""
    labels = labels or [1] * len(gaps)
    guesses = guesses or labels
    before, after = {}, {}
    for i, (delta, guess) in enumerate(zip(gaps, guesses)):
        for table, top in ((before, 0.9), (after, 0.9 - delta)):
            table[f"{tag} {i}"] = (1 - top, top) if guess else (top, 1 - top)
    return samples_of(TrainSet, labels, tag=tag), Table(before), Table(after)


IN_FILE_ORDER = ScanConfig(threshold=0.1, shuffled=False, alpha=1.0)


def test_the_scan_flags_small_gaps_and_keeps_what_the_teacher_believes():
    train, teacher, module = stage([0.0, 0.4, 0.05, 0.3, 0.02, 0.09], labels=[1, 1, 0, 0, 0, 1],
                                   guesses=[1, 1, 1, 0, 0, 1])
    found = scan(teacher, module, train, None, IN_FILE_ORDER, 0)
    assert found.indices == (0, 4, 5)  # sample 2 is flagged, but the teacher says 1
    assert (found.flagged, found.scanned, found.threshold) == (4, 6, 0.1)
    assert len(found.held_out_gaps) == 0
    assert found.chance == 1.0  # there is nothing to compare the flags with
    assert found.counts == (LabelCounts(3, 2, 1), LabelCounts(3, 2, 2)) and found.purity == 1.0


def test_the_scan_stops_at_its_cap():
    train, teacher, module = stage([0.0, 0.4] * 100, guesses=[1, 1, 0, 0] * 50)
    found = scan(teacher, module, train, None, replace(IN_FILE_ORDER, max_flagged=50), 0)
    assert found.indices == tuple(range(0, 100, 4))  # the cap counts before the teacher is asked
    assert (found.flagged, found.scanned) == (50, 99)  # not one sample further
    whole = scan(teacher, module, train, None, replace(IN_FILE_ORDER, max_flagged=101), 0)
    assert (whole.flagged, whole.scanned) == (100, 200)


def with_clean(train, clean):
    """Return two classifiers, and clean samples, of what `stage` made."""
    held, one, two = clean
    for table, more in zip(train[1:], (one, two)):
        table.table |= more.table
    return train, CleanSet(held.inputs, held.labels, held.label_names)


def test_the_evidence_is_of_flagged_samples_among_scanned_ones():
    labels = [1, 0] * 10 + [1] * 100
    staged = stage([0.0, 0.4] * 60, labels=labels, guesses=[1, 1, 0, 0] * 30)
    (train, teacher, module), held = with_clean(staged, stage(
        [0.0, 0.4, 0.0, 0.4, 0.4, 0.4], [0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 1], tag="clean"))
    config = replace(IN_FILE_ORDER, max_flagged=10, alpha=0.5)
    found = scan(teacher, module, train, held, config, 0)
    assert found.scanned == 19 and len(found.indices) == 5
    assert found.counts == (LabelCounts(9, 0, 0, 3, 1, 1), LabelCounts(10, 10, 5, 3, 1, 0))
    assert found.chance == evidence(found.counts)[1] < 0.5
    assert found.purity == purity_of_suspects(found.counts[1:]) == 1.0


def separated(poisoned, shift):
    """Return 2,000 samples, of which some of label 1 have gaps just above `shift`.

    Gaps of clean samples are spread over 0 to 1, and so are those of 400 held-out ones.
    """
    rng = random.Random(0)
    gaps = [rng.random() * 0.9 for _ in range(2000)]
    gaps[:2 * poisoned:2] = [shift + 0.0005 * rng.random() for _ in range(poisoned)]
    staged = stage(gaps, labels=[1, 0] * 1000)
    return with_clean(staged, stage([0.9 * (i + 0.5) / 400 for i in range(400)],
                                    labels=[1, 1, 0, 0] * 100, tag="clean"))


@pytest.mark.parametrize("shift, fpr", [(0.0, 0.02), (0.03, 0.05), (0.06, 0.1), (0.1, 0.2)])
def test_the_threshold_rises_until_a_label_stands_out(shift, fpr):
    (train, teacher, module), held = separated(300, shift)
    found = scan(teacher, module, train, held, ScanConfig(max_flagged=1000), 0)
    assert found.threshold == pytest.approx(0.9 * fpr, abs=0.005)
    assert found.chance < 1e-3 and found.chance == evidence(found.counts, thresholds=4)[1]
    # Only samples of the label that stands out are suspects.
    assert set(train.labels[i] for i in found.indices) == {1} and found.counts[0].suspects > 5
    assert found.purity == pytest.approx(
        sum(i < 600 for i in found.indices) / len(found.indices), abs=0.1)


def test_without_evidence_there_are_no_suspects():
    (train, teacher, module), held = separated(0, 0.0)
    found = scan(teacher, module, train, held, ScanConfig(max_flagged=1000), 0)
    assert found.chance > 1e-3 and found.indices == () and found.scanned == 2000
    assert math.isnan(found.purity)


def test_a_sample_is_measured_once_whatever_the_thresholds():
    (train, teacher, module), held = separated(300, 0.06)
    asked = Counter()

    class Counting(Table):
        def logits(self, texts):
            asked.update(texts)
            return super().logits(texts)

    scan(Counting(teacher.table), module, train, held, ScanConfig(), 0)
    assert set(asked.values()) == {1}


def test_the_scan_goes_through_the_file_or_at_random():
    train, teacher, module = stage([0.0] * 100)
    cap = replace(IN_FILE_ORDER, max_flagged=20)
    assert scan(teacher, module, train, None, cap, 0).indices == tuple(range(20))
    found = [scan(teacher, module, train, None, replace(cap, shuffled=True), seed).indices
             for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 20
    assert found[0] != tuple(sorted(found[0])) and max(found[0]) > 50


def test_the_threshold_itself_is_not_below_the_threshold():
    train, teacher, module = stage([0.25, 0.5, 0.125])
    edge = gap(teacher.logits(train.inputs), module.logits(train.inputs))[0].item()
    assert scan(teacher, module, train, None,
                replace(IN_FILE_ORDER, threshold=edge), 0).indices == (2,)
    assert scan(teacher, module, train, None, replace(
        IN_FILE_ORDER, threshold=math.nextafter(edge, 1)), 0).indices == (0, 2)


@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_the_threshold_is_a_quantile_of_held_out_gaps(fpr):
    gaps = [0.2 + 0.005 * i for i in range(101)]
    random.Random(0).shuffle(gaps)
    held, one, two = stage(gaps, tag="clean")
    held = CleanSet(held.inputs, held.labels, held.label_names)
    train, teacher, module = stage([0.01, 0.21, 0.35, 0.5])
    teacher.table |= one.table
    module.table |= two.table
    found = scan(teacher, module, train, held,
                 ScanConfig(threshold=None, fprs=(fpr,), shuffled=False, alpha=1.0), 0)
    assert found.threshold == pytest.approx(0.2 + 0.5 * fpr, abs=1e-5)
    assert found.held_out_gaps.tolist() == pytest.approx(gaps, abs=1e-5)
    assert sum(g < found.threshold for g in found.held_out_gaps.tolist()) == 100 * fpr
    assert found.indices == tuple(i for i, g in enumerate([0.01, 0.21, 0.35, 0.5])
                                  if g < 0.2 + 0.5 * fpr)


def test_a_threshold_needs_a_number_or_held_out_samples():
    train, teacher, module = stage([0.0])
    with pytest.raises(ValueError, match="needs held-out samples: give threshold"):
        scan(teacher, module, train, None, ScanConfig(), 0)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_scan_does_not_depend_on_batches(size, monkeypatch):
    rng = random.Random(0)
    gaps = [rng.random() * 0.5 for _ in range(150)]
    train, teacher, module = stage(gaps, labels=[rng.randrange(2) for _ in gaps],
                                   guesses=[rng.randrange(2) for _ in gaps])
    config = replace(IN_FILE_ORDER, shuffled=True, max_flagged=20)
    usual = scan(teacher, module, train, None, config, 0)
    monkeypatch.setattr(mapping, "_search", partial(mapping._search, size=size))
    found = scan(teacher, module, train, None, config, 0)
    assert found._replace(held_out_gaps=None) == usual._replace(held_out_gaps=None)


# ------------------------------------------------- adversarial distillation


NAN = math.nan


@pytest.mark.parametrize("seen, settle, done", [
    ([(1.0, NAN, NAN), (0.6, NAN, NAN)], 4, False),
    ([(1.0, NAN, NAN), (0.3, 0.1, 0.5)], 4, False),
    ([(1.0, NAN, NAN), (0.3, 0.1, 0.0)], 4, True),
    ([(1.0, NAN, NAN), (0.3, 0.1, -0.5)], 4, True),
    ([(1.0, NAN, NAN), (0.1, 0.1, 0.5)], 4, True),  # no more than among clean samples
    ([(1.0, NAN, NAN), (0.1, 0.2, 0.5)], 4, True),
    ([(0.4, 0.1, -0.5), (0.4, 0.1, 0.5)], 4, False),  # the last one counts
    ([(1.0, 0.1, 9.0), *[(0.4, 0.1, 1.0)] * 3], 4, False),
    ([(1.0, 0.1, 9.0), *[(0.4, 0.1, 1.0)] * 4], 4, True),  # has turned for good
    ([(1.0, 0.1, 9.0), (0.4, 0.1, 1.0), (0.9, 0.1, 1.0), (0.4, 0.1, 1.0)], 2, True),
    ([(1.0, 0.1, 9.0), *[(0.5, 0.1, 1.0)] * 3], 1, False),  # one half has not turned
    ([(NAN, NAN, NAN)] * 9, 1, False),  # nothing to observe
])
def test_the_stopping_rule(seen, settle, done):
    history = [EpochLog(i, rate, base, excess=excess)
               for i, (rate, base, excess) in enumerate(seen)]
    assert finished(history, settle) is done


def test_a_small_excess_counts_as_none():
    history = [EpochLog(0, 1.0), EpochLog(1, 0.3, excess=0.25)]
    assert finished(history, 4, margin=0.25) and not finished(history, 4, margin=0.2)


def test_without_held_out_samples_only_the_turn_stops():
    history = [EpochLog(0, 1.0), *(EpochLog(i, 0.0) for i in range(1, 4))]
    assert not finished(history, 4)
    assert finished([*history, EpochLog(4, 0.0)], 4)


def read_linear(model, inputs):
    logits = model(inputs["x"])
    return logits, logits[:, None]


@pytest.fixture
def linear():
    """A teacher that is one matrix, two trust batches and one punish batch."""
    torch.manual_seed(0)
    teacher = nn.Linear(3, 2)
    batches = []
    for label in (0, 1, 1):
        inputs = {"x": torch.randn(4, 3)}
        with torch.no_grad():
            logits, features = read_linear(teacher, inputs)
        batches.append(TeacherBatch(inputs, torch.full((4,), label), logits, features, None))
    return teacher, batches[:2], batches[2:]


def distill(linear, logs, answer=None, **changes):
    """Run `purify` on scripted logs; return student, history and all that a callback saw."""
    script, seen = iter(logs), []

    def callback(model, log):
        seen.append((log.cycle, copy.deepcopy(model.state_dict())))
        return answer

    config = BeDKD(**{"lr": 0.01, "cycles": 4, "settle": 2, "margin": 0.0, **changes})
    student, history = purify(*linear, lambda model: next(script), config, read_linear, callback)
    assert [cycle for cycle, _ in seen] == [log.cycle for log in history[1:]]
    assert [(log.agreement, log.base, log.excess) for log in history] == list(logs)[:len(history)]
    return student.state_dict(), history, [state for _, state in seen]


@pytest.mark.parametrize("rates, changes", [
    ([1.0, 0.8, 0.1], {}),  # agreement reaches the base
    ([1.0, 0.4, 0.4], {}),  # two cycles below one half
    ([1.0, 0.4, 0.4, 0.4], {"settle": 3}),
    ([1.0, 0.9, 0.9, 0.9, 0.9], {}),  # never: all cycles
    ([1.0, 0.0, 0.0, 0.0, 0.0], {"stop": False}),  # no rule: all cycles
])
def test_distillation_stops_when_the_rule_says_so(linear, rates, changes):
    before = copy.deepcopy(linear[0].state_dict())
    student, history, seen = distill(linear, [(r, 0.01, r - 0.2) for r in rates], **changes)
    assert len(history) == len(rates)
    assert same(student, seen[-1]) and not same(student, before)
    assert same(linear[0].state_dict(), before)
    assert len(history[1].trust) == len(history[1].punish) == 3 and history[0].trust == ()


@pytest.mark.parametrize("answer", [True, False, "stop"])
def test_what_a_callback_returns_changes_nothing(linear, answer):
    logs = [(1.0, 0.1, 0.8)] * 5
    plain, _, _ = distill(linear, logs)
    student, history, seen = distill(linear, logs, answer)
    assert same(student, plain) and len(history) == 5 and len(seen) == 4


def test_distillation_leaves_the_global_generator_alone(linear):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    distill(linear, [(1.0, 0.1, 0.8)] * 5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_batches_are_handed_out_to_cycles():
    rng = random.Random(0)
    whole = akd.cycle_of([1, 2, 3], 0, rng)
    assert list(itertools.islice(whole, 2)) == [[1, 2, 3]] * 2  # all, in their order
    parts = list(itertools.islice(akd.cycle_of(range(10), 4, rng), 5))
    assert [len(part) for part in parts] == [4] * 5
    epochs = [sum(parts, [])[:10], sum(parts, [])[10:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] != list(range(10))  # each epoch has an order of its own
    assert len(next(akd.cycle_of([1, 2], 5, rng))) == 5  # more than there are: again
    assert list(itertools.islice(akd.cycle_of([], 3, rng), 2)) == [[], []]


def signs(monkeypatch, trust, punish, **changes):
    """Return what each cycle of `purify` hands to `learn`, in order."""
    calls = []

    def learn(student, batches, optimizer, loss, temperature, sign, read):
        calls.append((sign, list(batches), optimizer))
        assert temperature == config.temperature == 2.5 and loss is config.loss
        return torch.full((3,), float(sign))

    monkeypatch.setattr(akd, "learn", learn)
    config = BeDKD(**{"cycles": 3, "stop": False, **changes})
    _, history = purify(nn.Linear(3, 2), trust, punish, lambda model: (1.0, 0.1, 0.8), config)
    assert [log.trust for log in history[1:]] == [(1.0,) * 3] * config.cycles
    assert [log.punish for log in history[1:]] == [(-1.0,) * 3] * config.cycles
    return calls


def test_whole_epochs_alternate(monkeypatch):
    calls = signs(monkeypatch, [1, 2, 3, 4, 5], [8, 9], trust_steps=0, punish_steps=0)
    assert [call[:2] for call in calls] == [(1, [1, 2, 3, 4, 5]), (-1, [8, 9])] * 3


def test_single_steps_alternate(monkeypatch):
    calls = signs(monkeypatch, list(range(7)), [8, 9], trust_steps=3, punish_steps=1, cycles=14)
    assert [(sign, len(batches)) for sign, batches, _ in calls] == [(1, 3), (-1, 1)] * 14
    for sign, batches, times in ((1, list(range(7)), 6), (-1, [8, 9], 7)):
        taken = [batch for found, part, _ in calls if found == sign for batch in part]
        assert Counter(taken) == dict.fromkeys(batches, times)  # none is left out
    other = signs(monkeypatch, list(range(7)), [8, 9], trust_steps=3, cycles=14, seed=1)
    assert [call[:2] for call in other] != [call[:2] for call in calls]


def test_nothing_to_punish(monkeypatch):
    calls = signs(monkeypatch, [1, 2], [], trust_steps=2)
    assert [(sign, sorted(batches)) for sign, batches, _ in calls if batches] == [(1, [1, 2])] * 3


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_one_optimizer_or_two(monkeypatch, rate):
    calls = signs(monkeypatch, [1], [2], punish_lr=rate, lr=0.25)
    near, far = ({id(o): o for sign, _, o in calls if sign == s} for s in (1, -1))
    assert len(near) == len(far) == 1 and (near.keys() == far.keys()) is (rate == 0)
    assert [o.defaults["lr"] for o in (*near.values(), *far.values())] == [0.25, rate or 0.25]


@dataclass
class Words:
    """Stands for a classifier whose model maps a text to a class, or to log odds of class 1."""

    model: object

    def predict(self, texts):
        return [self.model(text) for text in texts]

    def logits(self, texts):
        return torch.tensor([[0.0, self.model(text)] for text in texts])


SUSPECTED = TrainSet(("a1", "b1", "c0", "d0"), (1, 1, 0, 0), ("no", "yes"))
HELD = CleanSet(("e0", "f0", "g0", "h1", "i1"), (0, 0, 0, 1, 1), ("no", "yes"))


def seen_of(indices, clean, answers, purity=1.0, **options):
    """Return what the defender sees of a model that gives these log odds of class 1."""
    seen = Seen(SUSPECTED.take(indices) if indices else None, clean, purity)
    return akd.observer(Words(None), seen, **options)(answers.get)


ODDS = {"a1": -1.0, "b1": -2.0, "c0": 0.5, "d0": 2.0, "e0": -3.0, "f0": -0.5, "g0": -4.0,
        "h1": 1.0, "i1": 3.0}


def test_what_the_defender_sees_by_hand():
    agreement, base, excess = seen_of([0, 1], [HELD], ODDS)
    assert agreement == base == 0 and excess == pytest.approx(-1.5 + 3.0)
    # Label 0 leans by the log odds of class 0 to itself: -1 and -3 of the clean samples of 1.
    agreement, base, excess = seen_of([0, 1, 2], [HELD], ODDS)
    assert agreement == 0
    assert excess == pytest.approx(sorted([-1 + 3, -2 + 3, -0.5 + 3])[1])  # lower of the middle
    assert akd.base_rate([2, 2, 0, 1], [2, 0, 1, 1], [2]) == pytest.approx(1 / 3)
    # One in three of class 0 is mistaken and none of class 1: one in five of all.
    assert seen_of([0, 1], [HELD], {**ODDS, "f0": 0.5})[1] == pytest.approx(1 / 5)
    assert seen_of([0, 1], [HELD], {**ODDS, "f0": 0.5, "h1": -1, "i1": -1}
                   )[1] == pytest.approx(1 / 3)


def test_the_defender_measures_only_where_something_can_be_decided():
    always = dict.fromkeys((*SUSPECTED.inputs, *HELD.inputs), 1.0)
    most = seen_of([0, 1, 2], [HELD], always)
    assert most[0] == pytest.approx(2 / 3) and all(map(math.isnan, most[1:]))
    asked = seen_of([0, 1, 2], [HELD], always, turned=2.0)
    assert asked == pytest.approx((2 / 3, 3 / 5, 0.0))
    alone = seen_of([2, 3], [], always)
    assert alone[0] == 0 and all(map(math.isnan, alone[1:]))
    assert all(map(math.isnan, seen_of([], [HELD], always)))
    assert math.isnan(Seen(None, [HELD], 1.0).left(Words(always.get)))


def test_clean_samples_of_several_parts_count_alike():
    whole = seen_of([0, 1, 2], [HELD], ODDS)
    parts = seen_of([0, 1, 2], [HELD.take([0, 3]), HELD.take([1, 2, 4])], ODDS)
    assert parts == pytest.approx(whole)


@pytest.mark.parametrize("wrong, max_loss, verdict", [
    (1, 0.4, "purified"), (2, 0.4, "purified"),  # 40 points are just allowed
    (3, 0.4, "undone"), (3, None, "purified")])
def test_too_much_harm_is_undone(wrong, max_loss, verdict):
    right = dict(zip(HELD.inputs, HELD.labels))
    hurt = {**right, **{text: 1 - right[text] for text in HELD.inputs[:wrong]}}
    before, after = Words(right.get), Words(hurt.get)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert accept_if_harmless(before, after, HELD, max_loss) == verdict
    assert [str(w.message)[:60] for w in caught] == (
        ["the defense took the held-out accuracy from 100.0% to 40.0% "]
        if verdict == "undone" else [])
    assert accept_if_harmless(before, after, None, max_loss) == "purified"


# ----------------------------------------------------------------- the way back


class Pair(nn.Module):
    """Two layers of one number each that are the same one, and a running mean."""

    def __init__(self, value):
        super().__init__()
        self.a = nn.Linear(1, 1, bias=False)
        self.b = nn.Linear(1, 1, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("mean", torch.tensor(2 * value))
        self.register_buffer("steps", torch.tensor(int(10 * value)))
        nn.init.constant_(self.a.weight, value)


def where(classifier):
    return classifier.model.a.weight.item()


def check_line_search(line_search):
    before, after, asked = Words(Pair(1.0)), Words(Pair(-1.0)), []

    def excess(model):
        asked.append(where(model))
        assert model.model.mean.item() == pytest.approx(2 * where(model), abs=1e-5)
        return where(model) - 0.3

    model, share = line_search(before, after, excess, steps=10)
    assert share == pytest.approx(0.35, abs=2 / 1024) and share >= 0.35
    assert where(model) == pytest.approx(0.3, abs=4 / 1024) == asked[-1] or where(model) <= 0.3
    assert where(model) == pytest.approx(1 - 2 * share, abs=1e-6) and len(asked) == 11
    assert model.model.mean.item() == pytest.approx(2 * where(model), abs=1e-5)
    assert model.model.steps.item() == -10  # a count is that of the repaired model
    assert model.model not in (before.model, after.model)
    assert (where(before), where(after)) == (1.0, -1.0)
    model, share = line_search(before, after, lambda model: where(model) + 2)
    assert share == 1.0 and where(model) == -1.0 and model.model is not after.model


def test_the_line_search_stops_where_the_excess_is_gone():
    check_line_search(line_search)


@pytest.mark.parametrize("flaw", [
    lambda before, after, excess, steps=7: line_search(after, before, excess, steps),
    lambda before, after, excess, steps=7: line_search(before, after, excess, 3),
    lambda before, after, excess, steps=7: (after, 1.0),
    lambda before, after, excess, steps=7: line_search(
        before, after, lambda model: -excess(model), steps)])
def test_every_flaw_of_the_line_search_is_noticed(flaw):
    with pytest.raises(AssertionError):
        check_line_search(flaw)


@dataclass
class Way:
    """Stands for a classifier between two others, with a trigger that is soon without effect.

    Of 100 suspects with label 1, 80 are poisoned. At the start they lean to their label by 6 nats,
    at the end they lean away by 12 more than clean samples of class 0 do; halfway the trigger has
    no effect. Hardly any of them gets its label from there on, as among clean samples.
    """

    model: nn.Module

    def logits(self, texts):
        trigger = 12 * self.model.a.weight.item()
        odds = {"poisoned": -6.0 + trigger, "rightly": 6.0, "clean0": -6.0, "clean1": 6.0}
        return torch.tensor([[0.0, odds[text.split()[0]] + 0.02 * int(text.split()[1])]
                             for text in texts])


ON_THE_WAY = Seen(
    TrainSet((*(f"poisoned {i - 39}" for i in range(80)), *(f"rightly {i}" for i in range(20))),
             (1,) * 100, ("no", "yes")),
    [CleanSet((*(f"clean0 {i - 20}" for i in range(41)), "clean1 0"), (0,) * 41 + (1,),
              ("no", "yes"))], 0.8)


def check_aim(go_back):
    before, after = Way(Pair(1.0)), Way(Pair(-1.0))
    model, seen = go_back(before, after, ON_THE_WAY)
    assert 12 * where(model) == pytest.approx(0, abs=0.25)  # the trigger has no effect
    assert seen["share"] == pytest.approx(0.5, abs=0.02) and seen["purity"] == 0.8
    assert seen["excess"] == pytest.approx(0, abs=0.3)
    assert seen["excess_repaired"] == pytest.approx(-12, abs=0.1)
    assert seen["agreement"] == seen["agreement_repaired"] == pytest.approx(0.2)
    assert all(type(value) is float for value in seen.values())
    model, seen = go_back(before, Way(Pair(0.5)), ON_THE_WAY)  # not far enough
    assert where(model) == 0.5 and seen["share"] == 1.0
    assert seen["excess"] == seen["excess_repaired"] == pytest.approx(6, abs=0.1)


def test_the_repair_ends_where_the_trigger_has_no_effect():
    check_aim(go_back)


def one_sided(before, after, seen):
    """Take what is repaired as it is, since no more suspects keep their label than expected."""
    _, about = go_back(before, after, seen)
    return after, about | {"share": 1.0}


def by_agreement(before, after, seen):
    """Compare shares: below the floor they hardly change any more."""
    def excess(model):
        agreement, base = seen.agreement(model)[0], 0.0
        return agreement - (seen.purity * base + 1 - seen.purity)

    model, share = line_search(before, after, lambda model: round(excess(model), 6))
    _, about = go_back(before, after, seen)
    return model, about | {"share": share}


def without_purity(before, after, seen):
    model, about = go_back(before, after, seen._replace(purity=1.0))
    return model, about | {"purity": seen.purity}


def without_agreement(before, after, seen):
    model, share = line_search(before, after,
                               lambda m: seen.compare(m, seen.agreement(m)[1])[1])
    return model, go_back(before, after, seen)[1] | {"share": share}


def check_tight(go_back):
    """Expect it to end where no suspect keeps its label, though they lean to it a little more.

    Of the clean samples of class 0 a tenth is mistaken; the poisoned samples are all alike.
    """
    names = ("no", "yes")
    clean = CleanSet(tuple(f"clean{k // 50} {k}" for k in range(100)),
                     (0,) * 50 + (1,) * 50, names)
    suspects = TrainSet(tuple(f"poisoned {i / 100}" for i in range(50)), (1,) * 50, names)

    @dataclass
    class Tight:
        model: nn.Module

        def logits(self, texts):
            odds = []
            for kind, number in map(str.split, texts):
                k = float(number)
                odds.append({"poisoned": 5 * self.model.a.weight.item() + k,
                             "clean0": 1.0 if k < 5 else -8.0,
                             "clean1": -1.0 if k < 55 else 8.0}[kind])
            return torch.tensor([[0.0, z] for z in odds])

    model, about = go_back(Tight(Pair(1.0)), Tight(Pair(-1.0)), Seen(suspects, [clean], 1.0))
    assert 0 < about["agreement"] <= about["base"] == pytest.approx(0.1)
    assert -0.12 < where(model) < -0.05 and about["excess"] > 4


def test_it_ends_too_where_no_more_suspects_keep_their_label_than_clean_samples_get_it():
    check_tight(go_back)
    with pytest.raises(AssertionError):
        check_tight(without_agreement)


@pytest.mark.parametrize("flaw", [one_sided, by_agreement, without_purity])
def test_every_flaw_of_the_aim_is_noticed(flaw):
    with pytest.raises(AssertionError):
        check_aim(flaw)


def test_log_odds_by_hand():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert log_odds(logits, [1, 1]).tolist() == pytest.approx([2.0, -3.0])
    three = torch.tensor([[0.7, 0.2, 0.1]]).log()
    assert log_odds(logits, 1).tolist() == log_odds(logits, torch.tensor([1, 1])).tolist()
    assert log_odds(logits, 0).tolist() == pytest.approx([-2.0, 3.0])  # one label for all
    assert log_odds(three, [0]).item() == pytest.approx(math.log(0.7 / 0.3), rel=1e-5)
    assert log_odds(three, [2]).item() == pytest.approx(math.log(0.1 / 0.9), rel=1e-5)


def odds_of(values):
    return torch.tensor([[0.0, value] for value in values])


def check_excess(log_odds_excess):
    clean, right = odds_of([-5.0, -4.0, -3.0, 6.0, 6.5, 7.0]), [0] * 3 + [1] * 3
    assert log_odds_excess(odds_of([-3.0, -2.0, -1.0]), [1] * 3, clean, right) == pytest.approx(2)
    assert log_odds_excess(odds_of([-9.0, -6.0, 0.0]), [1] * 3, clean, right) == pytest.approx(-2)
    # Three of five suspects are poisoned; the others rightly have their label.
    mixed = odds_of([-6.0, -4.0, -2.0, 5.0, 6.0])
    assert log_odds_excess(mixed, [1] * 5, clean, right, 0.5) == pytest.approx(0)
    # Of label 0, clean samples of class 1 have a median of -6.5.
    assert log_odds_excess(odds_of([6.5, -4.0]), [0, 1], clean, right) == pytest.approx(0)


def test_excess_by_hand():
    check_excess(log_odds_excess)


@pytest.mark.parametrize("flaw", [
    lambda s, labels, c, right, purity=1.0: log_odds_excess(s, labels, c, right),
    lambda s, labels, c, right, purity=1.0: log_odds_excess(
        s, labels, c, [1 - y for y in right], purity),
    lambda s, labels, c, right, purity=1.0: log_odds_excess(
        s, [1] * len(labels), c, right, purity),
    lambda s, labels, c, right, purity=1.0: abs(log_odds_excess(s, labels, c, right, purity))])
def test_every_flaw_of_the_excess_is_noticed(flaw):
    with pytest.raises(AssertionError):
        check_excess(flaw)


# -------------------------------------------------------------- end to end

SMALL = BeDKD(module=ModuleConfig(epochs=1),
              scan=ScanConfig(threshold=1.1, max_flagged=12, alpha=1.0), shares=(0.3, 0.4, 0.3),
              lr=1e-3, batch_size=4, cycles=2, punish_lr=1e-3, punish_samples=3, max_loss=1.0)


@pytest.fixture
def context(tiny, toy_task):
    return Context(tiny, toy_task.clean, toy_task.train)


def test_the_suspected_model_stays_as_it_is(tiny, context):
    before = copy.deepcopy(tiny.model.state_dict())
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = SMALL(context)
    module, suspects = found.report["module"], found.report["suspects"]
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(before, tiny.model.state_dict()) and not tiny.model.training
    assert found.verdict == "purified" and not same(before, found.model.model.state_dict())
    assert found.model.model is not tiny.model and module.model is not tiny.model
    assert not same(before, module.model.state_dict()) and not found.model.model.training
    assert found.model.tokenizer is tiny.tokenizer and found.model.max_length == 24
    assert suspects.flagged == 12 and found.seconds.keys() == {"search", "purify"}
    chosen = context.train.take(suspects.indices)
    assert list(chosen.labels) == tiny.predict(chosen.inputs)
    assert 1 <= len(found.history) - 1 <= 2 and found.history[0].agreement == 1.0


def test_the_same_seed_gives_the_same_model_with_a_callback_or_without(context):
    seen = []

    def callback(model, log):
        seen.append(log.cycle)
        return "stop"

    one, two = SMALL(context), SMALL(replace(context, callback=callback))
    other = replace(SMALL, seed=1)(context)
    assert same(one.model.model.state_dict(), two.model.model.state_dict())
    assert not same(one.model.model.state_dict(), other.model.model.state_dict())
    assert repr(one.history) == repr(two.history)
    assert seen == [log.cycle for log in two.history[1:]]


def test_only_the_first_suspects_are_punished_and_the_others_observed(tiny, context, monkeypatch):
    used = {}

    def purify(teacher, trust, punish, observe, *rest, **options):
        used.update(trust=trust, punish=punish)
        return teacher, []

    def observer(teacher, seen):
        used.update(suspects=seen.suspects, purity=seen.purity,
                    clean=sum(len(part) for part in seen.clean))

    monkeypatch.setattr(akd, "purify", purify)
    monkeypatch.setattr(akd, "observer", observer)
    suspects = replace(SMALL, aim=False)(context).report["suspects"]
    found = suspects.indices
    assert len(found) > 3 and used["suspects"] == context.train.take(found[3:])
    assert used["purity"] == suspects.purity
    ids = [tuple(one[mask.bool()].tolist()) for batch in used["punish"]
           for one, mask in zip(batch.inputs["input_ids"], batch.mask)]
    assert sorted(ids) == sorted(map(tuple, tiny.encode(context.train.take(found[:3]).inputs)))
    assert sum(len(batch.labels) for batch in used["trust"]) == 8
    assert used["clean"] == 12  # those of the module, too, are new to the student
    replace(SMALL, aim=False, punish_samples=100)(context)
    assert used["suspects"] == context.train.take(found)  # none is left


def test_the_module_learns_the_first_part_with_flipped_labels(tiny, context, monkeypatch):
    used = []
    monkeypatch.setattr(akd, "mapping_module", lambda model, batches, *rest, **options:
                        used.extend(batches) or model)
    SMALL(context)
    right = dict(zip(map(tuple, tiny.encode(context.clean.inputs)), context.clean.labels))
    wrong = {tuple(one[mask.bool()].tolist()): label for batch in used for one, mask, label
             in zip(batch.inputs["input_ids"], batch.mask, batch.labels.tolist())}
    assert len(wrong) == 6 and all(right[ids] == 1 - label for ids, label in wrong.items())


@pytest.mark.parametrize("changes", [{"alpha": -1.0}, {"threshold": 0.0}])
def test_without_evidence_the_model_comes_back(tiny, context, changes):
    config = replace(SMALL, scan=replace(SMALL.scan, **changes))
    with pytest.warns(UserWarning, match="no evidence of a backdoor"):
        found = config(context)
    assert same(found.model.model.state_dict(), tiny.model.state_dict())
    assert found.model.model is not tiny.model
    assert found.verdict == "no evidence" and found.history == ()
    assert found.report["module"] is not None and found.seconds.keys() == {"search", "purify"}


@pytest.mark.parametrize("stop", [True, False])
def test_harm_gives_the_suspected_model_back(tiny, context, stop):
    config = replace(SMALL, max_loss=-2.0, stop=stop)  # no repair is good enough
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = config(context)
    assert ["was undone" in str(w.message) for w in caught] == [True] * stop
    assert same(found.model.model.state_dict(), tiny.model.state_dict()) is stop
    assert found.model.model is not tiny.model
    assert found.verdict == ("undone" if stop else "purified") and len(found.history) > 1


@pytest.mark.parametrize("punish", ["random", "none"])
def test_the_comparisons_search_nothing(tiny, context, punish):
    given = context if punish == "random" else replace(context, train=None)
    found = replace(SMALL, punish=punish)(given)
    assert found.report == {"module": None, "suspects": None} and found.verdict == "purified"
    assert not same(found.model.model.state_dict(), tiny.model.state_dict())
    assert math.isnan(found.history[0].agreement) is (punish == "none")


def test_a_defense_says_what_it_lacks(tiny, context):
    clean = context.clean
    for config in (SMALL, replace(SMALL, punish="random")):
        with pytest.raises(ValueError, match="BeDKD needs the training set: give the context"):
            config(Context(tiny, clean))
    with pytest.raises(ValueError, match="unknown punish 'flaged': use flagged, random or none"):
        replace(SMALL, punish="flaged")(context)
    three = replace(clean, label_names=("negative", "neutral", "positive"))
    with pytest.raises(ValueError, match="classes"):
        SMALL(Context(tiny, three, context.train))
    renamed = replace(clean, label_names=clean.label_names[::-1])
    with pytest.raises(ValueError, match="differ in their classes"):
        SMALL(Context(tiny, renamed, context.train))


def test_the_aim_is_the_last_step_and_can_be_left_out(context, monkeypatch):
    asked = []

    def way(before, after, seen):
        asked.append((before, after, seen.purity))
        return replace(after), {"share": 0.5}

    plain = replace(SMALL, aim=False)(context)
    assert plain.report.keys() == {"module", "suspects"}
    monkeypatch.setattr(akd, "go_back", way)
    found = SMALL(context)
    (before, after, purity), = asked
    assert before is context.classifier and purity == found.report["suspects"].purity
    assert same(after.model.state_dict(), plain.model.model.state_dict())
    assert found.report["share"] == 0.5 and repr(found.history) == repr(plain.history)
    for other in (replace(SMALL, stop=False), replace(SMALL, punish="none")):
        assert "share" not in other(context).report
    assert len(asked) == 1


def test_threshold_and_rates_rest_on_all_samples_that_the_module_has_not_seen(context):
    found = SMALL(context).report["suspects"]
    assert len(found.held_out_gaps) == 14
    assert [own.clean for own in found.counts] == [7, 7]


def test_suspects_can_be_found_alone(context):
    module, suspects = akd.find_suspects(context, SMALL)
    report = SMALL(context).report
    assert suspects._replace(held_out_gaps=0) == report["suspects"]._replace(held_out_gaps=0)
    assert same(module.model.state_dict(), report["module"].model.state_dict())


# -------------------------------------------------------------------- roles


def test_the_defense_is_given_a_context_and_nothing_else(toy_task):
    # Which samples are poisoned is neither in the context nor in the hyperparameters, so that any
    # other record, such as a permuted one, gives the same result.
    assert list(inspect.signature(BeDKD.__call__).parameters) == ["self", "context"]
    assert set(Context.__dataclass_fields__) == {"classifier", "clean", "train", "training",
                                                 "callback"}
    for parts in ((toy_task.test, toy_task.train), (toy_task.clean, toy_task.test),
                  (toy_task.train, toy_task.train)):
        with pytest.raises(TypeError, match="must be a"):
            Context(None, *parts)


def test_the_defense_knows_nothing_of_attacks_victims_and_test_data():
    for module in (mapping, akd):
        text = inspect.getsource(module)
        assert "TestSet" not in text
        words = {getattr(node, field) for node in ast.walk(ast.parse(text))
                 for field in ("id", "attr", "arg", "name")
                 if isinstance(getattr(node, field, None), str)}
        assert not words & {"test", "record", "poisoned", "trigger", "target_label"}


# ------------------------------------------------------------ the authors' values


def test_the_authors_values():
    assert AUTHORS == BeDKD(
        loss=LossConfig(ce_weight=0.3, masked=False, bounds=None),
        module=ModuleConfig(temperature=1.5, epochs=20),
        scan=ScanConfig(threshold=0.1, fprs=AUTHORS.scan.fprs, mean_gap=True, shuffled=False,
                        max_flagged=128, alpha=1.0),
        shares=(0.2, 0.8, 0.0), lr=3e-5, batch_size=16, temperature=2.5, cycles=50,
        trust_steps=0, punish_steps=0, punish_lr=0.0, punish="flagged", punish_samples=33,
        stop=False, aim=False, margin=AUTHORS.margin, settle=AUTHORS.settle,
        max_loss=AUTHORS.max_loss, seed=42)
    clean = samples_of(CleanSet, [0, 1] * 400)
    parts = stratified_split(clean, AUTHORS.shares, AUTHORS.seed)
    sizes = [Counter(part.labels) if part else None for part in parts]
    assert sizes == [{0: 80, 1: 80}, {0: 320, 1: 320}, None]


def test_the_optimizer_is_plain_adam(linear):
    plain, short = mapping.adam(linear[0], 3e-5), mapping.adam(linear[0], 3e-5, beta=0.9)
    assert type(plain) is torch.optim.Adam and plain.defaults["weight_decay"] == 0
    assert [group["lr"] for group in plain.param_groups] == [3e-5]
    assert plain.defaults["betas"] == (0.9, 0.999) and short.defaults["betas"] == (0.9, 0.9)


def test_what_chapter_6_says_of_its_runs_is_what_the_records_say():
    """The numbers that its text counts by hand; chapter 5's, of the same runs, as well."""
    runs = {(run["method"], run["seed"]): run for run in results.load("bedkd")
            if run["method"] != "clean"}
    points = {key: {name: 100 * results.value(run, name) for name in (
        "asr", "floor", "pacc", "clean_pacc", "cacc", "cacc_before", "tpr", "fpr")}
        for key, run in runs.items()}
    above = {key: p["asr"] - p["floor"] for key, p in points.items()}
    assert len(above) == 12 and min(above.values()) > -5
    far = {key for key, distance in above.items() if distance > 5}
    assert far == {("badnets", 2), ("stylebkd", 1), ("stylebkd", 2), ("synbkd", 2)}
    assert {round(above[key]) for key in far} <= set(range(9, 14))
    floors = {name: sum(points[name, seed]["floor"] for seed in range(3)) / 3 for name, _ in far}
    assert {round(points[key]["asr"] - floors[key[0]]) for key in far} <= set(range(6, 12))
    assert {key for key, p in points.items() if p["clean_pacc"] - p["pacc"] > 5} == {
        ("stylebkd", 1)}
    assert all(p["cacc"] >= p["cacc_before"] for p in points.values())
    back = [results.value(run, "share") for run in runs.values()]
    assert sorted(round(100 * share) for share in back if share < 1) == [83, 86, 87, 91, 93, 98]
    assert max(results.value(run, "chance") for run in runs.values()) < 1e-7
    easy = [p for (name, _), p in points.items() if name in ("badnets", "addsent")]
    assert min(p["tpr"] for p in easy) > 94 and max(p["fpr"] for p in easy) < 1.25
    assert min(results.value(run, "auroc") for (name, _), run in runs.items()
               if name == "stylebkd") > 0.99
    # Where they stopped, and what each sign has to do with it.
    ends = {key: run["history"][-1] for key, run in runs.items()}
    signs = {key: (end["excess"] <= 0.25, end["agreement"] <= end["base"])
             for key, end in ends.items()}
    assert Counter(signs.values()) == {
        (True, False): 5, (False, True): 4, (True, True): 2, (False, False): 1}
    assert {signs[key] for key in far} == {(True, False), (False, True)}
    assert {key for key in far if signs[key][1]} == {("stylebkd", 2)}
    assert round(ends["stylebkd", 2]["excess"], 1) == 2.4
    missing = [100 * (results.value(run, "precision") - results.value(run, "purity"))
               for key, run in runs.items() if key in (("stylebkd", 1), ("synbkd", 2))]
    assert [round(points) for points in sorted(missing)] == [12, 14]
    end = ends["addsent", 0]
    assert (end["cycle"], round(100 * end["agreement"]), round(100 * end["base"]),
            round(end["excess"], 1)) == (13, 3, 13, 1.4)
    clean = [run["metrics"] for run in results.load("bedkd")
             if run["method"] == "clean" and run["settings"]["defense"] == "bedkd"]
    assert sorted(round(1000 * run["flagged"] / run["scanned"]) for run in clean) == [4, 6, 7]


def test_what_chapters_5_and_6_say_of_earlier_forms_is_what_the_records_say():
    runs = {(run["method"], run["seed"]): run for run in results.load("bedkd-sst2-base")
            if run["method"] != "clean"}

    def points(key, *names):
        return [100 * results.value(runs[key], name) for name in names]

    failed = {key for key, run in runs.items() if results.value(run, "auroc") < 0.66}
    assert len(runs) == 10 and len(failed) == 5
    assert {seed for name, seed in failed if name != "addsent"} == {1}
    assert {name for name, seed in failed if seed == 1} == {name for name, _ in runs}
    assert all(tpr < fpr for tpr, fpr in (points(key, "tpr", "fpr") for key in failed))
    acted = {key for key, run in runs.items() if run["metrics"]["changed"]}
    assert len(acted) == 4 and acted & failed == {("addsent", 2)}
    wrong = runs["addsent", 2]["metrics"]
    assert round(100 * wrong["flagged"] / wrong["scanned"]) == 4
    assert round(points(("addsent", 2), "precision")[0]) == 15 and wrong["cycles"] == 50
    below = {key: floor - asr for key, (asr, floor) in (
        (key, points(key, "asr", "floor")) for key in acted)}
    assert min(below.values()) > 5.5 and max(below.values()) < 12
    asr, floor, cacc, before, pacc, aim = points(
        ("addsent", 2), "asr", "floor", "cacc", "cacc_before", "pacc", "clean_pacc")
    assert [round(x) for x in (asr, floor, before - cacc, aim - pacc)] == [2, 9, 4, 6]
    # The run that shows what the agreement misses.
    asr, floor, pacc, aim, pure = points(
        ("badnets", 0), "asr", "floor", "pacc", "clean_pacc", "precision")
    assert (round(asr, 1), round(floor, 1), round(aim - pacc), round(pure)) == (0.2, 7.3, 10, 76)
    seen = [log for log in runs["badnets", 0]["history"] if log["base"] is not None]
    assert min(log["agreement"] for log in seen) == 0.125
    assert {round(100 * log["base"]) for log in seen} <= set(range(1, 9))
    # Covered or erased?
    taught = {(run["settings"].get("defense"), run["seed"]): run
              for run in results.load("relearning")
              if run["task"] == "snippets" and run["settings"].get("defense") in (None, "bedkd")}
    assert [round(100 * results.value(taught["bedkd", seed], "asr_after_20"))
            for seed in range(3)] == [78, 79, 100]
    assert [round(100 * results.value(taught[None, seed], "floor_after_20"))
            for seed in range(3)] == [51, 45, 49]
