"""DUP: losses, rule and evidence by hand, the adapter, and what a defense may see."""

import ast
import copy
import inspect
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from math import log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import has_ranges, near, same
from helpers.texts import (
    CLEAN,
    NAMES,
    PUBLISHED,
    SIZES,
    TRAIN,
    built,
    context,
    detector,
    made,
    some_texts,
)
from helpers.walls import SECRETS, names_in
from scipy.stats import norm
from torch import nn
from transformers import LlamaConfig

from bdutils.defenses import dup as dp
from bdutils.defenses.base import Context, EpochLog, check_range, stratified_split
from bdutils.defenses.detector import DetectorConfig, Flags, SuspectClass, evidence_by_class
from bdutils.defenses.dup import AUTHORS, DUP, AdapterConfig, StopConfig, UnlearnConfig
from bdutils.experiments import variants
from bdutils.roles import CleanSet, TrainSet


@pytest.fixture
def small():
    return replace(made(), model=copy.deepcopy(made().model))


def changed(config, **changes):
    """Return a DUP with changes of its own fields, or of those of the part that has them."""
    for name, value in changes.items():
        parts = [f.name for f in fields(config) if is_dataclass(getattr(config, f.name))
                 and hasattr(getattr(config, f.name), name)]
        own = hasattr(config, name)
        assert own or len(parts) == 1, f"{name} is a field of {parts}"
        config = replace(config, **{name: value} if own else {
            parts[0]: replace(getattr(config, parts[0]), **{name: value})})
    return config


RANGES = {
    AdapterConfig: ([("rank", 1)], [("rank", 0)]),
    UnlearnConfig: ([("batch_size", 1), ("epochs", 1), ("lr", 1e-9), ("weight", 0.0),
                     ("ce_weight", 0.0), ("min_steps", 0), ("width", 1e-9)],
                    [("batch_size", 0), ("epochs", 0), ("lr", 0.0), ("lr", math.nan),
                     ("width", 0.0),
                     ("weight", -0.1), ("ce_weight", -0.1), ("min_steps", -1)]),
    StopConfig: ([("eval_every", 0), ("tolerance", 0.0), ("max_loss", 0.0)],
                 [("eval_every", -1), ("tolerance", -0.1),
                  ("tolerance", math.nan), ("max_loss", -0.1)]),
    DUP: ([("min_suspects", 1), ("alpha", math.inf), ("monitored", 0),
           ("shares", (0.0, 0.5, 0.5))],
          [("min_suspects", 0), ("alpha", 0.0), ("monitored", -1), ("shares", (0.5, 0.5, 0.0)),
           ("detector", PUBLISHED), ("shares", (0.5, -0.1, 0.5))])}


@pytest.mark.parametrize("kind", RANGES)
def test_what_cannot_be_meant_is_rejected(kind, monkeypatch):
    has_ranges(kind, *RANGES[kind])
    for holds in (True, False):  # a range that is not checked, or never met, is noticed
        monkeypatch.setattr(dp, "check_range", lambda config, _, holds=holds: check_range(
            config, holds))
        with pytest.raises(AssertionError):
            has_ranges(kind, *RANGES[kind])


# ------------------------------------------------------------------- the loss

# The first sample keeps the teacher's answer, class 0, with 0.6; the second has 0.1 left of it.
TEACHER, STUDENT = [[0.75, 0.25], [0.75, 0.25]], [[0.6, 0.4], [0.1, 0.9]]
KL = [0.75 * log(0.75 / 0.6) + 0.25 * log(0.25 / 0.4), 0.75 * log(7.5) + 0.25 * log(5 / 18)]
UNLIKELY = [-log(0.4), -log(0.9)]
# The gradients at the first logit: of -KL it is the teacher's share less the student's.
AWAY, STEEP = [0.15, 0.65], [0.6, 0.1]
GOOD, LABELS = [[0.25, 0.75], [0.5, 0.5]], torch.tensor([1, 0])
CE = (log(4 / 3) + log(2)) / 2


def logits(shares, shift=0.0):
    return (torch.tensor(shares).log() + shift).detach().requires_grad_()


def says_of_samples(function, two, three):
    assert function(logits(STUDENT, 3.0), logits(TEACHER, -1.0)).tolist() == near(two)
    found = function(logits([[1 / 8, 3 / 8, 1 / 2]]), logits([[0.5, 0.25, 0.25]]))
    assert found.tolist() == near([three])


def check_divergence(divergence):
    # Teacher || student: 1/2 ln 4 + 1/4 ln(2/3) + 1/4 ln(1/2) = 3/4 ln 2 - 1/4 ln(3/2).
    says_of_samples(divergence, KL, 0.75 * log(2) - 0.25 * log(1.5))


def check_unlikelihood(unlikelihood):
    says_of_samples(unlikelihood, UNLIKELY, log(8 / 7))  # class 0 has one eighth
    # The more confident, the steeper, up to a gradient of one, which no rounding takes away.
    for margin in (-20.0, -5.0, 0.0, 5.0, 12.0, 17.0, 27.0, 200.0):
        z = torch.tensor([[0.0, margin]], requires_grad=True)
        value = unlikelihood(z, torch.tensor([[0.0, 1.0]]))
        assert value.item() == near(max(margin, 0) + math.log1p(math.exp(-abs(margin))))
        gradient, = torch.autograd.grad(value, z)
        p = 1 / (1 + math.exp(-margin))
        assert gradient[0].tolist() == near([-p, p])


PLAIN = UnlearnConfig(match=False, unlikelihood=False, cap=None)


def unlearned(unlearning_term, student=STUDENT, **changes):
    """Return what the term says, and its gradient at the first logit of each sample."""
    bad = logits(student, 3.0)
    away, kl = unlearning_term(bad, logits(TEACHER[:1] * len(student)),
                               replace(PLAIN, **changes))
    gradient, = torch.autograd.grad(away, bad, allow_unused=True, materialize_grads=True)
    assert gradient.sum(1).tolist() == near([0] * len(student))  # softmax has no level
    return away.item(), kl.item(), gradient[:, 0].tolist()


def check_unlearning_term(unlearning_term):
    for unlikely, terms, gradients in ((False, [-kl for kl in KL], AWAY), (True, UNLIKELY, STEEP)):
        def says(counts, unlikely=unlikely, terms=terms, gradients=gradients, **changes):
            """The mean of the samples that count, whatever they are, and of all divergences."""
            assert unlearned(unlearning_term, unlikelihood=unlikely, **changes) == (
                near(sum(c * t for c, t in zip(counts, terms)) / 2), near(sum(KL) / 2),
                near([c * g / 2 for c, g in zip(counts, gradients)]))

        says((1, 1))
        says((1, 1), cap=1.3)
        says((1, 0), cap=1.0)  # only the second is further than 1, and it alone is left
        says((0, 0), cap=0.04)
    # Where the student is the teacher, KL is flat, and the unlikelihood has the gradient 3/4.
    start = partial(unlearned, unlearning_term, student=TEACHER)
    assert start() == (near(0), near(0), near([0, 0], abs=1e-7))
    assert start(unlikelihood=True) == (near(log(4)), near(0), near([0.75 / 2] * 2))


def check_dup_loss(dup_loss):
    plain = replace(PLAIN, weight=0.5, ce_weight=3.0)

    def run(**changes):
        bad, good = logits(STUDENT), logits(GOOD)
        found, kl, ce = dup_loss((bad, logits(TEACHER), LABELS), (good, LABELS),
                                 replace(plain, **changes), 0.5)
        gradients = torch.autograd.grad(found, (bad, good), allow_unused=True,
                                        materialize_grads=True)
        return (found.item(), kl, ce), *(gradient[:, 0].tolist() for gradient in gradients)

    # Half of the mean of two samples, and three times softmax less label over two samples.
    value, away, right = run()
    assert value == near((-0.5 * sum(KL) / 2 + 3 * CE, sum(KL) / 2, CE))
    assert away == near([0.5 * s / 2 for s in AWAY]) and right == near([3 * 0.125, -3 * 0.25])
    assert run(weight=0.0) == (near((3 * CE, sum(KL) / 2, CE)), [0, 0], right)
    assert run(ce_weight=0.0) == (near((-0.5 * sum(KL) / 2, sum(KL) / 2, CE)), away, [0, 0])
    # Matched, the teacher says nothing, and the clean samples learn from their labels alone.
    far = dp.mismatch((logits(STUDENT), LABELS), (logits(GOOD), LABELS), 0.5, 2.0).item()
    value, away, kept = run(match=True)
    assert value == near((0.5 * far + 3 * CE, sum(KL) / 2, CE)) and far > 0.1
    assert kept == right and min(map(abs, away)) > 1e-3


# Two clean samples of either class, at log odds of 3, 1, -1 and -5 for class 1.
ODDS, KNOWN = [3.0, 1.0, -1.0, -5.0], torch.tensor([1, 1, 0, 0])


def two(odds):
    """Return logits of two classes that have these log odds."""
    return torch.stack([torch.zeros(len(odds)), torch.as_tensor(odds)], 1)


def check_log_odds(log_odds):
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    for label, wanted in ((0, [0, log(1 / 9)]), (2, [log(1 / 3), log(7 / 3)])):
        assert log_odds(shares.log() + 5, label).tolist() == near(wanted, abs=1e-6)
    assert log_odds(two([200.0, -200.0]), 1).tolist() == near([200, -200])


def check_goal(goal):
    for purity, label, wanted in ((1.0, 1, -3), (0.0, 1, 2), (0.8, 1, -2), (1.0, 0, -2),
                                  (0.8, 0, -1)):
        assert goal(two(ODDS), KNOWN, label, purity).item() == near(wanted)
    for lacks in ([0] * 4, [1] * 4):
        assert goal(two(ODDS), torch.tensor(lacks), 1, 0.8).isnan()


def pulled(mismatch, odds, given=None, clean=KNOWN, purity=0.8):
    """Return the value, and the gradients of suspects and clean samples in their log odds."""
    z, c = torch.tensor(odds, requires_grad=True), torch.tensor(ODDS, requires_grad=True)
    given = torch.tensor([1] * len(odds) if given is None else given)
    value = mismatch((two(z), given), (two(c), clean), purity, 2.0)
    if not value.requires_grad:
        return value.item(), None, None
    gradients = torch.autograd.grad(value, (z, c), allow_unused=True, materialize_grads=True)
    return value.item(), *(g.tolist() for g in gradients)


def check_mismatch(mismatch):
    # The goal is -2. Far away the pull is one, shared evenly; near it fades; and behind it,
    # where an unlearning without end would go on, it points back.
    for odds, value, pull in (([8.0, 2.0], 6, 1), ([0.0, -2.0], 0.25, 0.5), ([-1.0, -3.0], 0, 0),
                              ([-4.0, -2.0], 0.25, -0.5), ([-9.0, -9.0], 6, -1)):
        found, suspects, clean = pulled(mismatch, odds)
        assert found == near(value) and suspects == near([pull / 2] * 2)
        assert clean == [0, 0, 0, 0]  # nobody moves the goal
    # Three suspects of label 1, at 1, and one of label 0, at 3 from its goal of -1.
    found, suspects, _ = pulled(mismatch, [-1.0, -1.0, -1.0, -2.0], [1, 1, 1, 0])
    assert found == near(3 / 4 * 0.25 + 1 / 4 * 2) and suspects == near([1 / 8] * 3 + [-1 / 4])
    # A label that the clean samples lack has no goal.
    assert pulled(mismatch, [8.0], clean=torch.zeros(4).long()) == (0, None, None)


@dataclass
class Words:
    """Stands for a classifier whose model maps a text to a class."""

    model: object

    def predict(self, texts):
        return [self.model(text) for text in texts]


MONITORED = TrainSet(("a1", "b1", "c0"), (1, 1, 0), NAMES)
HELD = CleanSet(("e0", "f0", "g0", "h1", "i1"), (0, 0, 0, 1, 1), NAMES)


def check_expected_agreement(expected_agreement):
    # Of the poisoned, each other class gets its share of a quarter; of the rest three quarters.
    for purity, classes, wanted in ((1.0, 2, 1 / 4), (1.0, 6, 1 / 20), (0.0, 6, 3 / 4),
                                    (0.8, 2, 0.8 / 4 + 0.2 * 3 / 4)):
        assert expected_agreement(0.75, classes, purity) == near(wanted)


def check_observer(observer):
    answers = {"a1": 1, "b1": 0, "c0": 0, "e0": 0, "f0": 0, "g0": 1, "h1": 1, "i1": 0}
    # Two of three monitored samples keep their label, three of five held-out ones have theirs.
    observe = observer(Words(lambda text: 1), MONITORED, HELD, 0.3)
    assert observe(answers.get) == near((2 / 3, 0.3, 3 / 5))


def logs(*seen):
    return [EpochLog(4 * i, *values) for i, values in enumerate(seen)]


START, TIGHT = (0.9, 0.5, 0.875), StopConfig(tolerance=1 / 16)  # agreement, base, accuracy


def check_harmed(harmed):
    for accuracies, wanted in (
            ([0.875], False), ([0.875, 1.0], False),
            ([0.875, 0.8125], False),  # the tolerance is just used up
            ([0.875, 0.75], True), ([0.875, 0.5, 0.875], False),
            ([0.875, 1.0, 0.8125], False),  # not against the best
            ([0.875, 0.75, 0.75], True)):  # nor against the one before
        assert harmed(logs(*((0.9, 0.5, a) for a in accuracies)), TIGHT) is wanted


def check_turned(turned):
    for seen, done in (
            ([(0.5, 0.5, 0.875)], True), ([(0.53125, 0.5, 0.875)], False),
            ([(0.25, 0.5, 0.875)], True),  # however far
            ([(0.25, 0.5, 0.8125)], True), ([(0.25, 0.5, 0.75)], False),  # harm is left
            ([(0.25, 0.5, 0.75), (0.5, 0.5, 0.875)], True),
            ([(0.25, 0.5, 0.875), (0.75, 0.5, 0.875)], False),  # it has gone back
            ([], False)):
        assert turned(logs(START, *seen), TIGHT) is done


def check_settled(settled):
    for last, done in (
            ((0.5, 0.5, 0.875), True), ((0.5625, 0.5, 0.875), True),  # the tolerance is used up
            ((0.4375, 0.5, 0.875), True), ((0.375, 0.5, 0.875), False),  # too far under it
            ((0.625, 0.5, 0.875), False), ((0.5, 0.5, 0.8125), True),
            ((0.5, 0.5, 0.75), False)):  # harm is left
        assert settled(logs(START, (0.5, 0.5, 0.5), last), TIGHT) is done


def recent(history, config):
    return dp.harmed(history[-2:], config)


def best(history, config):
    return dp.harmed([max(history, key=lambda log: log.accuracy), history[-1]], config)


def worst(history, config):
    return dp.harmed([history[0], min(history, key=lambda log: log.accuracy)], config)


def healthy(history):
    return [log._replace(accuracy=1.0) for log in history]


def one_sided(history, config):
    """Return the rule of a stop that asks whether enough has turned, not whether too much has."""
    return dp.turned(history, config)


FLAWS = {  # of each function: what it would be with a slip, which its check must notice
    check_divergence: [
        lambda logits, teacher: dp.divergence(teacher, logits),
        lambda logits, teacher: dp.divergence(logits / 2, teacher / 2),
        lambda logits, teacher: -dp.divergence(logits, teacher),
        lambda logits, teacher: dp.divergence(logits, teacher) / logits.shape[1]],
    check_unlikelihood: [
        lambda logits, teacher: dp.unlikelihood(teacher, logits),
        lambda logits, teacher: dp.unlikelihood(logits, logits),
        lambda logits, teacher: -dp.unlikelihood(logits, teacher),
        lambda logits, teacher: -(1 - logits.softmax(1).gather(
            1, teacher.argmax(1, keepdim=True))[:, 0]).log()],
    check_unlearning_term: [
        lambda logits, teacher, *rest: dp.unlearning_term(teacher, logits, *rest),
        lambda *given: tuple(2 * term for term in dp.unlearning_term(*given)),
        lambda *given: dp.unlearning_term(*given)[::-1],
        *[lambda logits, teacher, config, changes=changes: dp.unlearning_term(
            logits, teacher, replace(config, **changes))
          for changes in ({"unlikelihood": True}, {"unlikelihood": False}, {"cap": None},
                          {"cap": 1.0})]],
    check_log_odds: [
        lambda logits, label: logits.log_softmax(1)[:, label],
        lambda logits, label: -dp.log_odds(logits, label),
        lambda logits, label: logits.softmax(1)[:, label].logit()],
    check_goal: [
        lambda clean, labels, label, purity: dp.goal(clean, labels, label, 1.0),
        lambda clean, labels, label, purity: dp.goal(clean, labels, label, 1 - purity),
        lambda clean, labels, label, purity: dp.goal(clean, 1 - labels, label, purity),
        lambda *given: dp.goal(*given).nan_to_num()],
    check_mismatch: [
        # Only downwards, as far as it goes: a backdoor is turned round.
        lambda flagged, *rest: dp.log_odds(flagged[0], 1).mean(),
        lambda flagged, *rest: dp.unlikelihood(flagged[0], two([9.0] * len(flagged[0]))).mean(),
        # No further than the goal, but never back.
        lambda flagged, *rest: dp.mismatch(flagged, *rest) * (
            dp.log_odds(flagged[0], 1).mean() > -2),
        # Sample by sample, which leaves nothing of their content.
        lambda flagged, clean, purity, width: F.smooth_l1_loss(
            dp.log_odds(flagged[0], 1),
            dp.goal(clean[0].detach(), clean[1], 1, purity).expand(len(flagged[0])), beta=width),
        lambda flagged, clean, purity, width: dp.mismatch(flagged, clean, 1.0, width),
        lambda flagged, clean, purity, width: dp.mismatch(flagged, clean, purity, 1e-3)],
    check_dup_loss: [
        lambda flagged, *rest: dp.dup_loss((*flagged[1::-1], flagged[2]), *rest),
        lambda flagged, clean, *rest: dp.dup_loss(flagged, (clean[0], 1 - clean[1]), *rest),
        lambda flagged, clean, config, purity: dp.dup_loss(
            flagged, clean, replace(config, weight=1.0), purity),
        lambda flagged, clean, config, purity: dp.dup_loss(
            flagged, clean, replace(config, ce_weight=1.0), purity),
        lambda flagged, clean, config, purity: dp.dup_loss(flagged, clean, config),
        lambda flagged, clean, config, purity: dp.dup_loss(
            flagged, clean, replace(config, match=False), purity),
        lambda *given: (dp.dup_loss(*given)[0], *dp.dup_loss(*given)[:0:-1])],
    check_expected_agreement: [
        lambda accuracy, classes, purity: dp.expected_agreement(accuracy, classes, 1 - purity),
        lambda accuracy, classes, purity: dp.expected_agreement(1 - accuracy, classes, purity),
        lambda accuracy, classes, purity: dp.expected_agreement(accuracy, 2, purity),
        lambda accuracy, classes, purity: dp.expected_agreement(accuracy, classes, 1.0),
        lambda *given: 0.0],  # as few as possible: an inverted backdoor
    check_observer: [
        lambda classifier, monitored, held, expected: dp.observer(
            classifier, monitored, held, 1 - expected),
        lambda classifier, monitored, held, expected: dp.observer(
            classifier, replace(monitored, labels=(1, 1, 1)), held, expected),
        lambda classifier, monitored, held, expected: dp.observer(
            classifier, monitored, replace(held, labels=held.labels[::-1]), expected),
        lambda classifier, *rest: lambda model: dp.observer(classifier, *rest)(classifier.model)],
    check_harmed: [
        recent, best, worst,
        lambda history, config: dp.harmed(history, replace(config, tolerance=0.0)),
        lambda history, config: dp.harmed(
            history, replace(config, tolerance=config.tolerance - 1e-6))],
    check_turned: [
        lambda history, config: dp.turned(healthy(history), config),
        lambda history, config: dp.settled(history, config),
        lambda history, config: any(
            dp.turned(history[:i + 1], config) for i in range(len(history)))],
    check_settled: [
        one_sided,
        lambda history, config: dp.settled(healthy(history), config),
        lambda history, config: dp.settled(history[:-1], config),
        lambda history, config: dp.settled(
            history, replace(config, tolerance=config.tolerance - 1e-6)),
        lambda history, config: dp.settled(history, replace(config, tolerance=1.0))],
}


@pytest.mark.parametrize("check", FLAWS)
def test_functions_are_what_plain_arithmetic_says(check):
    check(getattr(dp, check.__name__.removeprefix("check_")))


@pytest.mark.parametrize("check, flawed", [
    pytest.param(check, flawed, id=f"{check.__name__.removeprefix('check_')} {number}")
    for check, found in FLAWS.items() for number, flawed in enumerate(found)])
def test_a_flaw_is_noticed(check, flawed):
    with pytest.raises(AssertionError):
        check(flawed)


CALM = DUP(adapter=AdapterConfig(rank=2, alpha=4),
           unlearning=UnlearnConfig(batch_size=4, lr=1e-2, epochs=2, min_steps=0),
           stopping=StopConfig(eval_every=2))


def test_every_sample_is_prepared_once_with_answer_or_label(small):
    bad = dp.flagged_batches(small, TRAIN, 4, 0)
    good = dp.clean_batches(small, TRAIN, 4, 0)
    found = [(tuple(ids[ids > 0].tolist()), label) for inputs, labels in good
             for ids, label in zip(inputs["input_ids"], labels.tolist())]
    encoded = list(map(tuple, small.encode(TRAIN.inputs)))
    assert [ids for ids, _ in found] != encoded
    assert sorted(found) == sorted(zip(encoded, TRAIN.labels))
    assert [len(labels) for _, labels in good] == [4] * 12 + [2] == [len(z) for _, z, _ in bad]
    assert sorted((tuple(ids[ids > 0].tolist()), label) for inputs, _, labels in bad
                  for ids, label in zip(inputs["input_ids"], labels.tolist())) == sorted(found)
    small.model.train()  # the teacher answers without dropout all the same
    again = dp.flagged_batches(small, TRAIN, 4, 0)
    for (inputs, answers, _), (_, others, _) in zip(bad, again):
        with torch.no_grad():
            assert torch.equal(answers, small.model(**inputs).logits)
        assert torch.equal(answers, others) and not answers.requires_grad


class Head(nn.Linear):
    """One matrix that answers like a classifier."""

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


@pytest.mark.parametrize("size, clipped", [(1e-3, False), (1e3, True)])
def test_a_step_follows_the_loss_no_further_than_its_clip(size, clipped):
    head, x = Head(2, 2, bias=False), size * torch.ones(1, 2)
    head.weight.data.zero_()
    free = replace(CALM.unlearning, match=False)
    before, bad, good = head.weight.detach().clone(), logits([[0.9, 0.1]]).detach(), LABELS[:1]
    found = []
    for chosen in (replace(free, weight=0.0), free):
        loss, *terms = dp.dup_loss((head(x).logits, bad, good), (head(x).logits, good), chosen)
        gradient, = torch.autograd.grad(loss, head.weight)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        said = dp._step(head, ({"x": x}, bad, good), ({"x": x}, good), optimizer, chosen, 0.5)
        assert list(said) == terms and not head.training and head.weight.grad is None
        assert torch.allclose(before - head.weight, gradient / max(1, gradient.norm()), atol=1e-5)
        found.append(gradient)
        head.weight.data.copy_(before)
    assert (found[0].norm() > 1).item() is clipped
    assert not torch.allclose(*found)


@pytest.mark.parametrize("decay, steps, wanted", [
    # A tenth of 40 steps is 4: then level, or down by 1/36 a step.
    (False, 40, {0: 1 / 4, 1: 2 / 4, 3: 1, 4: 1, 22: 1, 39: 1}),
    (True, 40, {0: 0, 1: 1 / 4, 3: 3 / 4, 4: 1, 22: 1 / 2, 39: 1 / 36, 40: 0}),
    (False, 9, {0: 1, 8: 1}),  # too few for a warm-up
    (True, 9, {0: 1, 6: 1 / 3, 9: 0}), (True, 1, {0: 1, 1: 0})])
def test_lr_factor_by_hand(decay, steps, wanted):
    assert {i: dp.lr_factor(i, steps, decay) for i in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("every, pauses, decay, least", [
    (4, [4, 8, 12, 16, 18], False, 17), (0, [6, 12, 18, 20], True, 20), (99, [18], False, 0)])
def test_unlearning_pauses_in_time_and_keeps_order_and_rate(monkeypatch, every, pauses, decay,
                                                            least):
    taken, rates = [], []

    def step(student, bad, good, optimizer, config, purity):
        assert purity == 0.7
        # Only what wants a gradient is trained and clipped, by AdamW as torch has it.
        assert type(optimizer) is torch.optim.AdamW
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(one.weight)]
        taken.append((bad, good))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return len(taken), -len(taken)

    monkeypatch.setattr(dp, "_step", step)
    one = nn.Linear(1, 1)
    one.bias.requires_grad_(False)
    chosen, seen = UnlearnConfig(lr=0.5, epochs=3, min_steps=least, decay=decay), []
    for number, (ce,), (kl,) in dp.unlearning_steps(one, range(6), range(4), chosen,
                                                    StopConfig(eval_every=every), 0, 0.7):
        assert len(taken) == number  # it waits to be read
        seen.append(number)
        first = ([0] + seen)[-2] + 1  # means over the steps since the last pause
        assert (kl, ce) == ((first + number) / 2, -(first + number) / 2)
    assert seen == pauses
    steps = range(pauses[-1])
    assert rates == [0.5 * dp.lr_factor(i, len(steps), decay) for i in steps]
    epochs = [tuple(bad for bad, _ in taken[i:i + 6]) for i in range(0, 18, 6)]
    assert len(set(epochs)) > 1 and all(sorted(each) == list(range(6)) for each in epochs)
    clean = [good for _, good in taken]
    assert [sorted(clean[i:i + 4]) for i in range(0, 16, 4)] == [[0, 1, 2, 3]] * 4


def answers(classifier, model):
    return replace(classifier, model=model).logits(TRAIN.inputs)


def test_only_adapter_and_head_can_learn(small):
    before = copy.deepcopy(small.model.state_dict())
    one, two, other = (dp.with_adapter(small.model, CALM.adapter, seed) for seed in (0, 0, 1))
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    assert torch.equal(answers(small, one), answers(small, small.model))  # it starts so
    learns = {name: p for name, p in one.named_parameters() if p.requires_grad}
    adapter = {name: p.shape for name, p in learns.items() if "lora_" in name}
    assert sorted(tuple(learns[name].shape) for name in {*learns} - {*adapter}) == [(2,), (2, 16)]
    # A and B of three maps in each of three layers.
    assert Counter(map(tuple, adapter.values())) == {(2, 16): 9, (16, 2): 9}
    assert same(before, small.model.state_dict())


BACK = (0.25, 0.25, 0.9)  # at the line, and as right as at the start
AWAY_YET, LOST = (1.0, 0.25, 0.9), (0.25, 0.25, 0.5)


@pytest.mark.parametrize("seen, stop, least, cycles", [
    ([LOST, BACK, LOST], True, 0, [0, 2, 4]), ([BACK], True, 0, [0, 2]),
    ([BACK] * 4, True, 5, [0, 2, 4, 6]),  # so many steps in any case
    ([AWAY_YET, AWAY_YET, BACK], True, 0, [0, 2, 4, 6]),
    ([LOST] * 4, True, 0, [0, 2, 4, 6, 8]),  # never: all epochs
    ([BACK] * 4, False, 0, [0, 2, 4, 6, 8])])  # no rule
def test_unlearning_stops_by_the_rule(monkeypatch, seen, stop, least, cycles):
    """The student is one number, which is the number of the step."""
    chosen = replace(CALM.unlearning, min_steps=least)

    def unlearning_steps(student, flagged, clean, unlearning, stopping, seed, purity):
        assert (flagged, clean, unlearning, seed) == ("flagged", "clean", chosen, 0)
        assert purity == 0.7
        for step in (2, 4, 6, 8):
            student.weight.data.fill_(step)
            yield step, (step / 8,), (step / 4,)

    monkeypatch.setattr(dp, "unlearning_steps", unlearning_steps)
    student, script, called = nn.Linear(1, 1), iter([AWAY_YET, *seen, *[AWAY_YET] * 9]), []
    start, observed = student.weight.item(), []

    def observe(model):
        observed.append(model.weight.item())
        return next(script)

    config = replace(CALM, unlearning=chosen, stopping=replace(CALM.stopping, stop=stop))
    history = dp.unlearn(student, "flagged", "clean", observe, config, 0.7,
                         lambda model, entry: called.append((model.weight.item(), entry)))
    assert [entry.cycle for entry in history] == cycles
    # Each entry is one of the student as it then was.
    assert observed == near([start, *cycles[1:]]) and student.weight.item() == cycles[-1]
    assert called == list(zip(observed[1:], history[1:]))
    assert [entry[4:6] for entry in history] == [((), ()), *[((c / 8,), (c / 4,))
                                                             for c in cycles[1:]]]


# -------------------------------------------------------------------- evidence

SMALL = changed(CALM, fpr=0.3, alpha=math.inf, min_suspects=1, max_loss=1.0,
                shares=(0.4, 0.2, 0.4))
FREE = changed(SMALL, tolerance=1.0)  # settled as soon as the samples have turned
STRICT = {"alpha": 0.05, "contrast": 0.5}
PARTS = stratified_split(CLEAN, SMALL.shares, SMALL.seed)


def search(classifier, **changes):
    config = changed(SMALL, **changes)
    detector, flags, evidence = dp.search(context(classifier=classifier), PARTS, config)
    return detector, flags, dp.suspects_of(flags, evidence, config)


def flag(monkeypatch, indices, labels=None):
    """Let the detector flag these; of 20 clean samples of a class one lies above."""
    judge = replace(detector([0, 1] * 20 if labels is None else labels),
                    clean=torch.zeros(40, 4))
    scores = torch.tensor([2.0 if i in indices else 0.0 for i in range(50)])
    flags = Flags(tuple(indices), scores, torch.zeros(50, 4), 1.0,
                  torch.tensor([0.0] * 38 + [2.0] * 2), (0,))
    monkeypatch.setattr(dp, "fit_detector", lambda *rest: judge)
    monkeypatch.setattr(dp, "detect", lambda *rest: flags)
    return judge, flags


EVEN, ODD = range(0, 40, 2), range(1, 40, 2)  # 20 of the 25 training samples of either class


@pytest.mark.parametrize("flagged, changes, suspects", [
    ([*EVEN, 1, 3], STRICT, [EVEN]),  # two flags of class 1 are chance
    ([*ODD, 0, 2], STRICT, [ODD]),
    ([*ODD, 0, 2], {"alpha": math.inf, "contrast": math.inf}, [[0, 2], ODD]),
    (ODD, {"alpha": math.inf}, [ODD]),  # a label without flags is no suspect
    (EVEN, {**STRICT, "min_suspects": 20}, [EVEN])])
def test_the_labels_with_too_many_flags_are_suspects(small, monkeypatch, recwarn, flagged,
                                                     changes, suspects):
    judge, flags = flag(monkeypatch, sorted(flagged))
    found = search(small, **changes)
    assert found[:2] == (judge, flags) and not recwarn.list
    assert [list(c.indices) for c in found[2]] == [sorted(part) for part in suspects]
    everything = evidence_by_class(judge, flags, TRAIN.labels)
    assert [c for c in everything if c in found[2]] == found[2]


@pytest.mark.filterwarnings("ignore:no evidence")
def test_excess_and_contrast_must_both_be_there(small, monkeypatch):
    """As many flags of each label are an excess of both, and no contrast."""
    judge, flags = flag(monkeypatch, [*EVEN, *ODD])
    both = evidence_by_class(judge, flags, TRAIN.labels)
    assert min(c.excess for c in both) > 3 and max(abs(c.contrast) for c in both) < 1e-6
    assert search(small, **STRICT)[2] == []
    assert len(search(small, alpha=0.05, contrast=-1.0)[2]) == 2  # the rule without contrast
    # And a contrast that comes from too few flags of the other label is no excess.
    judge, flags = flag(monkeypatch, [])
    few = SuspectClass((1,), 1.0, 5.0, 0.0)
    assert dp.suspects_of(flags, [few, few], changed(SMALL, **STRICT)) == []
    assert len(dp.suspects_of(flags, [few, few], changed(SMALL, alpha=0.5))) == 2


@pytest.mark.filterwarnings("ignore:no evidence")
@pytest.mark.parametrize("seed", range(5))
def test_shuffled_labels_leave_no_evidence(small, seed):
    """What the flags say hangs on the labels of the samples."""
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    known, labels = [0, 1] * 200, [0, 1] * 200
    poisoned = [y == 1 and i % 5 < 2 for i, y in enumerate(labels)]
    flags = Flags(tuple(i for i in range(400) if poisoned[i]), torch.tensor(poisoned).double(),
                  None, 0.5, torch.tensor([float(i % 20 in (0, 3)) for i in range(400)]), ())
    mixed = [labels[i] for i in shuffled]
    found, lost = (dp.suspects_of(flags, evidence_by_class(detector(known), flags, given), DUP())
                   for given in (labels, mixed))
    assert len(found) == 1 and found[0].indices == flags.indices
    assert lost == []


@pytest.mark.filterwarnings("ignore:no evidence")
def test_the_chance_is_counted_for_every_label(small, monkeypatch):
    """With two labels, each has to be half as likely."""
    judge, flags = flag(monkeypatch, EVEN[:7])
    chance = evidence_by_class(judge, flags, TRAIN.labels)[0].chance
    found = [len(search(small, alpha=factor * chance, contrast=0.0)[2])
             for factor in (1.99, 2.0, 2.01)]
    assert found == [0, 1, 1]
    assert DUP().alpha / 2 == near(norm.sf(4), rel=0.06)


@pytest.mark.parametrize("flagged, changes, message", [
    ([*EVEN[:3], *ODD[:3]], STRICT,
     "6 samples .* no label stands out: excess 0.7, contrast 0.0 at most"),
    ([*EVEN, *ODD[:3]], {**STRICT, "min_suspects": 21},
     "23 samples .*, but only 20 of them carry a"),
    ([], {"alpha": math.inf}, "0 samples are flagged, but no label stands out")])
def test_without_evidence_the_model_comes_back_as_it_was(small, monkeypatch, flagged, changes,
                                                         message):
    judge, flags = flag(monkeypatch, flagged)
    monkeypatch.setattr(dp, "_unlearn", None)  # would fail
    with pytest.warns(UserWarning, match=f"no evidence of a backdoor: {message}.*The model is "
                                         "returned as it was; alpha=math.inf") as caught:
        found = changed(SMALL, **changes)(context(classifier=small))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert same(found.model.model.state_dict(), small.model.state_dict())
    assert found.model.model is not small.model
    assert (found.verdict, found.history) == ("no evidence", ())
    assert found.report == {"detector": judge, "flags": flags, "suspects": [], "student": None}
    assert found.seconds.keys() == {"search", "purify"}


def test_each_part_of_the_data_has_its_use(small, monkeypatch):
    flagged, used = [*EVEN[:9]], {}
    judge, flags = flag(monkeypatch, sorted([*flagged, 1]))

    def note(name, value=None):
        return lambda *given, **_: used.update({name: given}) or value

    for name, value in (
            ("fit_detector", judge), ("observer", lambda model: BACK), ("flagged_batches", None),
            ("clean_batches", None), ("unlearn", logs(BACK)),
            ("line_search", (small, 0.5)), ("accept_if_harmless", "purified"),
            ("evidence_by_class", [SuspectClass(tuple(flagged), 9.0, 9.0, 0.9),
                                   SuspectClass((1,), 0.0, 0.0, 0.0)])):
        monkeypatch.setattr(dp, name, note(name, value))
    found = changed(SMALL, **STRICT)(context(classifier=small))
    # Folds let all clean samples tell what is usual.
    assert used["fit_detector"][1:] == (CLEAN, SMALL.detector, None)
    assert used["evidence_by_class"] == (judge, flags, TRAIN.labels)
    monitored, held, expected = used["observer"][1:]
    right = sum(a == b for a, b in zip(small.predict(CLEAN.inputs), CLEAN.labels)) / 60
    assert held == used["accept_if_harmless"][2] == PARTS[1]
    assert expected == near(0.9 * (1 - right) + 0.1 * right)  # of all clean samples
    assert used["clean_batches"][1] == PARTS[2]
    assert found.report["share"] == 0.5 and found.report["purity"] == near(0.9)
    # As published, one part calibrates and another sets the threshold.
    changed(SMALL, **STRICT, folds=1)(context(classifier=small))
    assert (used["fit_detector"][1], used["fit_detector"][3]) == tuple(PARTS[:2])
    changed(SMALL, **STRICT, disjoint=False)(context(classifier=small))
    assert all(part is CLEAN for part in (
        used["observer"][2], used["accept_if_harmless"][2], used["clean_batches"][1]))


@pytest.mark.parametrize("count, most, monitored, unlearned", [
    (400, 160, 160, 240), (400, 3, 3, 397), (9, 160, 4, 5), (8, 160, 4, 4), (7, 160, 7, 7),
    (400, 0, 400, 400)])
def test_suspects_are_monitored_or_unlearned(small, monkeypatch, count, most, monitored,
                                             unlearned):
    """Under two batches those to be unlearned have to tell when to stop themselves."""
    train, used = TrainSet(tuple(map(str, range(500))), (0, 1, 1, 0) * 125, NAMES), []
    monkeypatch.setattr(dp, "observer", lambda *given: used.append(given[1:]))
    monkeypatch.setattr(dp, "flagged_batches", lambda model, some, *rest: used.append(some.inputs))
    monkeypatch.setattr(dp, "unlearn", lambda *rest: [])
    suspects = [SuspectClass((*range(count - 2),), 0.0, 0.0, 1.0),
                SuspectClass((450, 451), 0.0, 0.0, 0.5)]
    _, _, about = dp._unlearn(context(classifier=small, train=train), PARTS, suspects,
                              changed(SMALL, monitored=most, stop=False))
    (kept, held, _), texts = used
    assert about["purity"] == near(((count - 2) * 1.0 + 2 * 0.5) / count)
    assert held == PARTS[1] and about["share"] == 1.0
    assert [train.labels[int(text)] for text in kept.inputs] == list(kept.labels)
    assert (len(kept), len(texts)) == (monitored, unlearned)
    both = {str(i) for c in suspects for i in c.indices}
    assert {*kept.inputs, *texts} == both and {*kept.inputs} & {*texts} == (
        both if count < 8 or not most else set())
    assert list(map(int, kept.inputs)) != sorted(map(int, kept.inputs))  # drawn, not the first


@pytest.mark.parametrize("expected", [0.2, 0.5, 0.8])
def test_the_delivered_model_agrees_as_expected_from_both_sides(small, monkeypatch, expected):
    """Unlearning turns every suspect; the way back ends where as many agree as should."""
    guesses = small.predict(TRAIN.inputs)
    train = TrainSet(TRAIN.inputs, tuple(guesses), NAMES)

    def overshoot(student, *rest):
        for name, weight in student.named_parameters():
            if weight.requires_grad and "lora_" not in name and weight.ndim == 2:
                weight.data.mul_(torch.linspace(-0.1, -3, 16))
        return logs(AWAY_YET)

    end = replace(small, model=copy.deepcopy(small.model))
    overshoot(end.model.classifier)
    turn = [i for i, y in enumerate(end.predict(TRAIN.inputs)) if y != guesses[i]]
    assert len(turn) > 20

    monkeypatch.setattr(dp, "unlearn", overshoot)
    monkeypatch.setattr(dp, "expected_agreement", lambda *rest: expected)
    suspects = [SuspectClass(tuple(turn), 9.0, 9.0, 1.0)]

    def agreement(**changes):
        model, history, about = dp._unlearn(context(classifier=small, train=train), PARTS,
                                            suspects, changed(SMALL, monitored=0, **changes))
        agree = [y == guesses[i] for i, y in zip(turn, model.predict(train.take(turn).inputs))]
        return sum(agree) / len(turn), history, about["share"]

    found, history, share = agreement()
    assert abs(found - expected) <= 0.15 and 0 < share < 1
    assert history[-1].agreement == near(found) and history[-1].base == expected
    # Without the way back nobody agrees any more: an inverted backdoor.
    assert agreement(stop=False)[0] < expected - 0.15


# ------------------------------------------------------------------ end to end


def test_the_suspected_model_stays_as_it_is_and_the_seed_decides(small):
    before, state = copy.deepcopy(small.model.state_dict()), torch.random.get_rng_state()
    called = []
    found = FREE(context(classifier=small, callback=lambda model, log: called.append(log)))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(7)  # the run has a seed of its own, and nobody can make it stop
        again = FREE(context(classifier=small, callback=lambda model, log: True))
    after, report = found.model.model, found.report
    assert same(before, small.model.state_dict()) and not small.model.training
    assert found.verdict == "purified" and not same(before, after.state_dict())
    assert after.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in after.parameters())  # as they had
    assert same(again.model.model.state_dict(), after.state_dict())
    assert found.model.tokenizer is small.tokenizer and found.model.max_length == 16
    assert list(found.history[1:]) == called and repr(again.history) == repr(found.history)
    student, share = report["student"], report["share"]
    assert (answers(small, student) - answers(small, small.model)).abs().max() > 0.01
    # What is delivered lies on the straight line.
    end = copy.deepcopy(student).merge_and_unload().state_dict()
    assert all(torch.allclose(weight, before[name].lerp(end[name], share), atol=1e-6)
               for name, weight in after.state_dict().items())
    assert report["suspects"] == [c for c in evidence_by_class(
        report["detector"], report["flags"], TRAIN.labels) if c.indices]
    cycles = [log.cycle for log in found.history]
    assert cycles[:2] == [0, 2] and cycles[-1] == cycles[-2]


def test_a_decoder_can_be_defended():
    small = built(LlamaConfig(**SIZES))
    before = copy.deepcopy(small.model.state_dict())
    found = changed(FREE, modules=("q_proj", "v_proj"), pooling="last")(context(classifier=small))
    assert found.verdict == "purified" and same(before, small.model.state_dict())
    after = found.model.model.state_dict()
    other = {name.split(".")[-2] for name in before if (before[name] != after[name]).any()}
    assert before.keys() == after.keys() and other == {"q_proj", "v_proj", "score"}


UNDONE = "the defense took the held-out accuracy from 100.0% to 0.0% and was undone: lower lr"
UNSETTLED = ("unlearning has not settled: 52% of the monitored samples keep their label, 25% were "
             "expected, and the held-out accuracy is 90%")


@pytest.mark.parametrize("changes, last, said", [
    ({"max_loss": 0.99}, BACK, UNDONE), ({"max_loss": 1.0}, BACK, None),
    ({"max_loss": 1.0}, (0.52, 0.25, 0.9), UNSETTLED), ({"stop": False}, AWAY_YET, None),
    ({"stop": False, "max_loss": 0.0}, BACK, None)])
def test_the_verdict_is_told(small, monkeypatch, recwarn, changes, last, said):
    guesses = small.predict(some_texts(90, 5))
    chosen = [i for label in (0, 1) for i in [i for i, y in enumerate(guesses) if y == label][:12]]
    right = CleanSet(some_texts(90, 5), tuple(guesses), NAMES).take(chosen)
    flag(monkeypatch, EVEN)

    def harm(student, *rest):
        """Turn all answers round."""
        for name, weight in student.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight.data.neg_()
        return logs(AWAY_YET, last)

    monkeypatch.setattr(dp, "unlearn", harm)
    monkeypatch.setattr(dp, "line_search", lambda before, after, excess: (after, 1.0))
    monkeypatch.setattr(dp, "observer", lambda *rest: lambda model: last)
    found = changed(SMALL, **changes)(context(classifier=small, clean=right))
    undone, stop = said == UNDONE, changes.get("stop", True)
    assert found.verdict == ("undone" if undone else "purified") and len(found.history) == 2 + stop
    assert same(found.model.model.state_dict(), small.model.state_dict()) is undone
    assert found.report["student"] is not None and found.model.model is not small.model
    told = [w for w in recwarn.list if issubclass(w.category, UserWarning)]
    assert [str(w.message)[:len(said or "")] for w in told] == ([said] if said else [])
    assert all(w.filename == __file__ for w in told)


def test_a_defense_says_what_it_lacks(small):
    with pytest.raises(ValueError, match="DUP needs the training set: give the context a `train`"):
        SMALL(context(classifier=small, train=None))
    wide = replace(CLEAN, label_names=(*NAMES, "so-so"))
    with pytest.raises(ValueError, match="the model gives 2 classes and the data has 3"):
        SMALL(context(classifier=small, clean=wide))
    renamed = replace(TRAIN, label_names=NAMES[::-1])
    with pytest.raises(ValueError, match=r"differ in their classes: \('good', 'bad'\) and"):
        SMALL(context(classifier=small, train=renamed))
    with pytest.raises(ValueError, match="the first token of a decoder sees no other one"):
        SMALL(context(classifier=built(LlamaConfig(**SIZES))))


# -------------------------------------------------------- how the studies run it


def test_the_evaluator_judges_the_flags():
    judge = detector([0, 1] * 20)
    scores = torch.tensor([9.0, 5, 6, 1, 7, *[0.0] * 45])
    flags = Flags((0, 2, 4, 1), scores, None, 1.0, torch.tensor([0.0] * 38 + [2.0] * 2), ())
    everything = evidence_by_class(judge, flags, TRAIN.labels)
    report = {"detector": judge, "flags": flags, "suspects": everything[:1]}
    poisoned = tuple(i in (0, 2, 3) for i in range(50))
    unknown, found = (variants._flags(
        SimpleNamespace(report=report), SimpleNamespace(train=TRAIN, record=record))
        for record in (None, SimpleNamespace(poisoned=poisoned)))
    assert found["chance"] == near(2 * everything[0].chance) and found["threshold"] == 1.0
    assert [found[name] for name in ("flagged", "scanned", "suspect_samples")] == [4, 50, 3]
    assert unknown.items() <= found.items()
    assert found["precision"].value == near(2 / 4)
    assert found["suspect_precision"].value == near(2 / 3)
    assert found["tpr"].value == near(2 / 3) and found["fpr"].value == near(2 / 47)
    # Of 47 clean samples two lie above the third poisoned one, and one above the second.
    assert found["auroc"] == near((47 + 46 + 45) / (3 * 47))


def test_the_variants_differ_from_the_defense_in_what_they_are_called_after():
    found = {name: chosen for name, chosen in variants.VARIANTS.items()
             if isinstance(chosen, DUP) and name not in variants.COUNTS}
    free = changed(DUP(), epochs=4, min_steps=0, stop=False, eval_every=12, match=False)
    assert found.pop("dup-causal").detector.pooling == "last"  # its first token sees no other
    assert found == {
        "dup": DUP(), "dup-retraining": DUP(), "dup-forced": DUP(alpha=math.inf),
        "dup-authors": AUTHORS,
        "dup-unstopped": free,
        "lora": replace(free, unlearning=replace(free.unlearning, weight=0.0)),
        "dup-no-unlikelihood": changed(free, unlikelihood=False),
        "dup-uncapped": changed(free, cap=None),
        "dup-batch-32": changed(DUP(), batch_size=32),
        "dup-fast": changed(DUP(), lr=5e-4, decay=True),
        "dup-one-set": DUP(disjoint=False), "dup-all-unlearned": DUP(monitored=0)}


def test_the_authors_values():
    """Of demo_unlearning.py and ms_defender.py, but for what a defender cannot do."""
    assert asdict(AUTHORS) == {
        "detector": {"pooling": "cls", "shrinkage": 0.1, "folds": 1, "choose": "index",
                     "layers": 3, "by_label": False, "fuse": "weighted", "weight": 0.9,
                     "fpr": 0.05},
        "adapter": {"rank": 32, "alpha": 64, "dropout": 0.1,
                    "modules": ("query", "key", "value")},
        "unlearning": {"lr": 5e-4, "batch_size": 32, "epochs": 5, "min_steps": 0, "decay": True,
                       "weight": 1.0, "ce_weight": 1.0, "match": False, "width": 2.0, "cap": None,
                       "unlikelihood": False},
        # Without a rule the other fields have no part.
        "stopping": {**asdict(StopConfig()), "eval_every": 0, "stop": False},
        "shares": (0.25, 0.25, 0.5), "seed": 2025, "min_suspects": 1, "alpha": math.inf,
        "contrast": DUP().contrast,  # an infinite alpha asks for nothing
        # Two faults that would spoil the comparison, not its point: see the chapter.
        "monitored": 160, "disjoint": True}


# ----------------------------------------------------------------------- roles


def test_the_defense_knows_nothing_of_attacks_victims_and_test_data():
    assert not names_in(ast.parse(inspect.getsource(dp))) & {*SECRETS, "shadow_loss"}
    # Which samples are poisoned is neither in the context nor in the hyperparameters, so that
    # any other record, such as a permuted one, gives the same result.
    assert {f.name for f in fields(Context)} == {
        "classifier", "clean", "train", "training", "callback"}
    assert not SECRETS & {f.name for kind in (DUP, DetectorConfig, *RANGES) for f in fields(kind)}
