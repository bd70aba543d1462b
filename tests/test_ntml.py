"""NT-ML: losses by hand, who learns from whom, and what the defense may see."""

import copy
import random
from dataclasses import replace
from math import log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import has_ranges, near, same
from helpers.images import NAMES, thirds
from helpers.texts import NAMES as TEXT_NAMES
from helpers.texts import SIZES as BERT_SIZES
from helpers.texts import built, some_texts
from torch import nn
from transformers import BertConfig

from bdutils.attacks.base import PoisonConfig
from bdutils.attacks.image import BadNetsPatch
from bdutils.defenses import ntml as nt
from bdutils.defenses.base import Context, Outcome, clone
from bdutils.defenses.ntml import NTML, JudgeConfig, PairConfig
from bdutils.evaluation import Victim, evaluate
from bdutils.experiments import variants as runs
from bdutils.experiments.attackers import DecoyTrigger
from bdutils.models.adopt import last_layer, layer_inputs
from bdutils.models.image import ImageClassifier
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import ImageTrainConfig, TrainConfig, train, untrained

TRAINING = ImageTrainConfig(epochs=8, batch_size=32, lr=0.05, pad=1, flip=False)


@pytest.fixture(scope="module")
def task():
    return Task("thirds", thirds(TrainSet, 480, 0), thirds(CleanSet, 30, 1),
                thirds(TestSet, 150, 2), "made here")


@pytest.fixture(scope="module")
def attacked(task):
    train_set, record = BadNetsPatch().poison(task.train, PoisonConfig(0.2, 0))
    model = untrained(train_set, TRAINING)
    train(model, train_set, TRAINING)
    return Victim(model, task, train_set, record, TRAINING, None)


@pytest.fixture(scope="module")
def context(attacked):
    return attacked.context()


@pytest.fixture(scope="module")
def found(context):
    return NTML()(context)


def of(values):
    return torch.tensor(values, dtype=torch.float32)


def probabilities(values):
    return of(values).log()


def whole(text):
    return torch.tensor(list(map(int, text.split())))


# ---------------------------------------------------------------- arithmetic


def check_centered(centered):
    # Samples 0 and 1 have label 0 and the mean (2, 2, 2); 2 is alone; none has label 2.
    got = centered(of([[1, 2, 3], [3, 2, 1], [0, 0, 6]]), whole("0 0 1"))
    assert got.tolist() == [[-1, 0, 1], [1, 0, -1], [0, 0, 0]]


def check_without(without):
    got = without(of([[1, 2, 3], [3, 2, 1]]), whole("2 0"))
    assert got.softmax(1).tolist() == [near([1 / (1 + 2.7182818), 2.7182818 / 3.7182818, 0]),
                                       near([0, 2.7182818 / 3.7182818, 1 / 3.7182818])]


def check_nt_loss(nt_loss):
    # Without the label: wanted (3/4, 1/4), given (1/2, 1/2); the second is right already.
    wanted = probabilities([[0.9, 0.075, 0.025], [0.2, 0.7, 0.1]])
    logits = probabilities([[0.2, 0.4, 0.4], [0.4, 0.4, 0.2]]).requires_grad_()
    value = nt_loss(logits, wanted, whole("0 1"))
    assert value.item() == near((0.75 * log(1.5) + 0.25 * log(0.5)) / 2)
    gradient, = torch.autograd.grad(value, logits)
    assert gradient.tolist() == [near([0, -1 / 8, 1 / 8]), near([0, 0, 0])]


def check_share_of(share_of):
    ten = ImageTrainConfig(epochs=10, seed=3)
    assert share_of(ten, 0.6, 7) == replace(ten, epochs=6, seed=7)
    assert share_of(ten, 0.01, 7).epochs == 1
    assert share_of(TrainConfig(epochs=2), 0.8, 0).epochs == 2


def check_others(others):
    got = others(of([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [1, 0, 0]]), whole("0 2 0"))
    # The last one gives its label everything, and has nothing left to share out.
    assert got.tolist() == [near([0, 0.8, 0.2]), near([0.5, 0.5, 0]), [0, 0, 0]]


def check_soft_targets(soft_targets):
    # Squares, because the temperature of two takes roots; 0 disagrees, 1 does not.
    logits = probabilities([[0.01, 0.25, 0.16], [0.25, 0.01, 0.16]])
    got = soft_targets(logits, whole("0 0"), 2.0)
    assert got.tolist() == [near([0, 5 / 9, 4 / 9]), near([0.5, 0.1, 0.4])]


def check_ml_loss(ml_loss):
    targets = of([[0.5, 0.5], [0, 1]])
    value = ml_loss(probabilities([[0.2, 0.8], [0.5, 0.5]]), targets)
    assert value.item() == near(-(0.5 * log(0.2) + 0.5 * log(0.8) + log(0.5)) / 2)
    warm = ml_loss(probabilities([[0.04, 0.64], [0.25, 0.25]]), targets, 2.0)
    assert warm.item() == near(4 * value.item())


def check_clean_loss(clean_loss):
    logits, peer = probabilities([[0.04, 0.64]]), probabilities([[0.25, 0.25]])
    value = clean_loss(logits, peer, whole("1"), 2.0)
    kl = 0.5 * log(0.5 / 0.2) + 0.5 * log(0.5 / 0.8)
    assert value.item() == near(-log(0.64 / 0.68) + 4 * kl)


def check_log_odds(log_odds):
    got = log_odds(probabilities([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]), whole("0 1"))
    assert got.tolist() == near([log(0.25), log(3 / 7)])
    # Both probabilities are 1 as they are stored, and still one model is more confident.
    assert log_odds(of([[40, 0, 0], [50, 0, 0]]), whole("0 0")).tolist() == near(
        [40 - log(2), 50 - log(2)])


def check_mean_log_odds(mean_log_odds):
    answers = [probabilities([[0.2, 0.5, 0.3]]), probabilities([[0.6, 0.3, 0.1]])]
    assert mean_log_odds(answers, whole("0")).tolist() == near([log(0.4 / 0.6)])
    for sign in (1, -1):  # where float32 has no other probability than 1
        got = mean_log_odds([of([[sign * 40, 0]]), of([[sign * 40, 0]])], whole("0"))
        assert got.item() == near(sign * 40)


def check_shares_of(shares_of):
    got = shares_of(whole("1 1 0 0 1").bool(), whole("0 0 0 1 3"), 4)
    assert got.tolist() == near([2 / 3, 0, 0, 1])


def check_stand_out(stand_out):
    config = JudgeConfig(factor=4.0, least=0.02)
    assert stand_out(of([0.4, 0, 0.01, 0, 0.3]), config) == (0, 4)
    # A little in one class alone is no sign, nor is much where all classes have it.
    assert stand_out(of([0.015, 0, 0, 0, 0]), config) == ()
    assert stand_out(of([0.15, 0.05, 0.06, 0.05, 0.05]), config) == ()
    assert stand_out(of([0.25, 0.05, 0.06, 0.05, 0.05]), config) == (0,)


def check_accepted(accepted):
    labels = whole("0 1 0 2 1 2 0 1 1")
    score = of([-3, -9, -1, -2, 0, 1, -2.5, 2, 3])  # of 1 and 2: -9 -2 0 1 2 3
    for quantile, those_of_0 in ((0.2, [False, True, False]), (0.0, [True] * 3),
                                 (0.1, [True] * 3), (0.6, [False] * 3)):
        got = accepted(score, labels, (0,), quantile)
        assert got[labels == 0].tolist() == those_of_0 and got[labels != 0].all()
    assert accepted(score, labels, (), 0.5).all()
    # Of two suspect classes neither is a measure for the other.
    assert accepted(score, labels, (0, 2), 0.3).tolist() == [bool(int(b)) for b in "010011011"]


def judge_inputs():
    """Return what is said of six samples, of which the first alone is poisoned."""
    confident, doubt, true = [0.996, 0.002, 0.002], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]
    said = probabilities([confident, confident, doubt, true, true, [0.1, 0.1, 0.8]])
    student = probabilities([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1], true, true,
                             [0.1, 0.1, 0.8]])
    pair = (probabilities([[0.1, 0.8, 0.1], confident, [0.04, 0.9, 0.06], true, true,
                           [0.1, 0.1, 0.8]]),
            probabilities([[0.2, 0.7, 0.1], confident, [0.06, 0.9, 0.04], true, true,
                           [0.1, 0.1, 0.8]]))
    return said, student, pair, whole("0 0 0 1 1 2")


def check_judged(judged):
    said, student, pair, labels = judge_inputs()
    config = JudgeConfig(quantile=0.5)
    found = judged(said, student, pair, labels, 0.5, config)  # chance is 1/3: denied is up to 1/6
    odds = {"victim": [0.996, 0.996, 0.6], "pair": [0.15, 0.996, 0.05],
            "student": [0.2, 0.9, 0.1]}
    for name, values in odds.items():
        assert getattr(found, name)[:3].tolist() == near([log(p / (1 - p)) for p in values])
    lower = [log(p / (1 - p)) for p in (0.15, 0.9, 0.05)]
    assert found.score[:3].tolist() == near(
        [low - log(p / (1 - p)) for low, p in zip(lower, odds["victim"])])
    # Sample 2 is denied too, but the suspicious model was not confident of it either.
    assert found.shares.tolist() == near([1 / 3, 0, 0]) and found.suspects == (0,)
    assert found.passed.tolist() == [False, False, False, True, True, True]
    assert judged(said, student, pair, labels, 0.5, replace(config, quantile=0.0)
                  ).passed[3:].all()
    assert judged(said, student, pair, labels, 0.3, config).suspects == ()
    assert judged(said, student, pair, labels, 0.3, config).passed.all()
    alone = judged(said, student, pair, labels, 0.5, replace(config, form="global")).passed
    assert alone.tolist() == [False, True, False, True, True, True]


def check_judged_again(judged_again):
    said, student, pair, labels = judge_inputs()
    config = JudgeConfig(quantile=0.9, again=0.5)
    first = JUDGED(said, student, pair, labels, 0.5, config)
    z = probabilities([[0.5, 0.3, 0.2], [0.999, 0.0005, 0.0005], [0.7, 0.2, 0.1],
                       [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    # Against the suspicious model: 0.5 against 0.996, 0.999 against 0.996, 0.7 against 0.6.
    assert judged_again(z, first, labels, config).tolist() == [False] + [True] * 5
    assert judged_again(z, first, labels, replace(config, form="global")) is first.passed
    nobody = replace(first, suspects=())
    assert judged_again(z, nobody, labels, config).all()


def check_self_labels(self_labels):
    # Class 1 is everybody's second choice, but less so for sample 2: centered, it has class 2.
    said = probabilities([[0.9, 0.08, 0.02]] * 2 + [[0.9, 0.06, 0.04]] + [[0.9, 0.08, 0.02]] * 2)
    student = probabilities([
        [0.04, 0.94, 0.02],  # confident, and the suspicious model's second choice
        [0.10, 0.70, 0.20],  # not confident
        [0.04, 0.94, 0.02],  # not the second choice
        [0.80, 0.19, 0.01],  # takes the rejected label, which it cannot have
        [0.04, 0.94, 0.02]])  # passed
    passed = whole("0 0 0 0 1").bool()
    assert self_labels(student, said, whole("0 0 0 0 0"), passed, 0.9) == {0: 1, 3: 1}
    assert self_labels(student, said, whole("0 0 0 0 0"), passed, 0.96) == {0: 1}


def check_last_targets(last_targets):
    p = of([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    got = last_targets(p, whole("1 1"), torch.tensor([True, False]))
    assert got.tolist() == [[0, 1, 0], near([5 / 6, 0, 1 / 6])]


def kl(p, logits, reduction="batchmean"):
    return F.kl_div(logits.log_softmax(1), p, reduction=reduction)


def self_labels(z, said, labels, passed, confidence, mask=True, agree=True, center=True):
    """Give new labels as `nt.self_labels` does, or with one of its conditions left out."""
    best, found = (nt.others(z.softmax(1), labels) if mask else z.softmax(1)).max(1)
    second = nt.without(nt.centered(said, labels) if center else said, labels).argmax(1)
    agrees = (found == second) | (found == labels) | (not agree)
    chosen = (~passed & agrees & (best > confidence)).nonzero()[:, 0]
    return dict(zip(chosen.tolist(), found[chosen].tolist()))


def judging(**wrong):
    """Return `judged` with some of its steps replaced."""
    def judged(*given):
        with pytest.MonkeyPatch.context() as patch:
            for name, function in wrong.items():
                patch.setattr(nt, name, function)
            return JUDGED(*given)

    return judged


JUDGED, ODDS, ACCEPTED = nt.judged, nt.log_odds, nt.accepted


# What each check must notice: the same function with one thing done another way.
WRONG = {
    check_centered: [
        lambda z, y: 2 * z - nt.centered(z, y),  # added
        lambda z, y: nt.centered(z, y.flip(0)),
        lambda z, y: z - (z - nt.centered(z, y)) * y.bincount()[y][:, None]],  # sums, not means
    check_without: [
        lambda z, y: z.scatter(1, y[:, None], 1e4), lambda z, y: z.scatter(1, y[:, None], 0.0),
        lambda z, y: nt.without(z, y.flip(0))],
    check_nt_loss: [
        lambda z, w, y: kl(w.softmax(1), nt.without(z, y)),
        lambda z, w, y: kl(nt.without(w, y).softmax(1), z),
        lambda z, w, y: kl(nt.without(w, y).softmax(1), nt.without(z, y), "sum"),
        lambda z, w, y: kl(nt.without(w, y).softmax(1), nt.without(z, y), "mean"),
        lambda z, w, y: nt.nt_loss(w, z, y) + 0 * z.sum(),  # the other direction
        lambda z, w, y: kl(nt.without(w, 1 - y).softmax(1), nt.without(z, y)),
        lambda z, w, y: -nt.nt_loss(z, w, y), lambda z, w, y: nt.nt_loss(z, z, y)],
    check_share_of: [
        lambda t, share, seed: replace(nt.share_of(t, share, seed), epochs=max(
            2, round(share * t.epochs))),
        lambda t, share, seed: nt.share_of(t, share, t.seed),
        lambda t, share, seed: nt.share_of(t, 1.0, seed)],
    check_others: [
        lambda p, y: p.scatter(1, y[:, None], 1.0) / p.scatter(1, y[:, None], 1.0).sum(
            1, keepdim=True),
        lambda p, y: p.scatter(1, y[:, None], 0.0) / p.scatter(1, y[:, None], 0.0).sum(
            1, keepdim=True),  # not a number where nothing is left
        lambda p, y: p.scatter(1, y[:, None], 0.0), lambda p, y: p],
    check_soft_targets: [
        lambda z, y, t: nt.soft_targets(z, z.argmax(1), t),
        lambda z, y, t: nt.others((z / t).softmax(1), y),
        lambda z, y, t: nt.soft_targets(z, y, 1 / t),
        lambda z, y, t: torch.where((z.argmax(1) == y)[:, None], nt.others(
            (z / t).softmax(1), y), (z / t).softmax(1))],
    check_ml_loss: [
        lambda z, p, t=1.0: -nt.ml_loss(z, p, t), lambda z, p, t=1.0: nt.ml_loss(z, p, t) / t**2,
        lambda z, p, t=1.0: t**2 * nt.ml_loss(z, p), lambda z, p, t=1.0: 2 * nt.ml_loss(z, p, t),
        lambda z, p, t=1.0: nt.ml_loss(z, torch.ones_like(p), t)],
    check_clean_loss: [
        lambda z, p, y, t: nt.clean_loss(z, p, y, t) - F.cross_entropy(z, y),
        lambda z, p, y, t: 2 * F.cross_entropy(z, y) - nt.clean_loss(z, p, y, t),
        lambda z, p, y, t: F.cross_entropy(z, y) + t**2 * kl((z / t).softmax(1), p / t),
        lambda z, p, y, t: (nt.clean_loss(z, p, y, t) - F.cross_entropy(z, y)
                            + F.cross_entropy(p, y))],
    check_log_odds: [
        lambda z, y: z.softmax(1).gather(1, y[:, None])[:, 0].logit(),  # rounded to 1
        lambda z, y: -nt.log_odds(z, y), lambda z, y: nt.log_odds(z, y.flip(0)),
        lambda z, y: z.log_softmax(1).gather(1, y[:, None])[:, 0]],
    check_mean_log_odds: [
        lambda zs, y: torch.stack([nt.log_odds(z, y) for z in zs]).mean(0),  # of odds
        lambda zs, y: nt.mean_log_odds(zs[:1], y),
        lambda zs, y: (sum(z.softmax(1) for z in zs) / 2).gather(1, y[:, None])[:, 0].logit()],
    check_shares_of: [
        lambda chosen, y, k: y[chosen].bincount(minlength=k) / chosen.sum(),
        lambda chosen, y, k: nt.shares_of(~chosen, y, k),
        lambda chosen, y, k: y[chosen].bincount(minlength=k) / y.bincount(minlength=k)],
    check_stand_out: [
        lambda shares, c: tuple(range(len(shares))),  # no rule: all classes are suspect
        lambda shares, c: nt.stand_out(shares, replace(c, least=0.0)),
        lambda shares, c: nt.stand_out(shares, replace(c, factor=1.0)),
        lambda shares, c: nt.stand_out(-shares, replace(c, least=0.0)),
        lambda shares, c: nt.stand_out(shares, c)[:1]],  # one at most
    check_accepted: [
        lambda s, y, ks, q: s > s[y != 0].quantile(q),  # all classes are cut
        lambda s, y, ks, q: nt.accepted(-s, y, ks, q),  # the gate the other way round
        lambda s, y, ks, q: nt.accepted(s, y, ks, 1 - q),
        lambda s, y, ks, q: nt.accepted(s, y, ks[:1], q),
        lambda s, y, ks, q: ~torch.isin(y, torch.tensor(ks, dtype=y.dtype)),  # none passes
        lambda s, y, ks, q: ~torch.isin(y, torch.tensor(ks, dtype=y.dtype)) | (
            s > s.quantile(q))],  # of all samples, suspect ones too
    check_judged: [
        lambda z, alone, pair, y, gate, c: nt.judged(z, alone, pair[:1], y, gate, c),
        lambda z, alone, pair, y, gate, c: nt.judged(z, z, pair, y, gate, c),
        lambda z, alone, pair, y, gate, c: nt.judged(alone, z, pair, y, gate, c),
        lambda z, alone, pair, y, gate, c: nt.judged(z, alone, pair, y, 3 * gate, c),
        lambda z, alone, pair, y, gate, c: nt.judged(z, alone, pair, y, gate,
                                                     replace(c, confidence=0.5)),
        judging(stand_out=lambda shares, c: tuple(range(len(shares) - 1))),  # rule off
        judging(accepted=lambda s, y, ks, q: ~ACCEPTED(s, y, ks, q)),
        judging(log_odds=lambda z, y: -ODDS(z, y))],
    check_judged_again: [
        lambda z, j, y, c: j.passed,
        lambda z, j, y, c: nt.judged_again(z, replace(j, victim=-j.victim), y, c),
        lambda z, j, y, c: nt.judged_again(-z, j, y, c),
        lambda z, j, y, c: nt.judged_again(z, j, y, replace(c, form="suspects")),
        lambda z, j, y, c: nt.judged_again(z, replace(j, suspects=(0, 1)), y, c)],
    check_self_labels: [
        lambda *given: self_labels(*given, mask=False),  # a rejected label comes back
        lambda *given: self_labels(*given, agree=False),
        lambda *given: self_labels(*given, center=False),
        lambda z, said, y, passed, c: nt.self_labels(z, said, y, passed, 0.0),
        lambda z, said, y, passed, c: nt.self_labels(z, said, y, passed & False, c),
        lambda z, said, y, passed, c: nt.self_labels(z, said, y, ~passed, c)],
    check_last_targets: [
        lambda p, y, passed: nt.last_targets(p, y, ~passed),
        lambda p, y, passed: torch.where(passed[:, None], F.one_hot(y, 3).to(p), p),
        lambda p, y, passed: F.one_hot(y, 3).to(p)],
}


@pytest.mark.parametrize("check", WRONG)
def test_functions_are_what_plain_arithmetic_says_and_what_is_wrong_is_noticed(check):
    check(getattr(nt, check.__name__.removeprefix("check_")))
    for wrong in WRONG[check]:
        with pytest.raises(AssertionError):
            check(wrong)


def test_two_classes_leave_nothing_to_learn_without_the_label():
    logits = torch.randn(5, 2, requires_grad=True)
    value = nt.nt_loss(logits, torch.randn(5, 2), whole("0 1 1 0 1"))
    gradient, = torch.autograd.grad(value, logits)
    assert value.item() == 0 and not gradient.any()


# --------------------------------------------------------------- last layers


def test_the_last_layer_is_found_and_its_inputs_give_the_logits(attacked, task):
    for classifier, inputs, classes in (
            (attacked.classifier, task.clean.inputs, 3),
            (built(BertConfig(**BERT_SIZES)), some_texts(60, 1), 2)):
        layer = last_layer(classifier.model, classes)
        assert torch.allclose(layer(layer_inputs(classifier, layer, inputs)),
                              classifier.logits(inputs), atol=1e-5)
    with pytest.raises(ValueError, match="no linear layer of 7 outputs"):
        last_layer(classifier.model, 7)


def test_the_head_is_fitted_to_clean_samples_and_nothing_else_moves(attacked, task):
    student = clone(attacked.classifier)
    nn.init.normal_(last_layer(student.model, 3).weight)
    before = copy.deepcopy(student.model.state_dict())
    nt.fit_head(student, task.clean, PairConfig(), seed=0)
    after = student.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}
    right = [a == b for a, b in zip(student.predict(task.test.inputs), task.test.labels)]
    assert sum(right) > 0.9 * len(right)
    # Where the layer was does not matter: two starts end alike.
    other = clone(attacked.classifier)
    nt.fit_head(other, task.clean, PairConfig(), seed=0)
    assert torch.equal(other.model.head.weight, after["head.weight"])
    nt.fit_head(other, task.clean, PairConfig(), seed=1)
    assert not torch.equal(other.model.head.weight, after["head.weight"])


# ------------------------------------------------------- who learns from whom


@pytest.fixture
def trained(monkeypatch):
    """Record what would be trained."""
    calls = []
    monkeypatch.setattr(nt, "train", lambda model, train_set, training, loss=None: calls.append(
        SimpleNamespace(model=model, train=train_set, training=training, loss=loss)))
    return calls


STUDENT = SimpleNamespace(model=SimpleNamespace(device="cpu"))


def outputs(values):
    return SimpleNamespace(logits=probabilities(values))


def test_the_student_learns_the_other_answers_of_the_right_samples(trained):
    train_set = TrainSet(("a", "b", "c"), (0, 0, 1), NAMES)
    said = of([[1, 2, 3], [3, 2, 1], [0, 0, 6]])
    nt.learn_others(STUDENT, train_set, said, TRAINING)
    nt.learn_others(STUDENT, train_set, said, TRAINING, center=False)
    assert all((c.model, c.train, c.training) == (STUDENT, train_set, TRAINING)
               for c in trained)
    batch = {"place": torch.tensor([1, 0]), "labels": whole("0 0")}
    answers = outputs([[0.2, 0.4, 0.4], [0.6, 0.3, 0.1]])
    for call, wanted in zip(trained, ([[1, 0, -1], [-1, 0, 1]], [[3, 2, 1], [1, 2, 3]])):
        value = nt.nt_loss(answers.logits, of(wanted), batch["labels"])
        assert call.loss(answers, batch).item() == near(value.item())


def check_learn_from(learn_from, given_batch=lambda batch: batch):
    """Compare the loss with one that is put together from its parts."""
    learner = ImageClassifier.new(3, channels=1, seed=5)
    train_set, clean = thirds(TrainSet, 4, 3), thirds(CleanSet, 3, 4)
    said = probabilities([[0.64, 0.01, 0.04]] * 4)
    heard = {id(clean.inputs): [[0.7, 0.2, 0.1]] * 3}
    peer = SimpleNamespace(logits=lambda inputs: probabilities(heard[id(inputs)]))
    context = Context(learner, clean, train_set, TRAINING)
    given, loss = learn_from(learner, peer, said, context, TRAINING, PairConfig(clean_batch=64))
    assert given == (learner, train_set, TRAINING)
    learner.model.eval()
    answers = [[0.04, 0.64, 0.04], [0.04, 0.25, 0.64]]
    with torch.no_grad():
        value = loss(outputs(answers), given_batch({"place": torch.tensor([1, 0])})).item()
        # Sample 1 has label 1, to which the peer prefers 0; 0 has the peer's label 0.
        body = ML_LOSS(probabilities(answers),
                       of([[0.8, 0, 0.2], [8 / 11, 1 / 11, 2 / 11]]), 2.0)
        chosen = random.Random(TRAINING.seed).choices(range(3), k=64)
        beside = CLEAN_LOSS(learner.logits(clean.take(chosen).inputs),
                            probabilities([[0.7, 0.2, 0.1]] * 64),
                            torch.tensor([clean.labels[i] for i in chosen]), 2.0)
    assert value == near((body + beside).item())


ML_LOSS, CLEAN_LOSS, SOFT_TARGETS = nt.ml_loss, nt.clean_loss, nt.soft_targets


def loss_of(*given):
    """Return what `learn_from` would train, and its loss."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nt, "train", lambda *args, loss: calls.append((args, loss)))
        nt.learn_from(*given)
    return calls[0]


def with_config(**changes):
    return lambda *given: loss_of(*given[:-1], replace(given[-1], **changes))


def test_a_learner_hears_its_peer_and_clean_samples():
    check_learn_from(loss_of)


@pytest.mark.parametrize("learn_from", [
    lambda learner, peer, *rest: loss_of(learner, learner, *rest),
    with_config(clean_batch=1), with_config(temperature=1.0)])
def test_another_peer_batch_or_temperature_is_noticed(learn_from):
    with pytest.raises((AssertionError, RuntimeError)):
        check_learn_from(learn_from)


def test_targets_of_other_samples_are_noticed():
    with pytest.raises(AssertionError):
        check_learn_from(loss_of, lambda batch: {"place": batch["place"].flip(0)})


@pytest.mark.parametrize("name, wrong", [
    ("clean_loss", lambda z, p, y, t: CLEAN_LOSS(z, p, y.flip(0), t)),
    ("clean_loss", lambda z, p, y, t: CLEAN_LOSS(z, z, y, t)),
    ("clean_loss", lambda *given: -CLEAN_LOSS(*given)),
    ("ml_loss", lambda *given: 0 * ML_LOSS(*given)),
    ("soft_targets", lambda z, y, t: SOFT_TARGETS(z, (1 - y).clamp(min=0), t))])
def test_what_is_wrong_in_a_part_is_noticed_in_the_whole(monkeypatch, name, wrong):
    monkeypatch.setattr(nt, name, wrong)
    with pytest.raises(AssertionError):
        check_learn_from(loss_of)


def test_the_teacher_learns_from_the_student_then_the_student_from_the_new_teacher(
        monkeypatch, context):
    heard = []
    monkeypatch.setattr(nt, "learn_from", lambda *given: heard.append(given))
    student, config = clone(context.classifier), PairConfig(ml_share=0.5)
    nn.init.normal_(student.model.head.weight)
    inputs = context.train.inputs
    said = student.logits(inputs)
    pair, answers = nt.mutual(student, said, context, config, seed=4)
    assert [id(call[i]) for call in heard for i in (0, 1)] == [
        id(pair[0]), id(student), id(pair[1]), id(pair[0])]
    assert heard[0][2] is said and heard[1][2] is answers[0]
    assert all(torch.equal(z, m.logits(inputs)) for z, m in zip(answers, pair, strict=True))
    assert all(call[3] is context and call[5] is config for call in heard)
    assert [call[4] for call in heard] == [replace(TRAINING, epochs=1, lr=0.025, seed=seed)
                                           for seed in (4, 5)]
    # Both are copies: the originals can be looked at afterwards.
    assert not {id(pair[0].model), id(pair[1].model)} & {id(student.model),
                                                         id(context.classifier.model)}


RELABEL = NTML(judge=JudgeConfig(form="global"), drop=False, self_share=0)


def test_the_last_student_gets_what_passed(monkeypatch, trained):
    train_set = TrainSet(("a", "b", "c"), (0, 1, 1), NAMES)
    p, passed = of([[0.6, 0.3, 0.1], [0.9, 0.02, 0.08], [0.1, 0.8, 0.1]]), whole("1 0 1").bool()
    lessons = []
    monkeypatch.setattr(nt, "learn_targets", lambda *given: lessons.append(given))
    nt.fit_last("student", train_set, passed, TRAINING, p)
    (model, kept, targets, training), = lessons
    assert (model, kept, training) == ("student", train_set, TRAINING)
    wanted = [[1, 0, 0], [0.9 / 0.98, 0, 0.08 / 0.98], [0, 1, 0]]
    assert targets.tolist() == [near(values) for values in wanted]
    nt.fit_last("student", train_set, passed, TRAINING)
    call, = trained
    assert (call.model, call.train, call.training) == (
        "student", train_set.take([0, 2]), TRAINING)
    with pytest.raises(ValueError, match="no given label passed the gate"):
        nt.fit_last("student", train_set, passed & False, TRAINING)


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_the_last_student_starts_as_it_should(context, monkeypatch, scratch, drop):
    fitted, made = [], []
    monkeypatch.setattr(nt, "fit_last", lambda *given: fitted.append(given))
    monkeypatch.setattr(nt, "non_target", lambda *given: clone(context.classifier))
    monkeypatch.setattr(Context, "new_model", lambda self, training: made.append(training)
                        or ImageClassifier.new(3, channels=1, seed=1))
    outcome = replace(RELABEL, mutual=False, scratch=scratch, drop=drop, stop=False,
                      seed=5)(context)
    (student, train_set, passed, training, p), = fitted
    long = replace(TRAINING, epochs=6, seed=7)
    assert student is outcome.model and train_set is context.train
    assert tuple(passed.tolist()) == outcome.report["passed"]
    assert training == long and made == [long] * scratch
    said = outcome.report["stages"]["mutual student"].logits(context.train.inputs)
    assert p is None if drop else torch.allclose(p, said.softmax(1))
    weights = outcome.report["stages"]["mutual student"].model.state_dict()
    assert same(weights, student.model.state_dict()) != scratch


RELABEL = NTML(judge=JudgeConfig(form="global"), drop=False, self_share=0)


def test_the_student_goes_on_with_accepted_and_with_new_labels(context, monkeypatch):
    lessons = []
    monkeypatch.setattr(nt, "train", lambda *given: lessons.append(given))
    train_set = context.train.take(range(4))
    train_set = replace(train_set, labels=(0, 0, 1, 2))
    model = nt.go_on(context.classifier, train_set, whole("1 0 0 1").bool(), {2: 0}, TRAINING)
    (trained, kept, training), = lessons
    assert trained is model and model.model is not context.classifier.model
    assert training is TRAINING and kept.labels == (0, 0, 2)
    assert torch.equal(kept.inputs.pixels, train_set.inputs.pixels[[0, 2, 3]])


def test_what_follows_is_as_long_and_as_fast_as_its_fields_say(context, monkeypatch):
    trainings = []
    monkeypatch.setattr(nt, "go_on", lambda *given: trainings.append(given[-1]) or given[0])
    monkeypatch.setattr(nt, "fit_last", lambda *given: None)
    monkeypatch.setattr(nt, "non_target", lambda *given: clone(context.classifier))
    config = replace(RELABEL, mutual=False, self_share=0.5, self_lr=0.5, stop=False, seed=5)
    config(context)
    assert trainings == [replace(TRAINING, epochs=4, lr=0.025, seed=8)]


# ------------------------------------------------------------- the whole way


def test_the_backdoor_goes_and_the_given_model_stays(attacked, found, task):
    before = evaluate(attacked.classifier, task, BadNetsPatch(), 0)
    after = evaluate(found.model, task, BadNetsPatch(), 0)
    assert before.asr.value > 0.9 and before.cacc.value > 0.95
    assert after.asr.value < 0.2 and after.ra.value > 0.7 and after.cacc.value > 0.9
    report = found.report
    assert found.verdict == "purified" and found.model is report["stages"]["self"]
    assert [*report["stages"]] == ["non-target student", "mutual teacher", "mutual student",
                                   "drop", "self"]
    poisoned, given = torch.tensor(attacked.record.poisoned), torch.tensor(attacked.train.labels)
    passed = torch.tensor(report["passed"])
    assert report["suspects"] == (0,) and passed[given != 0].all()
    assert passed[~poisoned].float().mean() > 0.9 > 0.2 > passed[poisoned].float().mean()
    # Nobody gets the rejected label back, and most of the new ones are true.
    new, true = report["self"], task.train.labels
    assert len(new) > 0.3 * poisoned.sum()
    assert all(label != given[i] for i, label in new.items())
    assert sum(label == true[i] for i, label in new.items()) > 0.8 * len(new)
    again = torch.tensor(report["again"])
    assert again[given != 0].all() and not any(again[i] for i in new)
    assert again[~poisoned].sum() >= passed[~poisoned].sum() and again[poisoned].sum() == 0
    assert [*found.seconds] == ["non-target", "mutual", "last", "self"]
    assert all(took > 0 for took in found.seconds.values())
    assert evaluate(attacked.classifier, task, BadNetsPatch(), 0) == before


def test_the_report_holds_what_the_models_said(found, context):
    report, given = found.report, torch.tensor(context.train.labels)
    for name in ("victim", "pair", "student", "score", "last"):
        assert report[name].dtype == torch.float32 and report[name].shape == given.shape
    assert torch.equal(report["victim"], nt.log_odds(
        context.classifier.logits(context.train.inputs), given))
    assert torch.equal(report["student"], nt.log_odds(
        report["stages"]["non-target student"].logits(context.train.inputs), given))
    assert torch.equal(report["last"], nt.log_odds(
        report["stages"]["drop"].logits(context.train.inputs), given))
    assert report["shares"].shape == (3,) and report["shares"][0] > report["shares"][1:].max()


def test_a_clean_model_comes_back_as_it_was(task):
    model = untrained(task.train, TRAINING)
    train(model, task.train, TRAINING)
    found = NTML()(Context(model, task.clean, task.train, TRAINING))
    assert found.verdict == "no evidence" and found.report["suspects"] == ()
    assert all(found.report["passed"]) and "self" not in found.report
    assert [*found.report["stages"]] == ["non-target student", "mutual teacher", "mutual student"]
    assert [*found.seconds] == ["non-target", "mutual"] and found.model is not model
    assert same(found.model.model.state_dict(), model.model.state_dict())


def test_what_is_judged_as_before_is_relabeled_in_every_class(context, attacked):
    found = RELABEL(context)
    given, stages = torch.tensor(context.train.labels), found.report["stages"]
    p = sum(stages[f"mutual {name}"].logits(context.train.inputs).softmax(1)
            for name in ("teacher", "student")) / 2
    passed = p.gather(1, given[:, None])[:, 0] > 0.5 / 3
    assert found.report["passed"] == tuple(passed.tolist()) and "self" not in found.report
    assert [*stages][3:] == ["last student"] and [*found.seconds][2:] == ["last"]
    long = replace(TRAINING, epochs=6, seed=2)
    again = untrained(context.train, long)
    nt.learn_targets(again, context.train, nt.last_targets(p, given, passed), long)
    assert same(again.model.state_dict(), found.model.model.state_dict())


def test_the_same_seed_gives_the_same_model(context, found):
    again = NTML()(context)
    assert again.report["passed"] == found.report["passed"]
    assert same(again.model.model.state_dict(), found.model.model.state_dict())


def test_it_is_the_mask_that_keeps_the_trigger_out(context, monkeypatch, task):
    """With the given label in the race, the student takes the backdoor over."""
    said = context.classifier.logits(context.train.inputs)
    given = said, context, PairConfig(center=False), 0
    masked = evaluate(nt.non_target(*given), task, BadNetsPatch(), 0)
    monkeypatch.setattr(nt, "without", lambda logits, labels: logits)
    bare = evaluate(nt.non_target(*given), task, BadNetsPatch(), 0)
    assert masked.asr.value < 0.2 and bare.asr.value > 0.8


def test_harm_is_undone(context, monkeypatch):
    monkeypatch.setattr(nt, "fit_last", lambda student, *rest: None)  # learns nothing
    with pytest.warns(UserWarning, match="was undone"):
        found = NTML(self_share=0)(context)
    assert found.verdict == "undone" and found.model is not context.classifier
    inputs = context.clean.inputs
    assert torch.equal(found.model.logits(inputs), context.classifier.logits(inputs))
    assert NTML(self_share=0, stop=False)(context).verdict == "purified"


def test_alone_the_student_judges(context, monkeypatch):
    judges = []
    monkeypatch.setattr(nt, "mutual", None)  # would fail
    monkeypatch.setattr(nt, "judged", lambda *given: judges.append(given) or JUDGED(*given))
    brief = replace(context, training=replace(TRAINING, epochs=1))
    found = NTML(mutual=False, stop=False)(brief)
    (said, alone, pair, labels, gate, config), = judges
    student = found.report["stages"]["non-target student"]
    assert torch.equal(alone, student.logits(context.train.inputs))
    assert len(pair) == 2 and all(torch.equal(z, alone) for z in pair)
    assert torch.equal(said, context.classifier.logits(context.train.inputs))
    assert labels.tolist() == [*context.train.labels] and (gate, config) == (0.5, JudgeConfig())


def test_texts_go_the_same_way(monkeypatch):
    """Two classes: what the trigger left is judged by a probe of the clean samples."""
    model = built(BertConfig(**BERT_SIZES))
    context = Context(model, CleanSet(some_texts(60, 1), (0, 1) * 30, TEXT_NAMES),
                      TrainSet(some_texts(50, 2), (0, 1) * 25, TEXT_NAMES),
                      TrainConfig(epochs=1, max_length=16))
    monkeypatch.setattr(Context, "new_model", lambda *given: built(BertConfig(**BERT_SIZES)))
    found = replace(RELABEL, self_share=0.4, stop=False)(context)
    assert len(found.report["passed"]) == 50 and found.verdict == "purified"
    assert found.model.logits(context.train.inputs).shape == (50, 2)


@pytest.mark.parametrize("change, message", [
    ({"classifier": ImageClassifier.new(4, channels=1)}, "gives 4 classes"),
    ({"train": None}, "NT-ML needs the training set"), ({"training": None}, "give the context"),
    ({"names": NAMES[::-1]}, "differ in their classes"),
    ({"indices": (0, 1, 3, 4)}, r"no clean sample shows the classes \[2\]")])
def test_what_cannot_work_is_rejected_before_anything_is_trained(context, trained, change,
                                                                 message):
    clean = context.clean.take(change.pop("indices", range(30)))
    clean = replace(clean, label_names=change.pop("names", NAMES))
    with pytest.raises(ValueError, match=message):
        NTML()(replace(context, clean=clean, **change))
    assert not trained


def test_the_ranges_of_its_hyperparameters():
    has_ranges(PairConfig, [("clean_batch", 1)], [
        ("clean_batch", 0), ("nt_share", 0.0), ("ml_share", -1.0), ("temperature", 0.0),
        ("head_lr", 0.0), ("head_steps", 0)])
    has_ranges(JudgeConfig, [("factor", 1.0), ("least", 0.0), ("quantile", 1.0), ("again", 0.0),
                             ("form", "global")], [
        ("form", "each"), ("confidence", 0.0), ("confidence", 1.0), ("factor", 0.9),
        ("least", -0.1), ("least", 1.1), ("quantile", -0.1), ("quantile", 1.1),
        ("again", -0.1), ("again", 1.1)])
    has_ranges(NTML, [("gate", 0.0), ("self_share", 0), ("confidence", 1.0)], [
        ("gate", -0.1), ("last_share", 0.0), ("self_share", -0.1), ("self_lr", 0.0),
        ("confidence", 1.1)])


# ------------------------------------------------------- studies and attacker


def test_the_variants_are_what_they_are_called_after():
    found = {name: defense for name, defense in runs.VARIANTS.items() if isinstance(defense, NTML)}
    for name, count in runs.COUNTS.items():
        stem, _, number = name.rpartition("-")
        assert runs.VARIANTS[name] == runs.VARIANTS[stem] and int(number) == count
        found.pop(name, None)
    assert found == {
        "ntml": NTML(), "ntml-raw": NTML(PairConfig(center=False)), "ntml-gate-3": NTML(gate=3.0),
        "ntml-drop": NTML(self_share=0.0), "ntml-alone": NTML(mutual=False),
        "ntml-go-on": NTML(scratch=False), "ntml-global": NTML(judge=JudgeConfig("global")),
        "ntml-relabel": NTML(judge=JudgeConfig("global"), drop=False, self_share=0.0)}


@pytest.mark.parametrize("name, clean", [("ntml", 12), ("ntml-25", 25), ("ft", 12), ("ibau", 12),
                                         ("anew", 12)])
def test_a_recorded_run_gives_the_defense_few_samples_and_measures_every_stage(
        attacked, monkeypatch, name, clean):
    given, models = [], []
    good = SimpleNamespace(predict=lambda inputs: [0] * len(inputs))
    monkeypatch.setattr(runs, "CLEAN_IMAGES", 12)
    stages = {"one": "first", "two": "second"}
    passed = tuple(i % 2 == 0 for i in range(len(attacked.train)))
    report = {"stages": stages, "passed": passed, "shares": torch.tensor([0.1, 0.5, 0.2])}
    outcome = Outcome(good, seconds={"last": 1.0}, report=report)
    monkeypatch.setattr(type(runs.VARIANTS[name]), "__call__",
                        lambda self, context: given.append((self, context)) or outcome)
    rate = runs.wilson(1, 2)
    metrics, seconds, extra = runs.defend(
        name, attacked, 3, lambda model, floor=True: models.append(model) or {"cacc": rate}, None)
    (defense, context), = given
    assert (context.classifier is attacked.classifier) == (name != "anew") and defense.seed == 3
    if name == "anew":  # the same network before it has learned anything
        new = context.new_model(TRAINING).model
        assert all(map(torch.equal, new.parameters(), context.classifier.model.parameters()))
    assert context.train is (attacked.train if name.startswith("ntml") else None)
    assert len(context.clean) == clean == metrics["clean"] and context.training == TRAINING
    assert models[-2:] in ([attacked.classifier, good], [good, attacked.classifier])
    assert seconds == {"last": 1.0}
    if name.startswith("ntml"):
        assert extra["history"] == [{"stage": stage, "cacc": 0.5} for stage in stages]
        poisoned = attacked.record.poisoned
        assert metrics["poisoned_passed"].value == near(
            sum(p and i % 2 == 0 for i, p in enumerate(poisoned)) / sum(poisoned))
        assert (metrics["largest_share"], metrics["runner_up"]) == near((0.5, 0.2))
        assert metrics["clean_passed"].n == len(poisoned) - sum(poisoned)
        assert metrics["second"].n == metrics["second_centered"].n == sum(poisoned)
    else:
        assert extra["history"] == []


def test_the_second_choice_of_a_victim_is_counted_on_mislabeled_samples_only():
    said = of([[9, 5, 3], [9, 3, 5], [0, 9, 1], [9, 0, 1]])
    # 0 and 1 are poisoned; the mean of label 0 is (9, 8/3, 3), which changes no order.
    attacked = SimpleNamespace(
        train=TrainSet(tuple("abcd"), (0, 0, 1, 0), NAMES),
        task=SimpleNamespace(train=TrainSet(tuple("abcd"), (1, 1, 1, 0), NAMES)),
        classifier=SimpleNamespace(logits=lambda inputs: said))
    found = runs._second_choice(attacked)
    assert [found[name].value for name in ("second", "second_centered")] == [0.5, 0.5]
    attacked.classifier.logits = lambda inputs: of([[9, 5, 7], [9, 3, 5], [0, 9, 1], [9, 0, 9]])
    found = runs._second_choice(attacked)
    # Class 2 is the second choice of all with label 0; less its mean it is that of one.
    assert [found[name].value for name in ("second", "second_centered")] == [0, 1]
    attacked.task = SimpleNamespace(train=attacked.train)
    assert runs._second_choice(attacked) == {}


def test_a_decoy_gets_its_share_of_the_poisoned_samples_and_no_other(task):
    plain, record = BadNetsPatch().poison(task.train, PoisonConfig(0.2, 0))
    decoyed, its = DecoyTrigger(share=0.25, decoy=2).poison(task.train, PoisonConfig(0.2, 0))
    assert its.poisoned == record.poisoned
    assert torch.equal(decoyed.inputs.pixels, plain.inputs.pixels)
    new = [y for y, p in zip(decoyed.labels, record.poisoned) if p]
    assert new.count(2) == round(0.25 * len(new)) and new.count(0) == len(new) - new.count(2)
    assert [y for y, p in zip(decoyed.labels, record.poisoned) if not p] == [
        y for y, p in zip(plain.labels, record.poisoned) if not p]


def test_a_stratified_subset_has_as_many_of_each_class_as_there_are(task):
    odd = CleanSet(tuple("abcdefgh"), (0, 0, 0, 0, 1, 1, 2, 0), NAMES)
    assert odd.stratified(6).inputs == ("a", "b", "c", "e", "f", "g")
    assert odd.stratified(4).labels.count(0) == 2 and odd.stratified(8) == odd
    assert torch.tensor(task.clean.stratified(9).labels).bincount().tolist() == [3, 3, 3]
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"cannot take {count} of 8 samples"):
            odd.stratified(count)


# ----------------------------------------------------------------------- roles


def test_which_samples_are_poisoned_has_no_way_in(context, attacked, task):
    """Another record of the same samples is another object that nobody is given."""
    with pytest.raises(TypeError, match="TrainSet"):
        replace(context, train=task.test)
    with pytest.raises(TypeError):
        NTML()(context, attacked.record)
