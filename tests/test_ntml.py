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
from bdutils.defenses.ntml import NTML, PairConfig
from bdutils.evaluation import Victim, evaluate
from bdutils.experiments import variants as runs
from bdutils.experiments.run import DecoyTrigger
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


class Says:
    """A model that gives these probabilities."""

    def __init__(self, values):
        self.values = values

    def logits(self, inputs):
        assert len(inputs) == len(self.values)
        return probabilities(self.values)


def check_judged(judged):
    train_set = TrainSet(("a", "b", "c"), (0, 1, 1), NAMES)
    pair = (Says([[0.16, 0.5, 0.34], [0.5, 0.3, 0.2], [0.8, 0.01, 0.19]]),
            Says([[0.18, 0.7, 0.12], [0.9, 0.01, 0.09], [0.6, 0.3, 0.1]]))
    p, passed = judged(pair, train_set, 0.5)  # chance is 1/3: on average 1/6 must be exceeded
    assert p[0].tolist() == near([0.17, 0.6, 0.23])
    assert passed.tolist() == [True, False, False]
    assert judged(pair, train_set, 0.46)[1].tolist() == [True, True, True]


def check_last_targets(last_targets):
    p = of([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    got = last_targets(p, whole("1 1"), torch.tensor([True, False]))
    assert got.tolist() == [[0, 1, 0], near([5 / 6, 0, 1 / 6])]


def kl(p, logits, reduction="batchmean"):
    return F.kl_div(logits.log_softmax(1), p, reduction=reduction)


def passing(judge):
    """Return `judged` with another rule for what passes."""
    def judged(pair, train_set, gate):
        p, _ = nt.judged(pair, train_set, gate)
        own = p.gather(1, torch.tensor(train_set.labels)[:, None])[:, 0]
        return p, judge(p, own, gate)

    return judged


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
    check_judged: [
        passing(lambda p, own, gate: own < gate / 3), passing(lambda p, own, gate: own > gate),
        passing(lambda p, own, gate: 2 * own > gate / 3),
        passing(lambda p, own, gate: p.max(1).values > gate / 3),
        lambda pair, train_set, gate: nt.judged(pair[:1], train_set, gate)],
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


def outputs(values):
    return SimpleNamespace(logits=probabilities(values))


def test_the_student_learns_the_other_answers_of_the_right_samples(trained):
    train_set = TrainSet(("a", "b", "c"), (0, 0, 1), NAMES)
    said = of([[1, 2, 3], [3, 2, 1], [0, 0, 6]])
    nt.learn_others("student", train_set, said, TRAINING)
    nt.learn_others("student", train_set, said, TRAINING, center=False)
    assert all((c.model, c.train, c.training) == ("student", train_set, TRAINING)
               for c in trained)
    batch = {"indices": [1, 0], "labels": whole("0 0")}
    answers = outputs([[0.2, 0.4, 0.4], [0.6, 0.3, 0.1]])
    for call, wanted in zip(trained, ([[1, 0, -1], [-1, 0, 1]], [[3, 2, 1], [1, 2, 3]])):
        value = nt.nt_loss(answers.logits, of(wanted), batch["labels"])
        assert call.loss(answers, batch).item() == near(value.item())


def check_learn_from(learn_from, given_batch=lambda batch: batch):
    """Compare the loss with one that is put together from its parts."""
    learner = ImageClassifier.new(3, channels=1, seed=5)
    train_set, clean = thirds(TrainSet, 4, 3), thirds(CleanSet, 3, 4)
    said = {id(train_set.inputs): [[0.64, 0.01, 0.04]] * 4,
            id(clean.inputs): [[0.7, 0.2, 0.1]] * 3}
    peer = SimpleNamespace(logits=lambda inputs: probabilities(said[id(inputs)]))
    context = Context(learner, clean, train_set, TRAINING)
    given, loss = learn_from(learner, peer, context, TRAINING, PairConfig(clean_batch=64))
    assert given == (learner, train_set, TRAINING)
    learner.model.eval()
    answers = [[0.04, 0.64, 0.04], [0.04, 0.25, 0.64]]
    with torch.no_grad():
        value = loss(outputs(answers), given_batch({"indices": [1, 0]})).item()
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
        check_learn_from(loss_of, lambda batch: {"indices": batch["indices"][::-1]})


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
    pair = nt.mutual(student, context, config, seed=4)
    assert [id(call[i]) for call in heard for i in (0, 1)] == [
        id(pair[0]), id(student), id(pair[1]), id(pair[0])]
    assert all(call[2] is context and call[4] is config for call in heard)
    assert [call[3] for call in heard] == [replace(TRAINING, epochs=1, lr=0.025, seed=seed)
                                           for seed in (4, 5)]
    # Both are copies: the originals can be looked at afterwards.
    assert not {id(pair[0].model), id(pair[1].model)} & {id(student.model),
                                                         id(context.classifier.model)}


@pytest.mark.parametrize("drop", [False, True])
def test_the_last_student_gets_what_passed(monkeypatch, drop):
    train_set = TrainSet(("a", "b", "c"), (0, 1, 1), NAMES)
    p, passed = of([[0.6, 0.3, 0.1], [0.9, 0.02, 0.08], [0.1, 0.8, 0.1]]), whole("1 0 1").bool()
    lessons = []
    monkeypatch.setattr(nt, "learn_targets", lambda *given: lessons.append(given))
    nt.fit_last("student", train_set, p, passed, TRAINING, drop)
    (model, kept, targets, training), = lessons
    assert model == "student" and training is TRAINING
    wanted = [[1, 0, 0], [0.9 / 0.98, 0, 0.08 / 0.98], [0, 1, 0]]
    assert kept.inputs == (("a", "c") if drop else ("a", "b", "c"))
    assert targets.tolist() == [near(values) for values in (wanted[::2] if drop else wanted)]
    if drop:
        with pytest.raises(ValueError, match="no given label passed the gate"):
            nt.fit_last("student", train_set, p, passed & False, TRAINING, drop)


@pytest.mark.parametrize("scratch", [False, True])
def test_the_last_student_starts_as_it_should(context, monkeypatch, scratch):
    fitted, made = [], []
    monkeypatch.setattr(nt, "fit_last", lambda *given: fitted.append(given))
    monkeypatch.setattr(nt, "non_target", lambda *given: clone(context.classifier))
    monkeypatch.setattr(Context, "new_model", lambda self, training: made.append(training)
                        or ImageClassifier.new(3, channels=1, seed=1))
    outcome = NTML(mutual=False, scratch=scratch, drop=True, stop=False, seed=5)(context)
    (student, train_set, p, passed, training, drop), = fitted
    long = replace(TRAINING, epochs=6, seed=7)
    assert student is outcome.model and train_set is context.train and drop
    assert training == long and made == [long] * scratch
    weights = outcome.report["stages"]["mutual student"].model.state_dict()
    assert same(weights, student.model.state_dict()) != scratch


# ------------------------------------------------------------- the whole way


def test_the_backdoor_goes_and_the_given_model_stays(attacked, found, task):
    before = evaluate(attacked.classifier, task, BadNetsPatch(), 0)
    after = evaluate(found.model, task, BadNetsPatch(), 0)
    assert before.asr.value > 0.9 and before.cacc.value > 0.95
    assert after.asr.value < 0.2 and after.ra.value > 0.7 and after.cacc.value > 0.9
    stages = found.report["stages"]
    assert found.verdict == "purified" and found.model is stages["last student"]
    assert [*stages] == ["non-target student", "mutual teacher", "mutual student", "last student"]
    poisoned = torch.tensor(attacked.record.poisoned)
    passed = torch.tensor(found.report["passed"])
    assert passed[~poisoned].float().mean() > 0.8 > 0.3 > passed[poisoned].float().mean()
    assert [*found.seconds] == ["non-target", "mutual", "last"]
    assert all(took > 0 for took in found.seconds.values())
    assert evaluate(attacked.classifier, task, BadNetsPatch(), 0) == before


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
    monkeypatch.setattr(nt, "learn_targets", lambda student, *rest: None)  # learns nothing
    with pytest.warns(UserWarning, match="was undone"):
        found = NTML()(context)
    assert found.verdict == "undone" and found.model is not context.classifier
    inputs = context.clean.inputs
    assert torch.equal(found.model.logits(inputs), context.classifier.logits(inputs))
    assert NTML(stop=False)(context).verdict == "purified"


def test_alone_the_student_judges(context, monkeypatch):
    judges = []
    monkeypatch.setattr(nt, "mutual", None)  # would fail
    monkeypatch.setattr(nt, "judged", lambda pair, train_set, gate: (
        judges.append(pair) or torch.full((len(train_set), 3), 1 / 3),
        torch.ones(len(train_set), dtype=torch.bool)))
    brief = replace(context, training=replace(TRAINING, epochs=1))
    found = NTML(mutual=False, stop=False)(brief)
    assert judges == [(found.report["stages"]["non-target student"],) * 2]


def test_texts_go_the_same_way(monkeypatch):
    """Two classes: what the trigger left is judged by a probe of the clean samples."""
    model = built(BertConfig(**BERT_SIZES))
    context = Context(model, CleanSet(some_texts(60, 1), (0, 1) * 30, TEXT_NAMES),
                      TrainSet(some_texts(50, 2), (0, 1) * 25, TEXT_NAMES),
                      TrainConfig(epochs=1, max_length=16))
    monkeypatch.setattr(Context, "new_model", lambda *given: built(BertConfig(**BERT_SIZES)))
    found = NTML(stop=False)(context)
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
    has_ranges(NTML, [("gate", 0.0)], [("gate", -0.1), ("last_share", 0.0)])


# ------------------------------------------------------- studies and attacker


def test_the_variants_are_what_they_are_called_after():
    found = {name: defense for name, defense in runs.VARIANTS.items() if isinstance(defense, NTML)}
    counts = {f"ntml-{count}" for count in (25, 50, 250, 500)}
    assert all(found.pop(name) == NTML() for name in counts) and {*runs.COUNTS} == counts
    assert found == {
        "ntml": NTML(), "ntml-raw": NTML(PairConfig(center=False)), "ntml-gate-3": NTML(gate=3.0),
        "ntml-drop": NTML(drop=True), "ntml-alone": NTML(mutual=False),
        "ntml-go-on": NTML(scratch=False)}


@pytest.mark.parametrize("name, clean", [("ntml", 12), ("ntml-25", 25), ("ft", 12), ("ibau", 12)])
def test_a_recorded_run_gives_the_defense_few_samples_and_measures_every_stage(
        attacked, monkeypatch, name, clean):
    given, models = [], []
    good = SimpleNamespace(predict=lambda inputs: [0] * len(inputs))
    monkeypatch.setattr(runs, "CLEAN_IMAGES", 12)
    stages = {"one": "first", "two": "second"}
    passed = tuple(i % 2 == 0 for i in range(len(attacked.train)))
    report = {"stages": stages, "passed": passed} if name.startswith("ntml") else {}
    outcome = Outcome(good, seconds={"last": 1.0}, report=report)
    monkeypatch.setattr(type(runs.VARIANTS[name]), "__call__",
                        lambda self, context: given.append((self, context)) or outcome)
    rate = runs.wilson(1, 2)
    metrics, seconds, extra = runs.defend(
        name, attacked, 3, lambda model, floor=True: models.append(model) or {"cacc": rate}, None)
    (defense, context), = given
    assert context.classifier is attacked.classifier and defense.seed == 3
    assert context.train is (attacked.train if name.startswith("ntml") else None)
    assert len(context.clean) == clean == metrics["clean"] and context.training == TRAINING
    assert models[-2:] in ([attacked.classifier, good], [good, attacked.classifier])
    assert seconds == {"last": 1.0}
    if name.startswith("ntml"):
        assert extra["history"] == [{"stage": stage, "cacc": 0.5} for stage in stages]
        poisoned = attacked.record.poisoned
        assert metrics["poisoned_passed"].value == near(
            sum(p and i % 2 == 0 for i, p in enumerate(poisoned)) / sum(poisoned))
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
