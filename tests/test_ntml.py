"""NT-ML and the baselines: losses by hand, who learns from whom, and what a defense may see."""

import ast
import copy
import inspect
from dataclasses import fields, replace
from functools import partial
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import mutant, near, unnoticed
from helpers.pictures import NAMES, thirds
from helpers.texts import SIZES as BERT_SIZES
from helpers.texts import VIEW, built
from helpers.walls import SECRETS, names_in
from torch import nn
from transformers import BertConfig

from bdutils.attacks.images import PatchTrigger
from bdutils.attacks.text import PoisonSettings
from bdutils.defenses import baselines as bl
from bdutils.defenses import ntml as nt
from bdutils.defenses.baselines import MinimaxSettings, TuningSettings
from bdutils.defenses.ntml import NTMLSettings, PairSettings
from bdutils.evaluation import evaluate
from bdutils.experiments import variants as runs
from bdutils.experiments.studies import DecoyTrigger
from bdutils.models.image import PictureClassifier
from bdutils.roles import DefenderView, ReservedSet, Task, TestSet, TrainingSet
from bdutils.training import PictureSettings, TrainSettings, train, untrained

TRAINING = PictureSettings(epochs=8, batch_size=32, lr=0.05, pad=1, flip=False)


@pytest.fixture(scope="module")
def task():
    return Task("thirds", thirds(TrainingSet, 480, 0), thirds(ReservedSet, 30, 1),
                thirds(TestSet, 150, 2), "made here")


@pytest.fixture(scope="module")
def attacked(task):
    rows, truth = PatchTrigger().poison(task.train, PoisonSettings(0.2, 0))
    model = untrained(rows, TRAINING)
    train(model, rows, TRAINING)
    return SimpleNamespace(classifier=model, train=rows, truth=truth, task=task, settings=TRAINING)


@pytest.fixture(scope="module")
def view(attacked):
    return DefenderView(attacked.task.reserved, attacked.train)


@pytest.fixture(scope="module")
def fresh(attacked):
    return partial(untrained, attacked.train)


@pytest.fixture(scope="module")
def found(attacked, view, fresh):
    return nt.ntml(attacked.classifier, view, fresh, TRAINING)


def of(rows):
    return torch.tensor(rows, dtype=torch.float32)


def probabilities(rows):
    return of(rows).log()


def whole(text):
    return torch.tensor(list(map(int, text.split())))


# ---------------------------------------------------------------- arithmetic


def check_centered(centered):
    # Rows 0 and 1 have label 0 and the mean (2, 2, 2); row 2 is alone; no row has label 2.
    got = centered(of([[1, 2, 3], [3, 2, 1], [0, 0, 6]]), whole("0 0 1"))
    assert got.tolist() == [[-1, 0, 1], [1, 0, -1], [0, 0, 0]]


def check_without(without):
    got = without(of([[1, 2, 3], [3, 2, 1]]), whole("2 0"))
    assert got.softmax(1).tolist() == [near([1 / (1 + 2.7182818), 2.7182818 / 3.7182818, 0]),
                                       near([0, 2.7182818 / 3.7182818, 1 / 3.7182818])]


def check_nt_loss(nt_loss):
    # Without the label: wanted (3/4, 1/4), given (1/2, 1/2); the second row is right already.
    wanted = probabilities([[0.9, 0.075, 0.025], [0.2, 0.7, 0.1]])
    logits = probabilities([[0.2, 0.4, 0.4], [0.4, 0.4, 0.2]]).requires_grad_()
    value = nt_loss(logits, wanted, whole("0 1"))
    assert value.item() == near((0.75 * log(1.5) + 0.25 * log(0.5)) / 2)
    slope, = torch.autograd.grad(value, logits)
    assert slope.tolist() == [near([0, -1 / 8, 1 / 8]), near([0, 0, 0])]


def check_share_of(share_of):
    ten = PictureSettings(epochs=10, seed=3)
    assert share_of(ten, 0.6, 7) == replace(ten, epochs=6, seed=7)
    assert share_of(ten, 0.01, 7).epochs == 1
    assert share_of(TrainSettings(epochs=2), 0.8, 0).epochs == 2


def check_others(others):
    got = others(of([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [1, 0, 0]]), whole("0 2 0"))
    # The last row gives its label everything, and has nothing left to share out.
    assert got.tolist() == [near([0, 0.8, 0.2]), near([0.5, 0.5, 0]), [0, 0, 0]]


def check_soft_targets(soft_targets):
    # Squares, because the temperature of two takes roots; row 0 disagrees, row 1 does not.
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

    def __init__(self, rows):
        self.rows = rows

    def logits(self, texts):
        assert len(texts) == len(self.rows)
        return probabilities(self.rows)


def check_judged(judged):
    pool = TrainingSet(("a", "b", "c"), (0, 1, 1), NAMES)
    pair = (Says([[0.16, 0.5, 0.34], [0.5, 0.3, 0.2], [0.8, 0.01, 0.19]]),
            Says([[0.18, 0.7, 0.12], [0.9, 0.01, 0.09], [0.6, 0.3, 0.1]]))
    p, passes = judged(pair, pool, 0.5)  # chance is 1/3: on average 1/6 must be exceeded
    assert p[0].tolist() == near([0.17, 0.6, 0.23])
    assert passes.tolist() == [True, False, False]
    assert judged(pair, pool, 0.46)[1].tolist() == [True, True, True]


def check_last_targets(last_targets):
    p = of([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    got = last_targets(p, whole("1 1"), torch.tensor([True, False]))
    assert got.tolist() == [[0, 1, 0], near([5 / 6, 0, 1 / 6])]


def check_attention_maps(attention_maps):
    maps = of([[[[3.0, 0.0]], [[0.0, 2.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]])  # (2, 2, 1, 2)
    got, = attention_maps(SimpleNamespace(hidden_states=(maps,)))
    # Squares 9 and 4, of length sqrt(97); then 2 and 2.
    assert got.tolist() == [near([9 / 97**0.5, 4 / 97**0.5]), near([0.5**0.5] * 2)]


class OneWeight(nn.Module):
    """Logits (w x, 0)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return SimpleNamespace(logits=torch.stack([self.weight * x, 0 * x], 1))


class TwoWeights(OneWeight):
    """Logits (w x + b, 0)."""

    def __init__(self, weight, bias):
        super().__init__(weight)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x):
        return SimpleNamespace(logits=torch.stack([self.weight * x + self.bias, 0 * x], 1))


def check_sharp_loss(sharp_loss):
    # The loss of class 1 is ln(1 + e^z) with z = w x + b: both slopes are positive, s and s for
    # x = 1. With T = diag(3, 1), T g is s (3, 1) and its length s sqrt(10), so that the weights
    # move by rho (9, 1) / sqrt(10), and z from 3 - 1 by 10 rho / sqrt(10).
    model, batch = TwoWeights(3.0, -1.0), {"x": torch.ones(2), "labels": whole("1 1"),
                                           "rows": [5, 7]}
    for rho in (0.0, 0.5):
        value = sharp_loss(model, rho)(model(batch["x"]), batch)
        moved = 2 + rho * 10**0.5
        assert value.item() == near(log(1 + exp(moved)))
        slopes = torch.autograd.grad(value, [*model.parameters()])  # taken there, for a step here
        assert [slope.item() for slope in slopes] == near([1 / (1 + exp(-moved))] * 2)
    model.bias.requires_grad_(False)  # what is not trained does not move
    value = sharp_loss(model, 0.5)(model(batch["x"]), batch)
    assert value.item() == near(log(1 + exp(3 + 0.5 * 3 - 1)))
    assert [p.item() for p in model.parameters()] == [3, -1]


def height(theta):
    """H = -d1^2 - 2 d2^2 + 2 d1 t1 + 4 d2 t2 + t1 t2, largest at d = t."""
    return lambda d: (-d[0]**2 - 2 * d[1]**2 + 2 * d[0] * theta[0] + 4 * d[1] * theta[1]
                      + theta[0] * theta[1])


def check_in_ball(in_ball):
    assert in_ball(of([[3, 4]]), 10).tolist() == [[3, 4]]
    assert in_ball(of([[3, 4]]), 2.5).tolist() == [near([1.5, 2])]
    assert in_ball(of([[0, 0]]), 2.5).tolist() == [[0, 0]]


def check_climb(climb):
    theta, start = of([2, 1]), of([1, 0]).requires_grad_()
    # The slope at (1, 0) is (2, 4); half of it leads to (2, 2), which is too long by sqrt(8).
    assert climb(height(theta), start, 0.5, 9.0).tolist() == [2, 2]
    assert climb(height(theta), start, 0.5, 2.0).tolist() == near([2**0.5, 2**0.5])
    weight = of([2, 1]).requires_grad_()
    moved = climb(height(weight), start, 0.5, 9.0)
    slopes = torch.autograd.grad(moved[1], [start, weight])  # 0 + 1/2 (4 t2 - 4 d2)
    assert [one.tolist() for one in slopes] == [[0, -1], [0, 2]]


def check_hypergradient(hypergradient):
    # The worst value is t1^2 + 2 t2^2 + t1 t2: its slope at (2, 1) is (5, 6), wherever the
    # search has ended. At (1, 0) the direct slope is (2 d1 + t2, 4 d2 + t1) = (3, 2) and the
    # pull (2, 4). With the rate 1/8 a term keeps (3/4, 1/2) of what was missing: (2, 4).
    theta, used = of([2, 1]).requires_grad_(), []

    def step(d):
        used.append(d)
        return bl.climb(height(theta), d, 0.125, 9.0)

    for terms in (0, 1, 2, 5, 60):
        found, = hypergradient(height(theta), step, of([1, 0]), [theta], terms)
        assert found.tolist() == near([5 - 2 * 0.75**terms, 6 - 4 * 0.5**terms])
        assert not found.requires_grad
    # At the worst mark itself nothing is missing.
    assert hypergradient(height(theta), step, of([2, 1]), [theta], 0)[0].tolist() == [5, 6]
    assert len(used) == 6  # the step is taken once


def check_worst_mark(worst_mark):
    settings = MinimaxSettings(radius=2.0, climbs=3, climb_lr=0.25)
    theta = of([2, 1])
    # d1 halves its way to 2 and d2 is there at once: (1, 1), (1.5, 1), then a length over 2.
    found = worst_mark(height(theta), of([7, 7]), settings)
    long = 1 / (1.75**2 + 1)**0.5
    assert found.tolist() == near([2 * 1.75 * long, 2 * long]) and not found.requires_grad
    assert worst_mark(height(theta), of([7, 7]), replace(settings, climbs=1)).tolist() == [1, 1]


MUTATIONS = {
    check_in_ball: [(".clamp(max=1)", ""), ("mark.norm()", "mark.max()"), ("radius / ", "")],
    check_climb: [("mark + rate", "mark - rate"), ("rate * ", ""), (", radius)", ", 9.0)")],
    check_hypergradient: [("one + other", "one"), ("one + other", "other"),
                          ("one + other", "one - other"), ("v = pull + ", "v = "),
                          ("v = pull + ", "v = pull - "), ("range(terms)", "range(terms + 1)"),
                          ("mark, v, retain", "mark, pull, retain"),
                          ("moved, weights, v)", "moved, weights, pull)"),
                          ("step(mark), ", "step(step(mark)), ")],
    check_worst_mark: [("zeros_like", "ones_like"), ("range(settings.climbs)", "range(1)"),
                       ("settings.climb_lr", "settings.term_lr"), ("settings.radius", "9.0"),
                       (".detach()", "")],
    check_sharp_loss: [("p + rho", "p - rho"), ("* t * s", "* s"), ("t * g", "g"),
                       (".sqrt()", ""),
                       ("p.detach().abs()", "p.abs()"),
                       ("functional_call(model, moved", "functional_call(model, weights")],
    check_centered: [("logits - (", "logits + ("), ("[labels]", "[labels.flip(0)]"),
                     ("/ counts[:, None]", "")],
    check_without: [("-1e4", "1e4"), ("-1e4", "0.0"),
                    ("labels[:, None]", "labels.flip(0)[:, None]")],
    check_nt_loss: [("without(wanted, labels)", "wanted"), ("without(logits, labels)", "logits"),
                    ('"batchmean"', '"sum"'), ('"batchmean"', '"mean"'),
                    ("(log_q, p,", "(p, log_q,"),
                    ("without(wanted, labels).softmax", "without(wanted, 1 - labels).softmax"),
                    ("return F", "return -F"),
                    ("p = without(wanted", "p = without(logits")],
    check_share_of: [("max(1, ", "max(2, "), ("seed=seed", "seed=training.seed"),
                     ("share * ", "")],
    check_others: [("0.0)", "1.0)"), (".clamp(min=1e-12)", ""), ("kept / kept", "kept * kept"),
                   ("kept = p.scatter(1, labels[:, None], 0.0)", "kept = p")],
    check_soft_targets: [("!= labels", "== labels"), ("others(p, labels), p", "p, p"),
                         ("/ temperature", "* temperature"),
                         ("others(p, labels), p", "p, others(p, labels)")],
    check_ml_loss: [("-temperature**2", "temperature**2"), ("-temperature**2 *", "-"),
                    ("/ temperature", ""), (".mean()", ".sum()"), ("targets * log_q", "log_q")],
    check_clean_loss: [("F.cross_entropy(logits, labels) + ", ""),
                       ("+ temperature**2", "- temperature**2"),
                       ("(log_q, p,", "(p.log(), log_q.exp(),"),
                       ("(logits, labels)", "(peer, labels)")],
    check_judged: [("> gate", "< gate"), ("/ pool.num_labels", ""), ("/ len(pair)", ""),
                   ("in pair)", "in pair[:1])"),
                   (".gather(1, labels[:, None])[:, 0]", ".max(1).values")],
    check_last_targets: [("given, others(p, labels)", "others(p, labels), given"),
                         ("given, others(p, labels)", "given, p"),
                         ("given, others(p, labels)", "given, given")],
    check_attention_maps: [(".sum(1)", ".mean(1).sqrt()"), ("dim=1", "dim=0"), (".pow(2)", ""),
                           ("F.normalize(", "(lambda maps, dim: maps)(")],
}


@pytest.mark.parametrize("check", MUTATIONS)
def test_functions_are_what_plain_arithmetic_says_and_every_mutation_is_noticed(check):
    module = bl if hasattr(bl, check.__name__.removeprefix("check_")) else nt
    assert unnoticed(module, check, MUTATIONS[check]) == []


def test_two_classes_leave_nothing_to_learn_without_the_label():
    logits = torch.randn(5, 2, requires_grad=True)
    value = nt.nt_loss(logits, torch.randn(5, 2), whole("0 1 1 0 1"))
    slope, = torch.autograd.grad(value, logits)
    assert value.item() == 0 and not slope.any()


# --------------------------------------------------------------- last layers


def test_the_last_layer_is_found_and_its_inputs_give_the_logits(attacked, task):
    for classifier, texts, classes in (
            (attacked.classifier, task.reserved.texts, 3),
            (built(BertConfig(**BERT_SIZES)), VIEW.reserved.texts, 2)):
        layer = bl.last_layer(classifier.model, classes)
        assert torch.allclose(layer(bl.inputs_of(classifier, layer, texts)),
                              classifier.logits(texts), atol=1e-5)
    with pytest.raises(ValueError, match="no linear layer of 7 outputs"):
        bl.last_layer(classifier.model, 7)


def test_the_head_is_fitted_to_clean_rows_and_nothing_else_moves(attacked, task):
    student = bl.twin(attacked.classifier)
    layer = bl.last_layer(student.model, 3)
    nn.init.normal_(layer.weight)
    before = copy.deepcopy(student.model.state_dict())
    nt.fit_head(student, task.reserved, PairSettings())
    after = student.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}
    right = [a == b for a, b in zip(student.predict(task.test.texts), task.test.labels)]
    assert sum(right) > 0.9 * len(right)
    # Where the layer was does not matter: two starts end alike.
    other = bl.twin(attacked.classifier)
    nt.fit_head(other, task.reserved, PairSettings())
    assert torch.equal(other.model.head.weight, after["head.weight"])


# ------------------------------------------------------- who learns from whom


@pytest.fixture
def trained(monkeypatch):
    """Record what would be trained."""
    calls = []
    for module in (nt, bl):
        monkeypatch.setattr(module, "train", lambda model, rows, training, loss=None: calls.append(
            SimpleNamespace(model=model, rows=rows, training=training, loss=loss)))
    return calls


def outputs(rows):
    return SimpleNamespace(logits=probabilities(rows))


def test_the_student_learns_the_other_answers_of_the_right_rows(trained, attacked):
    pool = TrainingSet(("a", "b", "c"), (0, 0, 1), NAMES)
    said = of([[1, 2, 3], [3, 2, 1], [0, 0, 6]])
    nt.learn_others("student", pool, said, TRAINING)
    nt.learn_others("student", pool, said, TRAINING, center=False)
    assert all((c.model, c.rows, c.training) == ("student", pool, TRAINING) for c in trained)
    batch = {"rows": [1, 0], "labels": whole("0 0")}
    logits = probabilities([[0.2, 0.4, 0.4], [0.6, 0.3, 0.1]])
    for call, wanted in zip(trained, ([[1, 0, -1], [-1, 0, 1]], [[3, 2, 1], [1, 2, 3]])):
        value = call.loss(SimpleNamespace(logits=logits), batch)
        assert value.item() == near(nt.nt_loss(logits, of(wanted), batch["labels"]).item())


def check_learn_from(learn_from):
    learner = PictureClassifier.new(3, channels=1, seed=5)
    pool, clean = thirds(TrainingSet, 4, 3), thirds(ReservedSet, 3, 4)
    said = {id(pool.texts): [[0.64, 0.01, 0.04]] * 4, id(clean.texts): [[0.7, 0.2, 0.1]] * 3}
    peer = SimpleNamespace(logits=lambda texts: probabilities(said[id(texts)]))
    calls = []
    learn_from.__globals__["train"] = lambda *given, loss: calls.append((given, loss))
    learn_from(learner, peer, DefenderView(clean, pool), TRAINING, PairSettings(clean_batch=64))
    (given, loss), = calls
    assert given == (learner, pool, TRAINING)
    learner.model.eval()
    with torch.no_grad():
        value = loss(outputs([[0.04, 0.64, 0.04], [0.04, 0.25, 0.64]]), {"rows": [1, 0]}).item()
        # Row 1 has label 1, which the peer gives another answer; row 0 has the peer's label 0.
        body = nt.ml_loss(probabilities([[0.04, 0.64, 0.04], [0.04, 0.25, 0.64]]),
                          of([[0.8, 0, 0.2], [8 / 11, 1 / 11, 2 / 11]]), 2.0)
        rows = __import__("random").Random(TRAINING.seed).choices(range(3), k=64)
        own = learner.logits(clean.take(rows).texts)
        beside = nt.clean_loss(own, probabilities([[0.7, 0.2, 0.1]] * 64),
                               torch.tensor([clean.labels[i] for i in rows]), 2.0)
    assert value == near((body + beside).item())


@pytest.mark.parametrize("old, new", [
    ("", ""), ("peer.logits(pool.texts)", "learner.logits(pool.texts)"),
    ('targets[batch["rows"]]', "targets[:2]"), ("right[rows]", "right[rows].flip(0)"),
    ("sure[rows].to(logits)", "logits"), ("k=settings.clean_batch", "k=1"),
    ("given, heat)", "1 - given, heat)"), ("return (ml_loss", "return (0 * ml_loss"),
    ("+ clean_loss", "- clean_loss"), ("heat = torch.tensor(pool.labels), settings.temperature",
                                       "heat = torch.tensor(pool.labels), 1.0")])
def test_a_learner_hears_its_peer_and_clean_rows_and_every_mutation_is_noticed(old, new):
    changed = mutant(nt, "learn_from", old, new)
    if not old:
        return check_learn_from(changed)
    with pytest.raises((AssertionError, RuntimeError)):
        check_learn_from(changed)


def test_the_teacher_learns_from_the_student_then_the_student_from_the_taught_teacher(
        monkeypatch, view, attacked):
    heard = []
    monkeypatch.setattr(nt, "learn_from", lambda *given: heard.append(given))
    student = bl.twin(attacked.classifier)
    settings = PairSettings(seed=4, ml_share=0.5)
    pair = nt.mutual(attacked.classifier, student, view, TRAINING, settings)
    assert [id(call[i]) for call in heard for i in (0, 1)] == [
        id(pair[0]), id(student), id(pair[1]), id(pair[0])]
    assert all(call[2] is view and call[4] is settings for call in heard)
    assert [call[3] for call in heard] == [replace(TRAINING, epochs=1, lr=0.025, seed=seed)
                                           for seed in (4, 5)]
    # Both are copies: the originals can be looked at afterwards.
    assert not {id(pair[0].model), id(pair[1].model)} & {id(student.model),
                                                         id(attacked.classifier.model)}


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("scratch", [False, True])
def test_the_last_student_gets_what_passed_and_starts_as_it_should(monkeypatch, drop, scratch):
    pool = TrainingSet(("a", "b", "c"), (0, 1, 1), NAMES)
    rows = [[0.6, 0.3, 0.1], [0.9, 0.02, 0.08], [0.1, 0.8, 0.1]]
    first, second = Says(rows), Says(rows)
    taught, made = [], []
    monkeypatch.setattr(nt, "learn_targets", lambda *given: taught.append(given))
    monkeypatch.setattr(nt, "twin", lambda model: ("twin", model))
    settings = NTMLSettings(drop=drop, scratch=scratch, seed=5)
    student, passes = nt.last_student(
        (first, second), pool, lambda training: made.append(training) or "fresh", TRAINING,
        settings)
    shape = replace(TRAINING, epochs=6, seed=7)
    assert student == ("fresh" if scratch else ("twin", second)) and made == [shape] * scratch
    (model, kept, targets, training), = taught
    assert model == student and training == shape and passes.tolist() == [True, False, True]
    wanted = [[1, 0, 0], [0.9 / 0.98, 0, 0.08 / 0.98], [0, 1, 0]]
    assert kept.texts == (("a", "c") if drop else ("a", "b", "c"))
    assert targets.tolist() == [near(row) for row in (wanted[::2] if drop else wanted)]
    if drop:
        with pytest.raises(ValueError, match="no given label passed the gate"):
            nt.last_student((first, second), pool, None, TRAINING, replace(settings, gate=3.0))


# ------------------------------------------------------------- the whole way


def test_the_backdoor_goes_and_the_given_model_stays(attacked, view, fresh, found, task):
    before = evaluate(attacked.classifier, task, PatchTrigger(), 0)
    after = evaluate(found.classifier, task, PatchTrigger(), 0)
    assert before.asr.value > 0.9 and before.cacc.value > 0.95
    assert after.asr.value < 0.2 and after.ra.value > 0.7 and after.cacc.value > 0.9
    assert found.verdict == "purified" and found.classifier is found.stages["last student"]
    assert [*found.stages] == ["non-target student", "mutual teacher", "mutual student",
                               "last student"]
    poisoned = torch.tensor(attacked.truth.poisoned)
    passed = torch.tensor(found.passed)
    assert passed[~poisoned].float().mean() > 0.8 > 0.3 > passed[poisoned].float().mean()
    assert all(took > 0 for took in found.seconds.values()) and len(found.seconds) == 3
    same = evaluate(attacked.classifier, task, PatchTrigger(), 0)
    assert same == before


def test_the_same_seed_gives_the_same_model(attacked, view, fresh, found):
    again = nt.ntml(attacked.classifier, view, fresh, TRAINING)
    assert again.passed == found.passed
    weights = found.classifier.model.state_dict()
    assert all(torch.equal(value, weights[name])
               for name, value in again.classifier.model.state_dict().items())


def test_it_is_the_mask_that_keeps_the_trigger_out(attacked, view, fresh, monkeypatch, task):
    """With the given label in the race, the student takes the backdoor over."""
    said = attacked.classifier.logits(attacked.train.texts)
    args = said, view, fresh, TRAINING, PairSettings(center=False)
    masked = evaluate(nt.non_target(*args), task, PatchTrigger(), 0)
    monkeypatch.setattr(nt, "without", lambda logits, labels: logits)
    bare = nt.non_target(*args)
    seen = evaluate(bare, task, PatchTrigger(), 0)
    assert masked.asr.value < 0.2 and seen.asr.value > 0.8


def test_harm_is_undone(attacked, view, fresh, monkeypatch):
    monkeypatch.setattr(nt, "learn_targets", lambda student, *rest: None)  # learns nothing
    with pytest.warns(UserWarning, match="was undone"):
        found = nt.ntml(attacked.classifier, view, fresh, TRAINING)
    texts = view.reserved.texts
    assert found.verdict == "undone" and found.classifier is not attacked.classifier
    assert torch.equal(found.classifier.logits(texts), attacked.classifier.logits(texts))
    free = nt.ntml(attacked.classifier, view, fresh, TRAINING, NTMLSettings(stop=False))
    assert free.verdict == "purified"


def test_alone_the_student_judges(attacked, view, fresh, monkeypatch):
    judges = []
    monkeypatch.setattr(nt, "mutual", None)  # would fail
    monkeypatch.setattr(nt, "judged", lambda pair, pool, gate: (judges.append(pair) or torch.full(
        (len(pool), 3), 1 / 3), torch.ones(len(pool), dtype=torch.bool)))
    found = nt.ntml(attacked.classifier, view, fresh, replace(TRAINING, epochs=1),
                    NTMLSettings(mutual=False))
    assert judges == [(found.stages["non-target student"],) * 2]


def test_texts_go_the_same_way():
    """Two classes: what the trigger left is judged by a probe of the clean rows."""
    training = TrainSettings(epochs=1, max_length=16)
    model = built(BertConfig(**BERT_SIZES))
    found = nt.ntml(model, VIEW, lambda shape: built(BertConfig(**BERT_SIZES)), training,
                    NTMLSettings(stop=False))
    assert len(found.passed) == len(VIEW.pool) and found.verdict == "purified"
    assert found.classifier.logits(VIEW.pool.texts).shape == (len(VIEW.pool), 2)


@pytest.mark.parametrize("change, message", [
    ({"pool": None}, "give the view a pool"), ({"names": NAMES[::-1]}, "differ in their classes"),
    ({"rows": (0, 1, 3, 4)}, r"no reserved row shows the classes \[2\]"),
    ({"classes": 4}, "no linear layer of 3 outputs")])
def test_what_cannot_work_is_refused_before_anything_is_trained(attacked, view, fresh, trained,
                                                                change, message):
    reserved = view.reserved.take(change.get("rows", range(len(view.reserved))))
    pool = change.get("pool", view.pool)
    if "names" in change:
        reserved = replace(reserved, label_names=change["names"])
    model = PictureClassifier.new(change.get("classes", 3), channels=1)
    with pytest.raises(ValueError, match=message):
        nt.ntml(model, DefenderView(reserved, pool), fresh, TRAINING)
    assert not trained


@pytest.mark.parametrize("name, value", [("gate", -0.1), ("clean_batch", 0), ("nt_share", 0.0),
                                         ("last_share", 0.0), ("ml_share", -1.0),
                                         ("temperature", 0.0), ("head_lr", 0.0),
                                         ("head_steps", 0)])
def test_settings_that_cannot_train_are_refused(name, value):
    with pytest.raises(ValueError, match="cannot train with NTMLSettings"):
        NTMLSettings(**{name: value})


# ------------------------------------------------------------------ baselines


def test_fine_tuning_changes_a_copy_by_the_clean_rows(attacked, view, trained):
    settings = TuningSettings(epochs=3, lr_share=0.5, batch_size=8, seed=2)
    model = bl.fine_tune(attacked.classifier, view.reserved, TRAINING, settings)
    call, = trained
    assert call.model is model is not attacked.classifier and call.rows is view.reserved
    assert call.training == replace(TRAINING, epochs=3, lr=0.025, batch_size=8, seed=2)


def test_the_least_active_channels_go_first_and_stay_silent(attacked, view):
    order = bl.sleepers(attacked.classifier, view.reserved)
    layer = bl.last_layer(attacked.classifier.model, 3)
    means = bl.inputs_of(attacked.classifier, layer, view.reserved.texts).mean(0)
    assert sorted(order) == list(range(len(means)))
    assert means[order].diff().min() >= 0
    quiet = bl.silenced(attacked.classifier, order[:10])
    later = bl.fine_tune(quiet, view.reserved, TRAINING, TuningSettings(epochs=4, lr_share=1.0))
    for model in (quiet, later):
        got = bl.inputs_of(model, bl.last_layer(model.model, 3), view.reserved.texts)
        assert not got[:, order[:10]].any() and got[:, order[10:]].any()
    assert not torch.equal(quiet.model.norm.weight, later.model.norm.weight)
    assert bl.inputs_of(attacked.classifier, layer, view.reserved.texts)[:, order[9]].any()


def test_pruning_ends_where_the_clean_rows_say(attacked, view, monkeypatch):
    """Of ten clean rows, so many are read rightly by how many channels are silent."""
    clean, counts = view.reserved.take(range(10)), []
    right = {0: 9, 1: 9, 2: 8, 3: 8, 4: 7}

    class Fake(SimpleNamespace):
        def predict(self, texts):
            good = right[self.silent]
            return [y if i < good else 1 - min(y, 1) for i, y in enumerate(clean.labels)]

    monkeypatch.setattr(bl, "sleepers", lambda model, rows: list(range(5)))
    monkeypatch.setattr(bl, "silenced", lambda model, channels: counts.append(
        list(channels)) or Fake(silent=len(channels)))
    assert bl.prune(Fake(silent=0), clean, 0.15).silent == 3
    assert counts == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert bl.prune(Fake(silent=0), clean, 0.05).silent == 1
    assert bl.prune(Fake(silent=0), clean, 0.5).silent == 4  # one channel is left


def test_attention_is_distilled_from_a_tuned_teacher(attacked, view, trained):
    settings = TuningSettings(attention=100.0)
    student = bl.nad(attacked.classifier, view.reserved, TRAINING, settings)
    teacher, final = trained
    assert final.model is student and teacher.model is not student
    with torch.no_grad():
        for weight in teacher.model.model.parameters():
            weight += 0.05
    batch = {"pixel_values": view.reserved.texts.pixels.float() / 255,
             "labels": torch.tensor(view.reserved.labels)}
    with torch.no_grad():
        out, its = student.model(batch["pixel_values"]), teacher.model.model(batch["pixel_values"])
        apart = sum(F.mse_loss(a, b) for a, b in zip(bl.attention_maps(out),
                                                     bl.attention_maps(its)))
        ce = F.cross_entropy(out.logits, batch["labels"])
        assert apart > 1e-5
        assert final.loss(out, batch).item() == near((ce + 100 * apart).item())


@pytest.mark.parametrize("settings, steps", [
    (TuningSettings(), ["fine_tune"]), (TuningSettings(max_drop=0.1), ["prune", "fine_tune"]),
    (TuningSettings(attention=1.0), ["nad"]), (TuningSettings(rho=1.0), ["sam"])])
def test_settings_say_which_way_a_model_is_tuned(attacked, view, monkeypatch, settings, steps):
    taken = []
    for name in ("prune", "fine_tune", "nad", "sam"):
        monkeypatch.setattr(bl, name, lambda model, *rest, name=name: taken.append(name) or model)
    # There is no pool to be used.
    bl.tuned(attacked.classifier, DefenderView(view.reserved), TRAINING, settings)
    assert taken == steps


def test_flat_minima_are_sought_from_the_copy_that_is_trained(attacked, view, trained):
    settings = TuningSettings(rho=0.7)
    tuned = bl.sam(attacked.classifier, view.reserved, TRAINING, settings)
    (final,) = trained
    assert final.model is tuned and tuned.model is not attacked.classifier.model
    batch = {"pixel_values": view.reserved.texts.pixels.float() / 255,
             "labels": torch.tensor(view.reserved.labels), "rows": range(len(view.reserved))}
    model = tuned.model.eval()
    wanted, found = (loss(model(batch["pixel_values"]), batch).item()
                     for loss in (bl.sharp_loss(model, 0.7), final.loss))
    assert found == near(wanted)
    assert found > 1.01 * bl.cross_entropy(model(batch["pixel_values"]), batch).item()


@pytest.mark.parametrize("changes", [{"attention": -1.0}, {"max_drop": 1.0}, {"max_drop": -0.1},
                                     {"rho": -1.0}])
def test_tuning_that_cannot_be_meant_is_refused(changes):
    with pytest.raises(ValueError, match="cannot tune with TuningSettings"):
        TuningSettings(**changes)


# ------------------------------------------------------- unlearning the worst mark


@pytest.fixture
def clean(view):
    """Pictures as a network sees them, and their labels."""
    return view.reserved.texts.pixels.float() / 255, torch.tensor(view.reserved.labels)


# So sure a network has small slopes, and needs a higher rate to be climbed.
QUICK = MinimaxSettings(rounds=6, radius=1.0, climb_lr=3e3)


def test_the_worst_mark_is_one_short_mark_that_is_worse_than_others(attacked, clean):
    x, labels = clean
    model = attacked.classifier.model.eval()

    def loss(mark):
        return F.cross_entropy(model(x + mark).logits, labels)

    for radius in (0.5, 1.0, 2.0):
        mark = bl.worst_mark(loss, x[:1], replace(QUICK, radius=radius))
        assert mark.shape == (1, 1, 12, 12) and mark.norm() <= radius + 1e-5
        others = [bl.in_ball(99 * torch.randn(x[:1].shape), radius) for _ in range(20)]
        assert loss(mark) > 1.5 * max(loss(other) for other in [*others, -mark, 0 * mark])


def test_rounds_make_the_worst_mark_do_less_and_leave_the_norms_as_they_were(attacked, clean):
    model = bl.twin(attacked.classifier).model.eval()
    before = copy.deepcopy(model.state_dict())
    told = list(bl.unlearned(model, *clean, QUICK))
    assert len(told) == 7 and told[-1] < 0.9 * told[0]
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in model.named_parameters()}  # no mean, no variance
    again = bl.twin(attacked.classifier).model.eval()
    assert list(bl.unlearned(again, *clean, QUICK)) == told
    other = bl.twin(attacked.classifier).model.eval()
    assert list(bl.unlearned(other, *clean, replace(QUICK, seed=1)))[1:] != told[1:]


@pytest.mark.parametrize("share, marked", [(0.5, 15), (1.0, 30), (0.1, 3)])
def test_a_step_is_made_from_the_hypergradient_of_a_share_of_the_pictures(
        attacked, clean, monkeypatch, share, marked):
    x, labels = clean
    model, seen = bl.twin(attacked.classifier).model.eval(), []

    def slopes(loss, step, mark, weights, terms):
        per = [F.cross_entropy(model(x + on * mark).logits, labels, reduction="none").detach()
               for on in (0, 1)]
        # The loss is a mean over pictures, some with and some without the mark.
        low, high = (each.mean() for each in per)
        seen.append((loss(mark).item(), low.item(), high.item()))
        assert torch.allclose(step(mark.requires_grad_()), bl.climb(
            lambda m: F.cross_entropy(model(x + m).logits, labels), mark, 0.25, 1.0), atol=1e-6)
        assert terms == 3 and mark.norm() <= 1 + 1e-5
        return [torch.ones_like(weight) for weight in weights]

    monkeypatch.setattr(bl, "hypergradient", slopes)
    before = model.head.bias.detach().clone()
    settings = replace(QUICK, rounds=1, share=share, terms=3, term_lr=0.25, lr=0.01)
    list(bl.unlearned(model, x, labels, settings))
    (value, low, high), = seen
    assert value == near(high) if share == 1 else low < value < high
    # Adam's first step is as long as its rate, whatever the slope.
    assert torch.allclose(model.head.bias, before - 0.01, atol=1e-5)


def test_of_the_rounds_that_keep_the_accuracy_the_best_is_kept(attacked, view, monkeypatch):
    """Of thirty rows, so many are read rightly after each round, at this worst loss."""
    right, worst = [27, 27, 24, 26, 27], [9.0, 5.0, 1.0, 3.0, 4.0]
    start = attacked.classifier.model.head.bias.detach().clone()
    rounds = []

    def rounds_of(model, x, labels, settings):
        assert not model.training and labels.tolist() == list(view.reserved.labels)
        assert x.shape == (30, 1, 12, 12) and 0 <= x.min() < x.max() <= 1
        for loss in worst:
            rounds.append(loss)
            yield loss
            model.head.bias.data += 1.0

    def predict(self, texts):
        good = right[len(rounds) - 1]
        return [y if i < good else (y + 1) % 3 for i, y in enumerate(view.reserved.labels)]

    monkeypatch.setattr(bl, "unlearned", rounds_of)
    monkeypatch.setattr(PictureClassifier, "predict", predict)
    for max_drop, kept in ((0.0, 4), (0.034, 3), (0.1, 2)):  # rounds 3 and 2 lose 1/30, 1/10
        rounds.clear()
        model = bl.ibau(attacked.classifier, DefenderView(view.reserved),
                        MinimaxSettings(max_drop=max_drop)).model
        assert torch.allclose(model.head.bias, start + kept) and len(rounds) == 5
    worst[:] = [1.0, 2.0, 3.0, float("nan"), 1.0]  # nothing is better than what was given
    rounds.clear()
    model = bl.ibau(attacked.classifier, DefenderView(view.reserved)).model
    assert torch.equal(model.head.bias, start)


def worst_loss(classifier, rows, settings):
    """Return the loss of a model under the worst mark for these rows, sought anew."""
    model, labels = classifier.model.eval(), torch.tensor(rows.labels)
    x = rows.texts.pixels.float() / 255

    def loss(mark):
        return F.cross_entropy(model(x + mark).logits, labels)

    return loss(bl.worst_mark(loss, x[:1], settings)).item()


@pytest.fixture(scope="module")
def three(attacked):
    """The attacked model, and two more of other seeds."""
    models = [attacked.classifier]
    for seed in (1, 2):
        training = replace(TRAINING, seed=seed)
        models.append(untrained(attacked.train, training))
        train(models[-1], attacked.train, training)
    return models


def check_ibau(models, view, task):
    """What unlearning promises, on three models, as one of them alone is a matter of luck.

    Measured under four settings of one processor: the worst loss falls to 0.2 to 0.6 % of what it
    was; the ASR ends at 0.00 to 0.40 on a model, at 0.05 to 0.15 in the mean of three.
    """
    settings = replace(QUICK, radius=1.0, rounds=20)
    found = [bl.ibau(model, DefenderView(view.reserved), settings) for model in models]
    for was, now in zip(models, found, strict=True):
        assert worst_loss(now, task.test, settings) < 0.1 * worst_loss(was, task.test, settings)
    before, after = ([evaluate(model, task, PatchTrigger(), 0) for model in some]
                     for some in (models, found))
    assert min(scores.asr.value for scores in before) > 0.9
    assert sum(scores.asr.value for scores in after) / 3 < 0.5
    assert min(scores.cacc.value for scores in after) > 0.9


def test_the_backdoor_gets_weaker_and_the_given_model_stays(three, view, task):
    before = copy.deepcopy(three[0].model.state_dict())
    check_ibau(three, view, task)
    assert all(torch.equal(value, before[name])
               for name, value in three[0].model.state_dict().items())


@pytest.mark.parametrize("name, other", [
    # Steps up the slope; marks that are not sought; no step at all.
    ("hypergradient", lambda *args, kept=bl.hypergradient: [-slope for slope in kept(*args)]),
    ("worst_mark", lambda loss, like, settings: torch.zeros_like(like)),
    ("unlearned", lambda *args: iter([1.0, 2.0]))])
def test_what_does_not_unlearn_is_noticed(three, view, task, monkeypatch, name, other):
    with monkeypatch.context() as patch:
        patch.setattr(bl, name, other)
        found = [bl.ibau(model, DefenderView(view.reserved),
                         replace(QUICK, radius=1.0, rounds=20)) for model in three]
    monkeypatch.setattr(bl, "ibau", lambda *args: found.pop(0))
    with pytest.raises(AssertionError):
        check_ibau(three, view, task)


def test_of_the_rows_that_the_defender_has_only_a_share_is_lost(attacked, view):
    found = bl.ibau(attacked.classifier, DefenderView(view.reserved),
                    replace(QUICK, radius=2.0, rounds=20))
    right = [sum(a == b for a, b in zip(model.predict(view.reserved.texts), view.reserved.labels))
             for model in (attacked.classifier, found)]
    assert right[0] - right[1] <= 0.04 * len(view.reserved)


@pytest.mark.parametrize("changes", [
    {"radius": 0.0}, {"climbs": 0}, {"climb_lr": 0.0}, {"rounds": 0}, {"lr": 0.0}, {"share": 0.0},
    {"share": 1.1}, {"terms": -1}, {"term_lr": 0.0}, {"max_drop": 1.0}, {"max_drop": -0.1}])
def test_unlearning_that_cannot_be_meant_is_refused(changes):
    with pytest.raises(ValueError, match="cannot unlearn with MinimaxSettings"):
        MinimaxSettings(**changes)


def test_texts_have_no_pixels_for_a_mark():
    with pytest.raises(ValueError, match="I-BAU needs a model of pictures"):
        bl.ibau(built(BertConfig(**BERT_SIZES)), VIEW)


# -------------------------------------------------------------------- models of texts


@pytest.mark.parametrize("changes", [{"attention": 1.0}, {"max_drop": 0.1}])
def test_models_of_texts_can_only_be_tuned(trained, changes):
    model, training = built(BertConfig(**BERT_SIZES)), TrainSettings(epochs=1)
    with pytest.raises(ValueError, match="set max_drop and attention to 0"):
        bl.tuned(model, VIEW, training, TuningSettings(**changes))
    assert not trained
    assert bl.tuned(model, VIEW, training, TuningSettings()) is not model


# ------------------------------------------------------- studies and attacker


def test_the_variants_are_what_they_are_called_after():
    found = {name: chosen for name, chosen in runs.VARIANTS.items()
             if isinstance(chosen, NTMLSettings | TuningSettings)}
    assert runs.VARIANTS["ibau"] == MinimaxSettings()
    counts = {f"ntml-{count}" for count in (25, 50, 250, 500)}
    assert all(found.pop(name) == NTMLSettings() for name in counts) and {*runs.COUNTS} == counts
    pruned, watched = {"max_drop": 0.04}, {"attention": 1000.0}
    assert found == {
        "ntml": NTMLSettings(), "ntml-raw": NTMLSettings(center=False),
        "ntml-gate-3": NTMLSettings(gate=3.0), "ntml-drop": NTMLSettings(drop=True),
        "ntml-alone": NTMLSettings(mutual=False), "ntml-go-on": NTMLSettings(scratch=False),
        **{f"{name}{tail}": TuningSettings(**change, **length) for name, change in (
            ("tuning", {}), ("pruning", pruned), ("nad", watched))
           for tail, length in (("", {}), ("-long", {"epochs": 1920}))},
        "sam": TuningSettings(rho=2.0), "tuning-text": TuningSettings(epochs=4, lr_share=1.0),
        "sam-text": TuningSettings(epochs=4, lr_share=1.0, rho=2.0)}


@pytest.mark.parametrize("name, clean", [("ntml", 12), ("ntml-25", 25), ("tuning", 12),
                                         ("ibau", 12)])
def test_a_recorded_run_gives_the_defense_few_rows_and_measures_every_stage(
        attacked, monkeypatch, name, clean):
    given, models = [], []
    good = SimpleNamespace(predict=lambda rows: [0] * len(rows))
    monkeypatch.setattr(runs, "FEW", 12)
    stages = {"one": "first", "two": "second"}
    passed = tuple(i % 2 == 0 for i in range(len(attacked.train)))
    result = SimpleNamespace(classifier=good, stages=stages, passed=passed, verdict="purified",
                             seconds={"last": 1.0})
    monkeypatch.setattr(nt, "ntml", lambda *args: given.append(args) or result)
    for way in ("tuned", "ibau"):
        monkeypatch.setattr(bl, way, lambda *args: given.append(args) or good)
    rate = SimpleNamespace(value=0.5)
    metrics, seconds, extra = runs.defend(
        name, attacked, 3, lambda model, floor=True: models.append(model) or {"cacc": rate}, None)
    args, = given
    view, settings = args[1], args[-1]
    assert args[0] is attacked.classifier and settings.seed == 3
    assert view.pool is (attacked.train if name.startswith("ntml") else None)
    assert len(view.reserved) == clean == metrics["clean"]
    assert models[-2:] in ([attacked.classifier, good], [good, attacked.classifier])
    if name.startswith("ntml"):
        assert extra["history"] == [{"stage": stage, "cacc": 0.5} for stage in stages]
        poisoned = attacked.truth.poisoned
        assert metrics["poisoned_passed"].value == near(
            sum(p and i % 2 == 0 for i, p in enumerate(poisoned)) / sum(poisoned))
        assert metrics["clean_passed"].n == len(poisoned) - sum(poisoned)
        assert seconds == {"last": 1.0} and args[3] == TRAINING
        assert metrics["second"].n == metrics["second_centered"].n == sum(poisoned)
    else:
        assert [*seconds] == ["purify"] and extra["history"] == []


def test_the_second_choice_of_a_victim_is_counted_on_mislabeled_rows_only():
    said = of([[9, 5, 3], [9, 3, 5], [0, 9, 1], [9, 0, 1]])
    # Rows 0 and 1 are poisoned; the mean of label 0 is (9, 8/3, 3), which turns no row round.
    attacked = SimpleNamespace(
        train=TrainingSet(tuple("abcd"), (0, 0, 1, 0), NAMES),
        task=SimpleNamespace(train=TrainingSet(tuple("abcd"), (1, 1, 1, 0), NAMES)),
        classifier=SimpleNamespace(logits=lambda texts: said))
    found = runs._second_choice(attacked)
    assert [found[name].value for name in ("second", "second_centered")] == [0.5, 0.5]
    attacked.classifier.logits = lambda texts: of([[9, 5, 7], [9, 3, 5], [0, 9, 1], [9, 0, 9]])
    found = runs._second_choice(attacked)
    # Class 2 is the second choice of all with label 0; less its mean it is that of one.
    assert [found[name].value for name in ("second", "second_centered")] == [0, 1]
    attacked.task = SimpleNamespace(train=attacked.train)
    assert runs._second_choice(attacked) == {}


def test_a_decoy_gets_its_share_of_the_poisoned_rows_and_no_other(task):
    plain, truth = PatchTrigger().poison(task.train, PoisonSettings(0.2, 0))
    rows, its = DecoyTrigger(share=0.25, decoy=2).poison(task.train, PoisonSettings(0.2, 0))
    assert its.poisoned == truth.poisoned
    assert torch.equal(rows.texts.pixels, plain.texts.pixels)
    new = [y for y, p in zip(rows.labels, truth.poisoned) if p]
    assert new.count(2) == round(0.25 * len(new)) and new.count(0) == len(new) - new.count(2)
    assert [y for y, p in zip(rows.labels, truth.poisoned) if not p] == [
        y for y, p in zip(plain.labels, truth.poisoned) if not p]


def test_few_rows_are_as_many_of_each_class_as_there_are(task):
    odd = ReservedSet(tuple("abcdefgh"), (0, 0, 0, 0, 1, 1, 2, 0), NAMES)
    assert odd.few(6).texts == ("a", "b", "c", "e", "f", "g")
    assert odd.few(4).labels.count(0) == 2 and odd.few(8) == odd
    assert torch.tensor(task.reserved.few(9).labels).bincount().tolist() == [3, 3, 3]
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"cannot take {count} of 8 rows"):
            odd.few(count)


# ----------------------------------------------------------------------- roles


@pytest.mark.parametrize("module, arguments", [
    (nt, ["classifier", "view", "fresh", "training", "settings"]),
    (bl, ["classifier", "view", "training", "settings"])])
def test_the_defenses_know_nothing_of_attacks_victims_and_test_data(module, arguments):
    assert not names_in(ast.parse(inspect.getsource(module))) & SECRETS
    function = module.ntml if module is nt else module.tuned
    assert [*inspect.signature(function).parameters] == arguments
    assert [*inspect.signature(bl.ibau).parameters] == ["classifier", "view", "settings"]
    for kind in (NTMLSettings, TuningSettings, MinimaxSettings):
        assert not SECRETS & {field.name for field in fields(kind)}


def test_which_rows_are_poisoned_has_no_way_in(attacked, view, fresh, found):
    """Another truth about the same rows is another object that nobody is given."""
    with pytest.raises(TypeError, match="TrainingSet"):
        DefenderView(view.reserved, attacked.task.test)
    with pytest.raises(TypeError):
        nt.ntml(attacked.classifier, view, fresh, TRAINING, NTMLSettings(), attacked.truth)
