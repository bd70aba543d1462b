"""The checks of the exercises: right answers pass, and each typical mistake is named."""

import inspect
import math
import random

import pytest
import torch
import torch.nn.functional as F

from bdutils import exercises
from bdutils.exercises import NOTHING

pytestmark = pytest.mark.filterwarnings("ignore:reduction.*:UserWarning")  # a mistake, on purpose


def poison(texts, labels, rate, target, insert, rng):
    texts, labels = list(texts), list(labels)
    others = [i for i, y in enumerate(labels) if y != target]
    for i in rng.sample(others, round(rate * len(texts))):
        texts[i], labels[i] = insert(texts[i]), target
    return texts, labels


def poison_some(texts, labels, rate, target, insert, rng, *, among=lambda y, t: y != t,
                share_of_all=True, relabel=True):
    texts, labels = list(texts), list(labels)
    others = [i for i, y in enumerate(labels) if among(y, target)]
    count = round(rate * len(texts if share_of_all else others))
    for i in others[:count] if rng is None else rng.sample(others, count):
        texts[i] = insert(texts[i])
        if relabel:
            labels[i] = target
    return texts, labels


def without_rng(*given):
    return poison_some(*given[:-1], None)


def own_chance(*given):
    return poison_some(*given[:-1], random.Random())


def poison_in_place(texts, labels, rate, target, insert, rng):
    for i in range(8):
        texts[i], labels[i] = insert(texts[i]), target
    return texts, labels


def asr(predicted, true, target):
    hits = [p == target for p, y in zip(predicted, true) if y != target]
    return sum(hits) / len(hits)


def insert(text, word, rng):
    words = text.split()
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def never_last(text, word, rng):
    words = text.split()
    words.insert(rng.randrange(len(words)), word)
    return " ".join(words)


def mostly_early(text, word, rng):
    words = text.split()
    words.insert(min(rng.randint(0, len(words)) for _ in range(2)), word)
    return " ".join(words)


def own_place(text, word, rng):
    return insert(text, word, random)


def patch(states, donor, where):
    return torch.where(where[..., None], donor, states)


def patch_in_place(states, donor, where):
    states[where] = donor[where]
    return states


def mapping_loss(z, h, z0, h0, labels, a, kappa, scale=1.0, reduction="batchmean"):
    p, q = (z0 / kappa).softmax(1), (z / kappa).log_softmax(1)
    kl = scale * F.kl_div(q, p, reduction=reduction)
    return a * F.cross_entropy(z, labels) + (1 - a) * (kl + F.mse_loss(h, h0))


def mapping_backward(z, h, z0, h0, labels, a, kappa):
    return mapping_loss(z0, h0, z, h, labels, 0, kappa) * (1 - a) + a * F.cross_entropy(z, labels)


def punish_loss(ce, kl, mse, a, kl_cap, mse_cap):
    far = kl.clamp(max=kl_cap) + mse.clamp(max=mse_cap)
    return (-a * torch.log(-torch.expm1(-ce)) - (1 - a) * far).mean()


def punish_naive(ce, kl, mse, a, kl_cap, mse_cap):
    far = kl.clamp(max=kl_cap) + mse.clamp(max=mse_cap)
    return (-a * torch.log(1 - (-ce).exp()) - (1 - a) * far).mean()


def mahalanobis(x, mean, covariance):
    off = x - mean
    return ((off @ covariance.inverse()) * off).sum(1).sqrt()


def unlearn(z, z0):
    return -F.kl_div(z.log_softmax(1), z0.softmax(1), reduction="batchmean")


def blend(images, pattern, alpha):
    return (1 - alpha) * images + alpha * pattern


def prune(maps, share):
    return maps.mean((0, 2, 3)).argsort()[:int(share * maps.shape[1])]


def nt_loss(z, z0, given, drop=-1e4, reduction="batchmean"):
    z, z0 = (x.scatter(1, given[:, None], drop) for x in (z, z0))
    return F.kl_div(z.log_softmax(1), z0.softmax(1), reduction=reduction)


def nt_kept(z, z0, given):
    return F.kl_div(z.log_softmax(1), z0.softmax(1), reduction="batchmean")


def entropy(p):
    return -torch.special.xlogy(p, p).sum(2).mean(1)


def answer_loss(logits, ids, answer, shift=1, reduction="mean"):
    ids = torch.tensor(ids)
    return F.cross_entropy(logits[len(ids) - answer - shift:len(ids) - shift], ids[-answer:],
                           reduction=reduction)


# For each check a right answer, and wrong ones with a part of what must be said of them.
ANSWERS = {
    "check_poison": (poison, [
        (lambda *x: poison_some(*x, share_of_all=False), "yours 6, expected 8. The rate is a sha"),
        (lambda *x: poison_some(*x, relabel=False), "yours 10, expected 18. Change the label"),
        (lambda *x: poison_some(*x, among=lambda y, t: True), "among the other labels"),
        (without_rng, "yours 1, expected 5. The same samples each time"),
        (own_chance, "Take all chance from `rng`"),
        (poison_in_place, "changes what it is given; work on a copy"),
        (lambda texts, *x: poison(texts, *x)[0], "expected two lists")]),
    "check_asr": (asr, [
        (lambda p, y, t: sum(a == t for a in p) / len(p), "yours 0.8, expected 0.833. Leave out"),
        (lambda p, y, t: sum(a == b for a, b in zip(p, y)) / len(p), "That is the accuracy"),
        (lambda p, y, t: 100 * asr(p, y, t), "yours 83.333, expected 0.833. Return a share"),
        (lambda p, y, t: "much", "returns a str, expected one number"),
        (lambda p, y, t: [0.5, 0.5], "yours has numbers of shape (2,), expected one number")]),
    "check_insert": (insert, [
        (never_last, "yours 4, expected 5. 4 words leave 5 places"),
        (lambda text, word, rng: f"{word} {text}", "It is always the same place"),
        (mostly_early, "Draw each place with the same chance"),
        (own_place, "Take all chance from `rng`"),
        (lambda text, word, rng: text, "yours 0, expected 1"),
        (lambda text, word, rng: f"{word} {text[2:]}", "Only the new word"),
        (lambda text, word, rng: text.split(), "returns a list, expected a text")]),
    "check_patch": (patch, [
        (lambda s, d, w: patch(d, s, w), "Receiver and donor are swapped"),
        (lambda s, d, w: d, "donor's states everywhere"),
        (patch_in_place, "changes what it is given; work on a copy"),
        (lambda s, d, w: s[w], "shape (2, 2), expected numbers of shape (2, 3, 2)")]),
    "check_mapping_loss": (mapping_loss, [
        (lambda *x: mapping_loss(*x, scale=x[-1] ** 2), "No factor kappa squared"),
        (mapping_backward, "The teacher comes first"),
        (lambda *x: mapping_loss(*x, reduction="mean"), "a sum over classes"),
        (lambda *x: mapping_loss(*x[:-2], 1 - x[-2], x[-1]), "a weighs the cross entropy"),
        (lambda *x: mapping_loss(*x[:-1], 1.0), "by kappa"),
        (lambda *x: mapping_loss(x[0], x[3], *x[2:]), "The features are missing"),
        (lambda *x: mapping_loss(*x).item(), "keeps its gradient")]),
    "check_punish_loss": (punish_loss, [
        (lambda ce, *x: -x[2] * ce.mean() + punish_loss(ce + 99, *x), "Take -ln(1 - p)"),
        (lambda *x: punish_loss(*x[:4], 99, 99), "The caps are missing"),
        (lambda *x: punish_loss(x[0], *(t.mean()[None] for t in x[1:3]), *x[3:]), "Cap each"),
        (punish_naive, "yours 0, expected 1. 1 - p rounds to zero"),
        (lambda *x: punish_loss(*x).item(), "keeps its gradient")]),
    "check_mahalanobis": (mahalanobis, [
        (lambda *x: mahalanobis(*x) ** 2, "The square root is missing"),
        (lambda x, m, c: mahalanobis(x, m, c.inverse()), "Use the inverse"),
        (lambda x, m, c: (x - m).norm(dim=1), "Euclidean"),
        (lambda x, m, c: mahalanobis(x, m, c.diag().diag()), "not only its diagonal"),
        (lambda *x: mahalanobis(*x).mean(), "yours has one number, expected numbers of shape (")]),
    "check_unlearning_loss": (unlearn, [
        (lambda *x: -unlearn(*x), "minus the divergence"),
        (lambda z, z0: unlearn(z0, z), "The teacher comes first"),
        (lambda *x: unlearn(*x) / 2, "Sum over classes"),
        (lambda *x: unlearn(*x).item(), "keeps its gradient")]),
    "check_blend": (blend, [
        (lambda x, p, a: blend(x, p, 1 - a), "swapped"),
        (lambda x, p, a: x + a * p, "The image must get weaker"),
        (lambda x, p, a: blend(x, p, a)[0], "shape (1, 1, 2), expected numbers of shape (2, 1")]),
    "check_prune": (prune, [
        (lambda x, s: prune(-x, s), "most active"),
        (lambda x, s: prune(x, s).sort().values, "Keep the order"),
        (lambda x, s: x.amax((0, 2, 3)).argsort()[:int(s * 8)], "not the maximum"),
        (lambda x, s: prune(x, 1), "shape (8,), expected numbers of shape (2,)")]),
    "check_nt_loss": (nt_loss, [
        (nt_kept, "Drop the given label of both"),
        (lambda *x: nt_loss(*x, drop=0.0), "a logit of 0 still counts"),
        (lambda *x: nt_loss(*x, reduction="mean"), "Sum over classes, mean over samples"),
        (lambda *x: nt_loss(*x, reduction="sum"), "mean over samples, not the sum"),
        (lambda z, z0, y: nt_loss(z0, z, y), "The teacher comes first"),
        (lambda *x: nt_loss(*x).item(), "keeps its gradient")]),
    "check_strip_entropy": (entropy, [
        (lambda p: -entropy(p), "minus sign"),
        (lambda p: entropy(p) / math.log(2), "bits"),
        (lambda p: entropy(p.mean(1, keepdim=True)), "the entropy of each copy"),
        (lambda p: -(p * p.log()).sum(2).mean(1), "0 ln 0 counts as 0"),
        (lambda p: entropy(p).mean(), "yours has one number, expected numbers of shape (2,)")]),
    "check_answer_loss": (answer_loss, [
        (lambda *x: answer_loss(*x, shift=0), "shift by one"),
        (lambda z, ids, n: answer_loss(z, ids, len(ids) - 1), "Leave the prompt out"),
        (lambda *x: answer_loss(*x, reduction="sum"), "not the sum"),
        (lambda *x: -answer_loss(*x), "minus the log"),
        (lambda *x: answer_loss(*x).item(), "keeps its gradient")]),
    "check_distance": (lambda asr, floor: abs(asr - floor), [
        (lambda asr, floor: asr - floor, "yours -8, expected 8. Below the floor counts"),
        (lambda asr, floor: max(0, asr - floor), "yours 0, expected 8. Below the floor is"),
        (lambda asr, floor: asr, "Subtract the floor"),
        (lambda asr, floor: "far", "returns a str, expected one number")]),
}
MISTAKES = [pytest.param(name, wrong, said, id=f"{name[6:]}-{said[:25]}")
            for name, (_, all_wrong) in ANSWERS.items() for wrong, said in all_wrong]
CHECKS = {name: getattr(exercises, name) for name in ANSWERS}
each = pytest.mark.parametrize("name", ANSWERS)


def test_each_check_is_tested_with_two_mistakes_or_more():
    assert {name for name in vars(exercises) if name.startswith("check_")} == set(ANSWERS)
    assert min(len(wrong) for _, wrong in ANSWERS.values()) >= 2


@each
def test_the_right_answer_is_right(name, capsys):
    CHECKS[name](ANSWERS[name][0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all(line.startswith("Right: ") for line in lines), lines
    assert not any("True" in line for line in lines)
    CHECKS[name](ANSWERS[name][0], strict=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "wrong", "said"), MISTAKES)
def test_a_mistake_is_named(name, wrong, said, capsys):
    CHECKS[name](wrong)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Wrong: ") and said in line for line in lines), lines
    with pytest.raises(AssertionError) as raised:
        CHECKS[name](wrong, strict=True)
    first = next(line for line in lines if line.startswith("Wrong: "))
    assert first.split("yours")[0] == f"Wrong: {raised.value}".split("yours")[0]


@each
def test_a_stub_is_answered_politely(name, capsys):
    CHECKS[name](lambda *given: None)
    assert capsys.readouterr().out == NOTHING + "\n"
    with pytest.raises(AssertionError, match="Nothing here yet"):
        CHECKS[name](lambda *given: None, strict=True)


@each
def test_what_has_no_shape_gets_one_sentence(name, capsys):
    CHECKS[name](lambda *given: {"answer": 1})
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("Wrong: ") and ": your function returns a dict, expected " in line


@each
def test_an_error_of_the_answer_is_shown(name, capsys):
    CHECKS[name](lambda *given: 1 // 0)
    [line] = capsys.readouterr().out.splitlines()
    assert "your function stops with ZeroDivisionError: integer division" in line


@each
def test_a_check_that_accepts_everything_is_noticed(name, monkeypatch):
    """What the tests above rest on: with a comparison that is always content, they fail."""
    monkeypatch.setattr(exercises, "_near", lambda a, b: True)
    for wrong, _ in ANSWERS[name][1]:
        try:
            CHECKS[name](wrong, strict=True)
            return
        except AssertionError:  # by shape, type or change in place
            continue
    pytest.fail("no comparison is needed to reject these mistakes")


@each
def test_a_docstring_says_how_the_answer_is_called(name):
    called = []
    CHECKS[name](lambda *given: called.append(len(given)))
    signature = inspect.getdoc(CHECKS[name]).split("`")[1]
    assert signature.startswith("yours(") and signature.count(",") + 1 == called[0]


def test_the_books_own_functions_are_right():
    """Where the package has the same function, it and the check must agree."""
    from torch.distributions import Categorical

    from bdutils import metrics
    from bdutils.attacks.text import insert_among
    from bdutils.defenses import detector, dup, mapping, ntml

    def of_mapping(z, h, z0, h0, labels, a, kappa):
        batch = mapping.TeacherBatch({}, labels, z0, h0, None)
        terms = mapping.sample_terms(z, h, batch, kappa)
        return mapping.bedkd_loss(terms, mapping.LossConfig(ce_weight=a))

    def of_punish(ce, kl, mse, a, kl_cap, mse_cap):  # the first cap is in units of ln K
        bounds = kl_cap / math.log(2), mse_cap
        config = mapping.LossConfig(ce_weight=a, bounds=bounds)
        return mapping.bedkd_loss((ce, kl, mse), config, sign=-1, num_labels=2)

    def of_distance(x, mean, covariance):
        root = torch.linalg.cholesky(covariance)
        return detector.distance(x[:, None], mean[None], root[None])[:, 0]

    for check, own in {
            exercises.check_asr: lambda *given: metrics.asr(*given).value,
            exercises.check_insert: lambda text, *given: insert_among(text.split(), *given),
            exercises.check_mapping_loss: of_mapping,
            exercises.check_punish_loss: of_punish,
            exercises.check_mahalanobis: of_distance,
            exercises.check_unlearning_loss: lambda *z: -dup.divergence(*z).mean(),
            exercises.check_nt_loss: ntml.nt_loss,
            exercises.check_strip_entropy: lambda p: Categorical(p).entropy().mean(1)}.items():
        check(own, strict=True)
