"""DUP: losses, rule and evidence by hand, the adapter, and what a defense may see."""

import ast
import copy
import inspect
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import log
from types import SimpleNamespace

import pytest
import torch
from helpers.checks import has_ranges, near, same, unnoticed
from helpers.texts import (
    NAMES,
    POOL,
    RESERVED,
    SIZES,
    VIEW,
    at,
    built,
    detector,
    made,
    some_texts,
)
from helpers.walls import SECRETS, names_in
from scipy.stats import fisher_exact
from torch import nn
from transformers import LlamaConfig

from bdutils.defenses import anomaly
from bdutils.defenses import dup as dp
from bdutils.defenses.anomaly import Charge, Flags
from bdutils.defenses.bedkd import Reading
from bdutils.defenses.dup import AUTHORS, DUPSettings
from bdutils.defenses.mapping import split_reserved
from bdutils.experiments import variants as runs
from bdutils.roles import DefenderView, ReservedSet, TrainingSet


@pytest.fixture
def small():
    return replace(made(), model=copy.deepcopy(made().model))


def check_AdapterSettings(kind):
    has_ranges(kind, [("rank", 1), ("batch_size", 1), ("passes", 1), ("lr", 1e-9)],
               [("rank", 0), ("batch_size", 0), ("passes", 0), ("lr", 0.0), ("lr", math.nan),
                ("fpr", 0.0)])


def check_DUPSettings(kind):
    has_ranges(kind, [("look", 0), ("tail", 1), ("least", 1), ("push", 0.0), ("keep", 0.0),
                      ("slack", 0.0), ("alpha", math.inf), ("watched", 0)],
               [("look", -1), ("tail", 0), ("least", 0), ("push", -0.1), ("keep", -0.1),
                ("slack", -0.1), ("slack", math.nan), ("alpha", 0.0), ("passes", 0),
                ("weight", 1.1), ("watched", -1)])


# ------------------------------------------------------------------- the loss

# Row 0 keeps the teacher's answer, class 0, with 0.6; row 1 has one tenth left of it.
TEACHER, STUDENT = [[0.75, 0.25], [0.75, 0.25]], [[0.6, 0.4], [0.1, 0.9]]
KL = [0.75 * log(0.75 / 0.6) + 0.25 * log(0.25 / 0.4), 0.75 * log(7.5) + 0.25 * log(5 / 18)]
UNLIKELY = [-log(0.4), -log(0.9)]
# The slopes at the first logit: of -KL it is the teacher's share less the student's.
AWAY, KICK = [0.15, 0.65], [0.6, 0.1]
GOOD, LABELS = [[0.25, 0.75], [0.5, 0.5]], torch.tensor([1, 0])
CE = (log(4 / 3) + log(2)) / 2


def logits(rows, shift=0.0):
    return (torch.tensor(rows).log() + shift).detach().requires_grad_()


def says_of_rows(function, two, three):
    assert function(logits(STUDENT, 3.0), logits(TEACHER, -1.0)).tolist() == near(two)
    found = function(logits([[1 / 8, 3 / 8, 1 / 2]]), logits([[0.5, 0.25, 0.25]]))
    assert found.tolist() == near([three])


def check_divergence(divergence):
    # Teacher || student: 1/2 ln 4 + 1/4 ln(2/3) + 1/4 ln(1/2) = 3/4 ln 2 - 1/4 ln(3/2).
    says_of_rows(divergence, KL, 0.75 * log(2) - 0.25 * log(1.5))


def check_unlikelihood(unlikelihood):
    says_of_rows(unlikelihood, UNLIKELY, log(8 / 7))  # class 0 has one eighth
    # The surer, the steeper, up to a slope of one, which no rounding takes away.
    for margin in (-20.0, -5.0, 0.0, 5.0, 12.0, 17.0, 27.0, 200.0):
        z = torch.tensor([[0.0, margin]], requires_grad=True)
        value = unlikelihood(z, torch.tensor([[0.0, 1.0]]))
        assert value.item() == near(max(margin, 0) + math.log1p(math.exp(-abs(margin))))
        slope, = torch.autograd.grad(value, z)
        p = 1 / (1 + math.exp(-margin))
        assert slope[0].tolist() == near([-p, p])


def pushed(push_of, goal=0.0, student=STUDENT, **changes):
    """Return what `push_of` says, and its slope at the first of the two logits of each row."""
    bad = logits(student, 3.0)
    plain = {"kick": False, "cap": None, "gate": False, **changes}
    far, kl = push_of(bad, logits(TEACHER[:1] * len(student)), DUPSettings(**plain), goal)
    slope, = torch.autograd.grad(far, bad, allow_unused=True, materialize_grads=True)
    assert slope.sum(1).tolist() == near([0] * len(student))  # softmax has no level
    return far.item(), kl.item(), slope[:, 0].tolist()


def check_push_of(push_of):
    for kick, terms, slopes in ((False, [-kl for kl in KL], AWAY), (True, UNLIKELY, KICK)):
        def says(rows, *where, kick=kick, terms=terms, slopes=slopes, **changes):
            """The mean of the rows that count, whatever they are, and of all divergences."""
            assert pushed(push_of, *where, kick=kick, **changes) == (
                near(sum(r * t for r, t in zip(rows, terms)) / 2), near(sum(KL) / 2),
                near([r * s / 2 for r, s in zip(rows, slopes)]))

        says((1, 1))
        says((1, 1), cap=1.3)
        says((1, 0), cap=1.0)  # only the second row is further than 1, and it alone is left
        says((0, 0), cap=0.04)
        # One of two rows agrees with the teacher. Where less is wanted they are pushed.
        says((1, 1), 0.49, gate=True)
        says((0, 0), 0.5, gate=True)
        says((1, 1), 1.0)  # there is no gate
        says((1, 0), 0.4, gate=True, cap=1.0)
    # Two of three agree, which is more than a half.
    found = pushed(push_of, 0.5, student=[*STUDENT, STUDENT[0]], gate=True)
    assert found[0] == near(-(sum(KL) + KL[0]) / 3)
    # Where the student is the teacher, KL is flat, and the kick has the slope 3/4.
    start = partial(pushed, push_of, student=TEACHER)
    assert start() == (near(0), near(0), near([0, 0], abs=1e-7))
    assert start(kick=True) == (near(log(4)), near(0), near([0.75 / 2] * 2))


def check_dup_loss(dup_loss):
    plain = DUPSettings(kick=False, cap=None, gate=False, push=0.5, keep=3.0)

    def run(**changes):
        bad, good = logits(STUDENT), logits(GOOD)
        found, kl, ce = dup_loss((bad, logits(TEACHER)), (good, LABELS),
                                 replace(plain, **changes))
        slopes = torch.autograd.grad(found, (bad, good), allow_unused=True, materialize_grads=True)
        return (found.item(), kl, ce), *(slope[:, 0].tolist() for slope in slopes)

    # Half of the mean of two rows, and three times softmax less label over two rows.
    value, away, right = run()
    assert value == near((-0.5 * sum(KL) / 2 + 3 * CE, sum(KL) / 2, CE))
    assert away == near([0.5 * s / 2 for s in AWAY]) and right == near([3 * 0.125, -3 * 0.25])
    assert run(push=0.0) == (near((3 * CE, sum(KL) / 2, CE)), [0, 0], right)
    assert run(keep=0.0) == (near((-0.5 * sum(KL) / 2, sum(KL) / 2, CE)), away, [0, 0])
    # The goal is passed on: half of the rows agree, and all may.
    gated = replace(plain, gate=True)
    found = dup_loss((logits(STUDENT), logits(TEACHER)), (logits(GOOD), LABELS), gated, 1.0)
    assert found[0].item() == near(3 * CE)


@dataclass
class Words:
    """Stands for a classifier whose model maps a text to a class."""

    model: object

    def predict(self, texts):
        return [self.model(text) for text in texts]


WATCHED = TrainingSet(("a1", "b1", "c0"), (1, 1, 0), NAMES)
HELD = ReservedSet(("e0", "f0", "g0", "h1", "i1"), (0, 0, 0, 1, 1), NAMES)


def check_readings(readings):
    answers = {"a1": 1, "b1": 0, "c0": 0, "e0": 0, "f0": 0, "g0": 1, "h1": 1, "i1": 0}
    # Two of three watched rows keep their label, three of five held-out ones have theirs. Of
    # the held-out 0 one in three is called 1, of the held-out 1 one in two is called 0.
    base = (1 / 3 + 1 / 3 + 1 / 2) / 3
    for purity, wanted in ((0.75, 0.75 * base + 0.25 * 0.6), (1.0, base), (0.0, 0.6)):
        observe = readings(Words(lambda text: 1), WATCHED, HELD, purity)
        assert observe(answers.get) == near((2 / 3, wanted, 3 / 5))


def seen(*readings):
    return [Reading(4 * i, *reading) for i, reading in enumerate(readings)]


START, TIGHT = (0.9, 0.5, 0.875), DUPSettings(slack=1 / 16)  # agreement, base, accuracy


def check_harmed(harmed):
    for accuracies, wanted in (
            ([0.875], False), ([0.875, 1.0], False),
            ([0.875, 0.8125], False),  # the slack is just used up
            ([0.875, 0.75], True), ([0.875, 0.5, 0.875], False),
            ([0.875, 1.0, 0.8125], False),  # not against the best
            ([0.875, 0.75, 0.75], True)):  # nor against the one before
        assert harmed(seen(*((0.9, 0.5, a) for a in accuracies)), TIGHT) is wanted


def check_settled(settled):
    for readings, done in (
            ([(0.5, 0.5, 0.875)], True),  # at the line
            ([(0.53125, 0.5, 0.875)], False),  # has never been there
            ([(0.4375, 0.5, 0.875)], True),  # the slack is just used up
            ([(0.375, 0.5, 0.875)], False),  # too far under it
            ([(0.5, 0.5, 0.8125)], True),
            ([(0.5, 0.5, 0.75)], False),  # harm is left
            ([(0.25, 0.5, 0.75), (0.5, 0.5, 0.875)], True),  # both have come back
            ([(0.25, 0.5, 0.75), (0.5625, 0.5, 0.875)], True),  # it had been there
            ([(0.25, 0.5, 0.75), (0.625, 0.5, 0.875)], False),  # but has gone too far back
            ([(0.6, 0.7, 0.75), (0.53125, 0.5, 0.875)], True),  # at the line of then
            ([(0.6, 0.5, 0.75), (0.53125, 0.5, 0.875)], False),
            ([(0.25, 0.25, 0.875), (0.375, 0.5, 0.875)], False),  # under the line of now
            ([], False)):
        assert bool(settled(seen(START, *readings), TIGHT)) is done


def check_goal_of(goal_of):
    # Above its line the agreement is led there; at it or under it all rows may agree.
    for readings, wanted in (
            ([], 0.5), ([(0.53125, 0.5, 0.875)], 0.5), ([(0.5, 0.5, 0.875)], 1.0),
            ([(0.25, 0.5, 0.875)], 1.0), ([(0.9, 0.625, 0.875)], 0.625),
            ([(0.9, 0.5, 0.25)], 0.5),  # harm does not shut the gate before they have turned
            ([(0.25, 0.5, 0.25), (0.9, 0.5, 0.25)], 1.0),  # but afterwards
            ([(0.25, 0.5, 0.25), (0.9, 0.5, 0.8125)], 0.5)):
        assert goal_of(seen(START, *readings), TIGHT) == wanted


MUTATIONS = {  # of each function: what is written, and what instead
    check_AdapterSettings: [("self.rank, ", ""), (", self.batch_size", ""),
        (", self.passes)", ")"), ("passes) >= 1", "passes) > 1"), ("self.lr > 0", "self.lr >= 0"),
        ("super().__post_init__()", "pass")],
    check_DUPSettings: [("x >= 0 for", "x >= -1 for"), ("x >= 0 for", "x > 0 for"),
                        ("min(self.tail, self.least) >= 1", "True"),
                        ("min(self.tail, self.least) >= 1", "min(self.tail, self.least) >= 2"),
                        ("self.look, ", ""), ("self.push, ", ""), ("self.keep, ", ""),
                        ("self.slack,\n                      self", "self"),
                        (", self.watched", ""), ("self.alpha > 0", "True")],
    check_divergence: [("(logits: Tensor, teacher: Tensor)", "(teacher: Tensor, logits: Tensor)"),
        ("teacher.log_softmax", "(teacher / 2).log_softmax"), (".sum(1)", ".mean(1)"),
        ("p - logits", "p + logits"), ("p.exp() * ", "")],
    check_unlikelihood: [
        ("(logits: Tensor, teacher: Tensor)", "(teacher: Tensor, logits: Tensor)"),
        ("teacher.argmax(1", "logits.argmax(1"), ("-math.inf", "0.0"),
        (".scatter(1, answer, -math.inf)", ""), ("logits.log_softmax(1)", "logits"),
        (".scatter(1, answer, -math.inf)", ".gather(1, answer)"),
        ("return -others", "return others"), ("others.logsumexp(1)", "others.amax(1)"),
        ("others.logsumexp(1)", "(1 - logits.softmax(1).gather(1, answer)[:, 0]).log()")],
    check_push_of: [("else -kl", "else kl"), ("if settings.kick", "if True"),
        ("if settings.kick", "if False"), ("settings.cap is not None", "False"),
        ("kl < settings.cap", "kl.mean() < settings.cap"),
        ("kl < settings.cap", "far < settings.cap"), ("settings.gate and ", ""),
        ("settings.gate and", "False and"), ("same <= goal", "same < goal"),
        ("== teacher.argmax(1)", "!= teacher.argmax(1)"),
        ("return far.mean()", "return far.sum()"), ("kl.mean()\n", "far.mean()\n"),
        ("divergence(logits, teacher)", "divergence(teacher, logits)"),
        ("unlikelihood(logits, teacher)", "unlikelihood(teacher, logits)")],
    check_dup_loss: [("settings.push * far", "-settings.push * far"),
        ("settings.push * far", "far"), ("settings.keep * ce", "ce"),
        ("+ settings.keep", "- settings.keep"),
        ("cross_entropy(*clean)", "cross_entropy(clean[0], 1 - clean[1])"),
        ("cross_entropy(*clean)", 'cross_entropy(*clean, reduction="sum")'),
        ("push_of(*flagged,", "push_of(*flagged[::-1],"),
        ("settings, goal)\n", "settings, 0.0)\n"),
        ("kl.item(), ce.item()", "ce.item(), kl.item()")],
    check_readings: [
        ("purity * base + (1 - purity) * accuracy", "(1 - purity) * base + purity * accuracy"),
        ("(1 - purity) * accuracy", "(1 - purity) * agreement"),
        ("held_out.labels, watched.labels)", "held_out.labels, held_out.labels)"),
        ("(watched.texts), watched.labels", "(watched.texts), watched.labels[::-1]"),
        ("cacc(guesses, held_out.labels)", "cacc(guesses, held_out.labels[::-1])"),
        ("replace(classifier, model=model)", "classifier")],
    check_harmed: [("lost > settings", "lost >= settings"), ("lost > settings.slack", "lost > 0"),
        ("history[0].acc", "history[-2:][0].acc"),
        ("history[0].accuracy", "max(r.accuracy for r in history)"),
        ("history[-1].accuracy", "min(r.accuracy for r in history)")],
    check_settled: [("agreement <= reading.base", "agreement < reading.base"),
        ("agreement <= reading.base", "agreement <= last.base"),
        ("agreement <= reading.base", "agreement <= history[0].base"),
        ("any(reading", "all(reading"), ("in history)", "in history[-1:])"), ("(turned and ", "("),
        (" and not harmed(history, settings)", ""),
        ("abs(last.agreement - last.base)", "(last.agreement - last.base)"),
        ("abs(last.agreement - last.base)", "(last.base - last.agreement)"),
        ("base) <= settings.slack", "base) < settings.slack"),
        ("last = history[-1]", "last = history[0]")],
    check_goal_of: [("shut = last.agreement <= last.base or ", "shut = "),
        ("shut = last.agreement <= last", "shut = last.agreement < last"),
        (" or turned and harmed(history, settings)", ""),
        ("or turned and harmed(history, settings)", "or turned"),
        ("or turned and harmed", "or harmed"), ("any(reading", "all(reading"),
        ("else last.base", "else last.agreement"), ("else last.base", "else history[0].base")],
}


@pytest.mark.parametrize("check", MUTATIONS)
def test_functions_are_what_plain_arithmetic_says_and_every_mutation_is_noticed(check):
    assert unnoticed(dp, check, MUTATIONS[check]) == []


CALM = DUPSettings(rank=2, lora_alpha=4, batch_size=4, lr=1e-2, passes=2, steps=0, look=2, tail=2)


def test_every_row_is_prepared_once_with_answer_or_label(small):
    bad = dp.flagged_batches(small, POOL.texts, CALM)
    good = dp.clean_batches(small, POOL, CALM)
    found = [(tuple(ids[ids > 0].tolist()), label) for inputs, labels in good
             for ids, label in zip(inputs["input_ids"], labels.tolist())]
    encoded = list(map(tuple, small.encode(POOL.texts)))
    assert [ids for ids, _ in found] != encoded
    assert sorted(found) == sorted(zip(encoded, POOL.labels))
    assert [len(labels) for _, labels in good] == [4] * 12 + [2] == [len(z) for _, z in bad]
    small.model.train()  # the teacher answers without dropout all the same
    again = dp.flagged_batches(small, POOL.texts, CALM)
    for (inputs, answers), (_, others) in zip(bad, again):
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
    before, bad, good = head.weight.detach().clone(), logits([[0.9, 0.1]]).detach(), LABELS[:1]
    found = []
    for goal in (1.0, 0.5):  # nothing may be pushed, and then the row may
        loss, *terms = dp.dup_loss((head(x).logits, bad), (head(x).logits, good), CALM, goal)
        slope, = torch.autograd.grad(loss, head.weight)
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        said = dp._step(head, ({"x": x}, bad), ({"x": x}, good), [head.weight], optimizer, CALM,
                        goal)
        assert list(said) == terms and not head.training and head.weight.grad is None
        assert torch.allclose(before - head.weight, slope / max(1, slope.norm()), atol=1e-5)
        found.append(slope)
        head.weight.data.copy_(before)
    assert (found[0].norm() > 1).item() is clipped
    assert not torch.allclose(*found)


@pytest.mark.parametrize("decay, steps, wanted", [
    # A tenth of 40 steps is 4: then level, or down by 1/36 a step.
    (False, 40, {0: 1 / 4, 1: 2 / 4, 3: 1, 4: 1, 22: 1, 39: 1}),
    (True, 40, {0: 0, 1: 1 / 4, 3: 3 / 4, 4: 1, 22: 1 / 2, 39: 1 / 36, 40: 0}),
    (False, 9, {0: 1, 8: 1}),  # too few for a warm-up
    (True, 9, {0: 1, 6: 1 / 3, 9: 0}), (True, 1, {0: 1, 1: 0})])
def test_rate_by_hand(decay, steps, wanted):
    assert {i: dp.rate(i, steps, decay) for i in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("look, pauses, decay, least", [
    (4, [4, 8, 12, 16, 18], False, 17), (0, [6, 12, 18, 20], True, 20), (99, [18], False, 0)])
def test_pushes_pause_in_time_and_keep_order_goal_rate(monkeypatch, look, pauses, decay, least):
    taken, rates, goals = [], [], []

    def step(student, bad, good, own, optimizer, settings, goal):
        # Only what wants a gradient is trained and clipped, by AdamW as torch has it.
        assert type(optimizer) is torch.optim.AdamW and [id(p) for p in own] == [id(one.weight)]
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(one.weight)]
        taken.append((bad, good))
        rates.append(optimizer.param_groups[0]["lr"])
        goals.append(goal)
        optimizer.step()
        return len(taken), -len(taken)

    monkeypatch.setattr(dp, "_step", step)
    one, history = nn.Linear(1, 1), [Reading(0, 1.0, 0.75, 0.9)]
    one.bias.requires_grad_(False)
    chosen, seen = DUPSettings(lr=0.5, passes=3, steps=least, decay=decay, look=look), []
    for number, (ce,), (kl,) in dp.pushes(one, range(6), range(4), history, chosen):
        assert len(taken) == number  # it waits to be read
        seen.append(number)
        first = ([0] + seen)[-2] + 1  # means over the steps since the last pause
        assert (kl, ce) == ((first + number) / 2, -(first + number) / 2)
        history.append(Reading(number, 1.0, number / 100, 0.9))
    assert seen == pauses
    steps = range(pauses[-1])
    assert rates == [0.5 * dp.rate(i, len(steps), decay) for i in steps]
    assert goals == [max([p for p in pauses if p <= i], default=75) / 100 for i in steps]
    passes = [tuple(bad for bad, _ in taken[i:i + 6]) for i in range(0, 18, 6)]
    assert len(set(passes)) > 1 and all(sorted(each) == list(range(6)) for each in passes)
    clean = [good for _, good in taken]
    assert [sorted(clean[i:i + 4]) for i in range(0, 16, 4)] == [[0, 1, 2, 3]] * 4


def answers(classifier, model):
    return replace(classifier, model=model).logits(POOL.texts)


def test_only_adapter_and_head_can_learn(small):
    before = copy.deepcopy(small.model.state_dict())
    one, two, other = (dp.with_adapter(small.model, replace(CALM, seed=s)) for s in (0, 0, 1))
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


@pytest.mark.parametrize("looks, changes, cycles, weight", [
    ([LOST, BACK, LOST], {}, [0, 2, 4, 6, 6], (4 + 6) / 2),
    ([BACK, BACK, BACK, BACK], {"tail": 3}, [0, 2, 4, 6, 6], (2 + 4 + 6) / 3),
    ([BACK], {"tail": 1}, [0, 2, 2], 2),
    ([AWAY_YET, AWAY_YET, BACK, BACK], {"tail": 9}, [0, 2, 4, 6, 8, 8], (6 + 8) / 2),  # the end
    ([LOST] * 4, {}, [0, 2, 4, 6, 8], 8),  # never: all passes, nothing to average
    ([BACK] * 4, {"stop": False}, [0, 2, 4, 6, 8], 8)])  # no rule
def test_unlearning_stops_by_the_rule_and_averages_what_follows(monkeypatch, looks, changes,
                                                                cycles, weight):
    """The student is one number, which is the number of the step."""
    def pushes(student, flagged, clean, history, settings):
        assert (flagged, clean) == ("flagged", "clean")
        for step in (2, 4, 6, 8):
            student.weight.data.fill_(step)
            yield step, (step / 8,), (step / 4,)
            assert history[-1].cycle == step  # the next goal is set by this reading

    monkeypatch.setattr(dp, "pushes", pushes)
    student, script, watched = nn.Linear(1, 1), iter([AWAY_YET, *looks, *[AWAY_YET] * 9]), []
    start, reads = student.weight.item(), []

    def observe(model):
        reads.append(model.weight.item())
        return next(script)

    history = dp.unlearn(student, "flagged", "clean", observe, replace(CALM, **changes),
                         lambda model, reading: watched.append((model.weight.item(), reading)))
    assert [reading.cycle for reading in history] == cycles
    assert student.weight.item() == near(weight)
    # Each reading is one of the student as it then was, and the last one of the average.
    averaged = cycles[-1] == cycles[-2]
    assert reads == near([start, *cycles[1:-1 if averaged else None], *[weight] * averaged])
    assert watched == list(zip(reads[1:], history[1:]))
    terms = [((c / 8,), (c / 4,)) for c in cycles[1:-1 if averaged else None]]
    assert [r[4:] for r in history] == [((), ()), *terms, *[((), ())] * averaged]


# -------------------------------------------------------------------- evidence

SMALL = replace(CALM, fpr=0.3, alpha=math.inf, least=1, max_loss=1.0)
FREE = replace(SMALL, slack=1.0)  # settled as soon as the rows have turned
PARTS = split_reserved(RESERVED, SMALL)


def flag(monkeypatch, rows):
    """Let the detector flag these rows; of 20 threshold rows a class one lies above."""
    clean = at([-1.0] * 38 + [9.0] * 2)
    judge = detector(clean, [0, 1] * 20, weight=1.0)
    flags = Flags(tuple(rows), torch.zeros(50), None, 1.0)
    monkeypatch.setattr(dp, "fit_detector", lambda *rest: judge)
    monkeypatch.setattr(dp, "detect", lambda *rest: flags)
    return judge, flags


EVEN, ODD = range(0, 40, 2), range(1, 40, 2)  # 20 of the 25 pool rows of either class


@pytest.mark.parametrize("rows, changes, accused", [
    ([*EVEN, 1, 3], {"alpha": 1e-3}, [EVEN]),  # two flags of class 1 are chance
    ([*ODD, 0, 2], {"alpha": 1e-3}, [ODD]),
    ([*EVEN, *ODD], {"alpha": 1e-3}, [EVEN, ODD]),
    ([*ODD, 0, 2], {"alpha": math.inf}, [[0, 2], ODD]),
    (ODD, {"alpha": math.inf}, [ODD]),  # a label without flags is not accused of any
    (EVEN, {"alpha": 1e-3, "least": 20}, [EVEN])])
def test_the_labels_with_too_many_flags_are_accused(small, monkeypatch, recwarn, rows, changes,
                                                    accused):
    judge, flags = flag(monkeypatch, sorted(rows))
    found = dp.search(small, VIEW, replace(SMALL, **changes), PARTS)
    assert found[:2] == (judge, flags) and not recwarn.list
    assert [list(charge.rows) for charge in found[2]] == [sorted(part) for part in accused]
    everything = anomaly.charges(judge, flags, POOL.labels)
    assert [charge for charge in everything if charge in found[2]] == found[2]


@pytest.mark.filterwarnings("ignore:no evidence")
def test_the_chance_is_counted_for_every_label(small, monkeypatch):
    """With two labels, each has to be half as likely."""
    judge, flags = flag(monkeypatch, EVEN[:7])
    chance = anomaly.charges(judge, flags, POOL.labels)[0].chance
    found = [len(dp.search(small, VIEW, replace(SMALL, alpha=factor * chance), PARTS)[2])
             for factor in (1.99, 2.0, 2.01)]
    assert found == [0, 1, 1]


@pytest.mark.parametrize("rows, changes, message", [
    # Each class: 3 of 25 rows against 1 of 20, twice the chance of Fisher's test.
    ([*EVEN[:3], *ODD[:3]], {"alpha": 1e-3}, "6 rows .* has as many with a chance of 0.79[.]"),
    ([*EVEN, *ODD[:3]], {"alpha": 1e-3, "least": 21}, "23 rows .*, but only 20 of them carry an"),
    ([], {"alpha": math.inf}, "0 rows are flagged, but .* with a chance of 1[.]")])
def test_without_evidence_the_model_comes_back_as_it_was(small, monkeypatch, rows, changes,
                                                         message):
    judge, flags = flag(monkeypatch, rows)
    monkeypatch.setattr(dp, "_purge", None)  # would fail
    with pytest.warns(UserWarning, match=f"no evidence of a backdoor: {message}.*The model is "
                                         "returned as it was; alpha=math.inf") as caught:
        found = dp.dup(small, VIEW, replace(SMALL, **changes))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert same(found.classifier.model.state_dict(), small.model.state_dict())
    assert found.classifier.model is not small.model
    assert (found.verdict, found.history, found.student) == ("no evidence", (), None)
    assert (found.detector, found.flags, found.accused) == (judge, flags, [])
    assert found.seconds.keys() == {"search", "purify"}


def test_each_part_of_the_data_has_its_use(small, monkeypatch):
    rows, used = [*EVEN[:9]], {}
    judge, flags = flag(monkeypatch, sorted([*rows, 1]))

    def note(name, value=None):
        return lambda *given: used.update({name: given}) or value

    for name, value in (("fit_detector", judge), ("readings", None), ("flagged_batches", None),
                        ("clean_batches", None), ("unlearn", seen(BACK)),
                        ("verdict_on", "purified"),
                        ("charges", [Charge(tuple(rows), 0.0, 0.9), Charge((1,), 1.0, 0.0)])):
        monkeypatch.setattr(dp, name, note(name, value))
    dp.dup(small, VIEW, replace(SMALL, alpha=0.5))
    assert used["fit_detector"][1:3] == tuple(PARTS[:2])
    assert used["charges"] == (judge, flags, POOL.labels)
    watched, held, purity = used["readings"][1:]
    assert held == used["verdict_on"][2] == PARTS[1] and purity == near(0.9)
    assert used["clean_batches"][1] == PARTS[2]
    dp.dup(small, VIEW, replace(SMALL, alpha=0.5, apart=False))
    assert used["fit_detector"][1:3] == (VIEW.reserved,) * 2
    assert all(rows is VIEW.reserved for rows in (
        used["readings"][2], used["verdict_on"][2], used["clean_batches"][1]))


@pytest.mark.parametrize("count, most, watched, pushed", [
    (400, 160, 160, 240), (400, 3, 3, 397), (9, 160, 4, 5), (8, 160, 4, 4), (7, 160, 7, 7),
    (400, 0, 400, 400)])
def test_accused_rows_are_watched_or_pushed(small, monkeypatch, count, most, watched, pushed):
    """Under two batches the pushed rows have to tell when to stop themselves."""
    pool, used = TrainingSet(tuple(map(str, range(500))), (0, 1, 1, 0) * 125, NAMES), []
    monkeypatch.setattr(dp, "readings", lambda *given: used.append(given[1:]))
    monkeypatch.setattr(dp, "flagged_batches", lambda model, texts, settings: used.append(texts))
    monkeypatch.setattr(dp, "unlearn", lambda *rest: [])
    accused = [Charge((*range(count - 2),), 0.0, 1.0), Charge((450, 451), 0.0, 0.5)]
    dp._purge(small, replace(VIEW, pool=pool), replace(SMALL, watched=most), PARTS, accused, None)
    (kept, held, purity), texts = used
    assert held == PARTS[1] and purity == near(((count - 2) * 1.0 + 2 * 0.5) / count)
    assert [pool.labels[int(text)] for text in kept.texts] == list(kept.labels)
    assert (len(kept), len(texts)) == (watched, pushed)
    rows = {str(i) for charge in accused for i in charge.rows}
    assert {*kept.texts, *texts} == rows and {*kept.texts} & {*texts} == (
        rows if count < 8 or not most else set())
    assert list(map(int, kept.texts)) != sorted(map(int, kept.texts))  # drawn, not the first


# ------------------------------------------------------------------ end to end


def test_the_suspected_model_stays_as_it_is_and_the_seed_decides(small):
    before, state = copy.deepcopy(small.model.state_dict()), torch.random.get_rng_state()
    watched = []
    found = dp.dup(small, VIEW, FREE, lambda model, reading: watched.append(reading))
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(7)  # the run has a seed of its own, and nobody can make it stop
        again = dp.dup(small, VIEW, FREE, lambda model, reading: True)
    assert same(before, small.model.state_dict()) and not small.model.training
    assert found.verdict == "purified" and not same(before, found.classifier.model.state_dict())
    assert found.classifier.model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in found.classifier.model.parameters())  # as they had
    assert same(again.classifier.model.state_dict(), found.classifier.model.state_dict())
    assert found.classifier.tokenizer is small.tokenizer and found.classifier.max_length == 16
    assert list(found.history[1:]) == watched and repr(again.history) == repr(found.history)
    assert torch.allclose(answers(small, found.classifier.model), answers(small, found.student),
                          atol=1e-5)
    assert (answers(small, found.student) - answers(small, small.model)).abs().max() > 0.01
    assert found.accused == [charge for charge in anomaly.charges(
        found.detector, found.flags, POOL.labels) if charge.rows]
    assert [reading.cycle for reading in found.history] == [0, 2, 4, 4]  # of six steps


def test_a_decoder_can_be_defended():
    small = built(LlamaConfig(**SIZES))
    before = copy.deepcopy(small.model.state_dict())
    found = dp.dup(small, VIEW, replace(FREE, modules=("q_proj", "v_proj"), pooling="last"))
    assert found.verdict == "purified" and same(before, small.model.state_dict())
    after = found.classifier.model.state_dict()
    changed = {name.split(".")[-2] for name in before if (before[name] != after[name]).any()}
    assert before.keys() == after.keys() and changed == {"q_proj", "v_proj", "score"}
    assert torch.allclose(answers(small, found.classifier.model), answers(small, found.student),
                          atol=1e-4)


UNDONE = "the defense took the held-out accuracy from 100.0% to 0.0% and was undone: lower lr"
UNSETTLED = ("the push has not settled: 52% of the watched rows keep their label, 25% were "
             "expected, and the held-out accuracy is 90%")


@pytest.mark.parametrize("changes, last, said", [
    ({"max_loss": 0.99}, BACK, UNDONE), ({"max_loss": 1.0}, BACK, None),
    ({"max_loss": 1.0}, (0.52, 0.25, 0.9), UNSETTLED), ({"stop": False}, AWAY_YET, None)])
def test_the_verdict_is_told(small, monkeypatch, recwarn, changes, last, said):
    guesses = small.predict(some_texts(90, 5))
    rows = [i for label in (0, 1) for i in [i for i, y in enumerate(guesses) if y == label][:12]]
    right = ReservedSet(some_texts(90, 5), tuple(guesses), NAMES).take(rows)
    flag(monkeypatch, EVEN)

    def harm(student, *rest):
        """Turn all answers round."""
        for name, weight in student.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight.data.neg_()
        return seen(AWAY_YET, last)

    monkeypatch.setattr(dp, "unlearn", harm)
    found = dp.dup(small, DefenderView(right, POOL), replace(SMALL, **changes))
    undone = said == UNDONE
    assert found.verdict == ("undone" if undone else "purified") and len(found.history) == 2
    assert same(found.classifier.model.state_dict(), small.model.state_dict()) is undone
    assert found.student is not None and found.classifier.model is not small.model
    told = [w for w in recwarn.list if issubclass(w.category, UserWarning)]
    assert [str(w.message)[:len(said or "")] for w in told] == ([said] if said else [])
    assert all(w.filename == __file__ for w in told)


def test_a_defense_says_what_it_lacks(small):
    with pytest.raises(ValueError, match="DUP flags rows of a training set: give the view a pool"):
        dp.dup(small, DefenderView(RESERVED), SMALL)
    three = replace(RESERVED, label_names=(*NAMES, "so-so"))
    wide = replace(POOL, label_names=(*NAMES, "so-so"))
    with pytest.raises(ValueError, match=r"their classes: \[2, 3\], \[\('bad', 'good', 'so-so"):
        dp.dup(small, DefenderView(three, wide), SMALL)
    renamed = replace(POOL, label_names=NAMES[::-1])
    with pytest.raises(ValueError, match=r"classes: \[2\], \[\('bad', 'good'\), \('good', "):
        dp.dup(small, DefenderView(RESERVED, renamed), SMALL)
    for shares in ((0.5, 0.5, 0.0), (0.0, 0.5, 0.5), (0.5, -0.1, 0.5)):
        with pytest.raises(ValueError, match=r"each need a share of the reserved rows, not \("):
            dp.dup(small, VIEW, replace(SMALL, shares=shares))


# -------------------------------------------------------- how the studies run it


def test_the_examiner_judges_the_flags():
    judge = detector(at([-1.0] * 38 + [9.0] * 2), [0, 1] * 20, weight=1.0)
    rows, scores = (0, 2, 4, 1), torch.tensor([9.0, 5, 6, 1, 7, *[0.0] * 45])
    flags = Flags(rows, scores, None, 1.0)
    accused = anomaly.charges(judge, flags, POOL.labels)[:1]
    poisoned = tuple(i in (0, 2, 3) for i in range(50))
    unknown, found = (runs._flags(
        SimpleNamespace(flags=flags, detector=judge, accused=accused),
        SimpleNamespace(train=POOL, truth=truth), DUPSettings())
        for truth in (None, SimpleNamespace(poisoned=poisoned)))
    # For two labels, 3 of 25 rows against 1 of 20.
    wanted = fisher_exact([[3, 22], [1, 19]], alternative="greater").pvalue
    assert found["chance"] == near(2 * wanted) and found["threshold"] == 1.0
    assert [found[name] for name in ("flagged", "scanned", "accused")] == [4, 50, 3]
    assert len(unknown) == 5 and unknown.items() <= found.items()
    assert found["precision"].value == near(2 / 4)
    assert found["accused_precision"].value == near(2 / 3)
    assert found["tpr"].value == near(2 / 3) and found["fpr"].value == near(2 / 47)
    # Of 47 clean rows two lie above the third poisoned one, and one above the second.
    assert found["auroc"] == near((47 + 46 + 45) / (3 * 47))


def test_the_variants_differ_from_the_defense_in_what_they_are_called_after():
    found = {name: chosen for name, chosen in runs.VARIANTS.items()
             if isinstance(chosen, DUPSettings)}
    push = found["dup-unstopped"]
    assert push == DUPSettings(stop=False, gate=False, look=push.look, passes=push.passes, steps=0)
    assert found.pop("dup-causal").pooling == "last"  # its first token sees no other
    assert found == {
        "dup": DUPSettings(), "dup-forced": DUPSettings(alpha=math.inf), "dup-authors": AUTHORS,
        "dup-unstopped": push, "lora": replace(push, push=0.0),
        "dup-no-kick": replace(push, kick=False), "dup-uncapped": replace(push, cap=None),
        "dup-batch-32": DUPSettings(batch_size=32), "dup-fast": DUPSettings(lr=5e-4, decay=True),
        "dup-one-set": DUPSettings(apart=False), "dup-all-pushed": DUPSettings(watched=0),
        "dup-one-look": DUPSettings(tail=1)}


def test_the_authors_values():
    """Of demo_unlearning.py and ms_defender.py, but for what a defender cannot do."""
    assert asdict(AUTHORS) == {
        "pooling": "cls", "shrinkage": 0.1, "layers": 3, "weight": 0.9, "fpr": 0.05,
        "shares": (0.25, 0.25, 0.5), "seed": 2025, "rank": 32, "lora_alpha": 64,
        "lora_dropout": 0.1, "modules": ("query", "key", "value"), "lr": 5e-4, "batch_size": 32,
        "passes": 5, "steps": 0, "decay": True, "push": 1.0, "keep": 1.0, "cap": None,
        "kick": False, "gate": False, "look": 0, "stop": False, "least": 1, "alpha": math.inf,
        # Without a rule these two have no part, nor has the limit of harm.
        "slack": AUTHORS.slack, "tail": AUTHORS.tail, "max_loss": AUTHORS.max_loss,
        # Two faults that would spoil the comparison, not its point: see the chapter.
        "watched": 160, "apart": True}


# ----------------------------------------------------------------------- roles


def test_the_defense_knows_nothing_of_attacks_victims_and_test_data():
    assert not names_in(ast.parse(inspect.getsource(dp))) & {*SECRETS, "shadow_loss"}
    # Which rows are poisoned is neither in the view nor in the settings, so that any other
    # truth, such as a permuted one, gives the same result.
    assert [*inspect.signature(dp.dup).parameters] == ["classifier", "view", "settings", "watch"]
    assert {*DefenderView.__dataclass_fields__} == {"reserved", "pool"}
    assert not SECRETS & {field.name for field in fields(DUPSettings)}
