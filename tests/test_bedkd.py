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
from fractions import Fraction
from functools import partial

import pytest
import torch
from helpers.checks import same
from torch import nn

from bdutils.defenses import bedkd as akd
from bdutils.defenses import mapping
from bdutils.defenses.bedkd import AUTHORS, BeDKDSettings, Reading, bedkd, finished, purify
from bdutils.defenses.mapping import (
    LossSettings,
    ModuleSettings,
    ScanSettings,
    Step,
    bedkd_loss,
    chance,
    flip,
    gap,
    prepare,
    row_terms,
    scan,
    split_reserved,
)
from bdutils.roles import DefenderView, ReservedSet, TrainingSet

# ---------------------------------------------------------------- the loss

# Two rows of K = 3 classes and T = 3 tokens of d = 2 features. The second row lies beyond
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
    rows = []
    for z, y, ce, kl, mse in zip(STUDENT, LABELS, *terms_by_hand(masked=True)):
        rows.append(sign * (WEIGHT * ce + (1 - WEIGHT) * (kl + mse)))
        if sign < 0 and bounded:
            unlikely = -math.log(1 - softmax(z)[y])
            far = min(kl, CAPS[0]) + min(mse, CAPS[1])
            rows[-1] = WEIGHT * unlikely - (1 - WEIGHT) * far
    return sum(rows) / 2


def check_loss(row_terms, bedkd_loss):
    """Compare both functions with plain arithmetic."""
    student, features = torch.tensor(STUDENT), torch.tensor(FEATURES)
    step = Step({}, torch.tensor(LABELS), torch.tensor(TEACHER), torch.tensor(THEIRS),
                torch.tensor(MASK))
    terms = row_terms(student, features, step, TAU)
    for found, wanted in zip(terms, terms_by_hand(masked=True)):
        assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    for sign in (1, -1):
        for bounds in (BOUNDS, None):
            found = bedkd_loss(terms, LossSettings(ce_weight=WEIGHT, bounds=bounds), sign, 3)
            assert found.item() == pytest.approx(loss_by_hand(sign, bounds), rel=1e-5)

    everything = terms_by_hand(masked=False)[2]
    whole = row_terms(student, features, step._replace(mask=None), TAU)[2]
    assert whole.tolist() == pytest.approx(everything, rel=1e-5)
    image = step._replace(mask=None, features=step.features.view(2, 1, 3, 2))
    pixels = row_terms(student, features.view(2, 1, 3, 2), image, TAU)[2]
    assert pixels.tolist() == pytest.approx(everything, rel=1e-5)

    # A bound acts on single rows: only the row beyond it loses the gradient of that term.
    trust = [[share / 2] * 2 for share in (WEIGHT, 1 - WEIGHT, 1 - WEIGHT)]
    odds = [p / (1 - p) for p in (softmax(z)[y] for z, y in zip(STUDENT, LABELS))]
    punish = [[-WEIGHT * odd / 2 for odd in odds], *[[-(1 - WEIGHT) / 2, 0.0]] * 2]
    for sign, wanted in ((1, trust), (-1, punish)):
        leaves = [t.detach().requires_grad_() for t in terms]
        bedkd_loss(leaves, LossSettings(ce_weight=WEIGHT, bounds=BOUNDS), sign, 3).backward()
        for leaf, gradient in zip(leaves, wanted):
            assert leaf.grad.tolist() == pytest.approx(gradient, rel=1e-5)


def test_the_example_has_a_row_on_each_side_of_every_bound():
    for (below, beyond), cap in zip(terms_by_hand(masked=True)[1:], CAPS):
        assert below < cap < beyond


def test_the_loss_is_what_plain_arithmetic_says():
    check_loss(row_terms, bedkd_loss)


def mutant(function, old, new):
    """Compile a function anew with a change in its text."""
    text = inspect.getsource(function)
    assert text.count(old) == 1, f"{function.__name__} has changed: adapt the mutation"
    space = dict(vars(mapping))
    exec(compile(text.replace(old, new), "<mutant>", "exec"), space)
    return space[function.__name__]


MUTATIONS = {
    "drop CE": (bedkd_loss, "a * ce + ", ""),
    "drop KL": (bedkd_loss, "(kl + mse)", "mse"),
    "drop MSE": (bedkd_loss, "(kl + mse)", "kl"),
    "drop CE in punish": (bedkd_loss, "a * unlikely - ", "-"),
    "drop KL in punish": (bedkd_loss, "kl.clamp(max=b[0] * math.log(num_labels)) + ", ""),
    "drop MSE in punish": (bedkd_loss, " + mse.clamp(max=b[1])", ""),
    "swap the weights": (bedkd_loss, "a * ce + (1 - a)", "(1 - a) * ce + a"),
    "swap the weights in punish": (bedkd_loss, "a * unlikely - (1 - a)", "(1 - a) * unlikely - a"),
    "wrong sign": (bedkd_loss, "return sign * ", "return -sign * "),
    "no sign": (bedkd_loss, "return sign * ", "return "),
    "wrong sign in punish": (bedkd_loss, "return (a * unlikely", "return -(a * unlikely"),
    "near in punish": (bedkd_loss, "unlikely - (1", "unlikely + (1"),
    "likelihood in punish": (bedkd_loss, "-torch.log(-torch.expm1(-(ce + 1e-12)))", "-ce"),
    "sum over the batch": (bedkd_loss, "(kl + mse)).mean()", "(kl + mse)).sum()"),
    "sum over the punished": (bedkd_loss, "far).mean()", "far).sum()"),
    "bounds in trust": (bedkd_loss, "sign > 0 or ", ""),
    "no bounds": (bedkd_loss, "b is None", "True"),
    "a bound of the batch's KL": (bedkd_loss, "kl.clamp(", "kl.mean().clamp("),
    "a bound of the batch's MSE": (bedkd_loss, "mse.clamp(", "mse.mean().clamp("),
    "a bound in nats": (bedkd_loss, "b[0] * math.log(num_labels)", "b[0]"),
    "a bound of the features in nats": (bedkd_loss, "b[1]", "b[1] * math.log(num_labels)"),
    "bounds for two classes": (bedkd_loss, "math.log(num_labels)", "math.log(2)"),
    "swap KL": (row_terms, "(teacher.exp() * (teacher - student))",
                "(student.exp() * (student - teacher))"),
    "KL without temperature": (row_terms, "log_softmax(logits / temperature",
                               "log_softmax(logits"),
    "factor tau^2": (row_terms, "(teacher - student)).sum(1)",
                     "(teacher - student)).sum(1) * temperature ** 2"),
    "temperature in CE": (row_terms, "cross_entropy(logits,",
                          "cross_entropy(logits / temperature,"),
    "ignore the mask": (row_terms, "if step.mask is None", "if True"),
    "mask, but divide by all": (row_terms, " / step.mask.sum(1)", " / step.mask.shape[1]"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_of_the_loss_is_noticed(name):
    function, old, new = MUTATIONS[name]
    pair = {"row_terms": row_terms, "bedkd_loss": bedkd_loss}
    pair[function.__name__] = mutant(function, old, new)
    with pytest.raises(AssertionError):
        check_loss(**pair)


def test_no_mutation_at_all_passes_the_same_check():
    # Otherwise an error of the machinery would look like a mutation that was noticed.
    check_loss(mutant(row_terms, "reduction", "reduction"),
               mutant(bedkd_loss, "ce, kl, mse", "ce, kl, mse"))


def push(margin):
    """Return the first punish step's pull at the gap of two logits, teacher and student equal."""
    logits = torch.tensor([[0.0, margin]], requires_grad=True)
    step = Step({}, torch.tensor([1]), logits.detach(), torch.zeros(1, 1), None)
    bedkd_loss(row_terms(logits, torch.zeros(1, 1), step, TAU), LossSettings(), -1).backward()
    assert logits.grad.isfinite().all()
    return logits.grad[0, 1].item()


def test_punishing_is_steep_where_the_model_is_sure_and_flat_where_it_is_not():
    pushes = [push(margin) for margin in (-20.0, -5.0, 0.0, 5.0, 10.0)]
    share = LossSettings().ce_weight
    assert pushes == pytest.approx([share * p for p in (2e-9, 0.0067, 0.5, 0.9933, 1.0)],
                                   rel=0.01, abs=1e-8)


def test_the_surest_rows_are_punished_too():
    """Float32 rounds 1 - p to a few digits there, hence the tolerance."""
    assert push(15.0) == pytest.approx(LossSettings().ce_weight, rel=0.3)


@pytest.mark.parametrize("tau, classes, kept, change", [
    (1.0, 2, 0.70, 0.30), (1.5, 2, 0.63, 0.37), (2.5, 2, 0.455, 0.545), (1.5, 4, 0.63, 0.185)])
def test_the_module_stops_halfway(tau, classes, kept, change):
    # A teacher with 99.99 % for class 0, the label says class 1, features are equal. (At a
    # temperature of 2.5 the surer teachers count: without limit it would be 0.476.)
    teacher = torch.zeros(1, classes, dtype=torch.float64)
    teacher[0, 0] = 9.0
    step = Step({}, torch.tensor([1]), teacher, torch.zeros(1, 1), None)
    logits = torch.zeros_like(teacher).requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10,
                               tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = bedkd_loss(row_terms(logits, step.features, step, tau), LossSettings())
        loss.backward()
        return loss

    solver.step(closure)
    assert logits.detach().softmax(1)[0, 0].item() == pytest.approx(kept, abs=0.006)
    assert gap(teacher, logits.detach(), mean=True).item() == pytest.approx(change, abs=0.006)


# ------------------------------------------------- batches, rows and labels


def rows_of(role, labels, names=("negative", "positive"), tag="row"):
    return role(tuple(f"{tag} {i}" for i in range(len(labels))), tuple(labels), names)


@pytest.mark.parametrize("k", [2, 4])
def test_flip_goes_round(k):
    examples = rows_of(ReservedSet, [*range(k), 0], tuple("abcd"[:k]))
    assert flip(examples).labels == (*range(1, k), 0, 1)
    assert flip(examples).texts == examples.texts
    again = examples
    for _ in range(k):
        again = flip(again)
    assert again == examples


def test_reserved_rows_are_dealt_out_once_and_evenly():
    reserved = rows_of(ReservedSet, [0] * 40 + [1] * 20)
    parts = split_reserved(reserved, ModuleSettings())
    assert [Counter(part.labels) for part in parts] == [
        {0: 8, 1: 4}, {0: 24, 1: 12}, {0: 8, 1: 4}]
    dealt = [row for part in parts for row in zip(part.texts, part.labels)]
    assert sorted(dealt) == sorted(zip(reserved.texts, reserved.labels))
    assert all(type(part) is ReservedSet for part in parts)
    assert split_reserved(reserved, ModuleSettings()) == parts
    assert split_reserved(reserved, ModuleSettings(seed=1)) != parts
    assert split_reserved(reserved, AUTHORS)[2] is None


@pytest.mark.parametrize("labels", [[0] * 40 + [1] * 2, [0] * 2 + [1] * 40])
def test_too_few_reserved_rows_are_refused(labels):
    with pytest.raises(ValueError, match="2 reserved rows of class . cannot be dealt out"):
        split_reserved(rows_of(ReservedSet, labels), ModuleSettings())


def test_rounding_loses_no_row():
    """Rounded one by one, three rows would be dealt as 1 + 2 + 1."""
    parts = split_reserved(rows_of(ReservedSet, [0] * 40 + [1] * 3), ModuleSettings())
    assert [part.labels.count(1) for part in parts] == [1, 1, 1]


def test_shares_beyond_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1 at most"):
        split_reserved(rows_of(ReservedSet, [0, 1] * 40), ModuleSettings(shares=(0.5, 0.5, 0.5)))


def test_every_row_is_prepared_once_with_the_teachers_answer(tiny, toy_task):
    rows, settings = toy_task.reserved, LossSettings(batch_size=6)
    steps = prepare(tiny, rows, settings)
    assert [len(step.labels) for step in steps] == [6, 6, 6, 2]
    found = [(tuple(ids[mask.bool()].tolist()), label) for step in steps for ids, mask, label
             in zip(step.inputs["input_ids"], step.mask, step.labels.tolist())]
    assert sorted(found) == sorted(zip(map(tuple, tiny.encode(rows.texts)), rows.labels))
    for step in steps:
        with torch.no_grad():
            out = tiny.model(**step.inputs, output_hidden_states=True)
        assert torch.equal(step.logits, out.logits) and not step.logits.requires_grad
        assert torch.equal(step.features, out.hidden_states[-1])
    again = prepare(tiny, rows, replace(settings, masked=False))
    assert [s.labels.tolist() for s in again] == [s.labels.tolist() for s in steps]
    assert all(step.mask is None for step in again)


def test_padding_does_not_move_the_masked_distance(tiny):
    texts = ("dull .", "a long , warm and funny film that never loses its way")
    rows = ReservedSet(texts, (0, 1), ("negative", "positive"))
    student = copy.deepcopy(tiny.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn_like(weight)
        together = prepare(tiny, rows, LossSettings())[0]
        alone = [prepare(tiny, rows.take([i]), LossSettings())[0] for i in range(2)]
        distance = row_terms(*mapping.read_text(student, together.inputs), together, 1.0)[2]
        single = [row_terms(*mapping.read_text(student, s.inputs), s, 1.0)[2].item()
                  for s in alone]
    assert sorted(distance.tolist()) == pytest.approx(sorted(single), rel=1e-4)
    assert min(single) > 1e-4


def test_learning_says_how_many_classes_there_are_and_returns_mean_terms(monkeypatch):
    torch.manual_seed(0)
    student, seen = nn.Linear(3, 4), []
    steps = [Step({"x": torch.randn(2, 3)}, torch.tensor([0, 3]), torch.randn(2, 4),
                  torch.randn(2, 1, 4), None) for _ in range(2)]
    with torch.no_grad():
        each = [row_terms(*read_linear(student, step.inputs), step, 2.5) for step in steps]
    wanted = [sum(terms[i].mean().item() for terms in each) / 2 for i in range(3)]

    def loss(terms, settings, sign, num_labels):
        seen.append((sign, num_labels))
        return bedkd_loss(terms, settings, sign, num_labels)

    monkeypatch.setattr(mapping, "bedkd_loss", loss)
    still = mapping.adam(student, 0.0)
    means = mapping.learn(student, steps, still, LossSettings(), 2.5, -1, read_linear)
    assert means.tolist() == pytest.approx(wanted, rel=1e-5)
    assert seen == [(-1, 4)] * 2 and not student.training
    assert mapping.learn(student, [], still, LossSettings(), 2.5).tolist() == [0.0] * 3


@pytest.mark.parametrize("sign", [1, -1])
def test_learning_goes_near_or_away(linear, sign):
    student, steps = copy.deepcopy(linear[0]), linear[1]
    settings = LossSettings(ce_weight=0.5, bounds=None)
    optimizer = mapping.adam(student, 0.01)
    first = mapping.learn(student, steps, optimizer, settings, 1.0, sign, read_linear)
    for _ in range(5):
        last = mapping.learn(student, steps, optimizer, settings, 1.0, sign, read_linear)
    assert sign * (last.sum() - first.sum()) < 0


def test_the_module_is_a_repeatable_copy(tiny, toy_task):
    settings = ModuleSettings(dmm_epochs=2, batch_size=8, lr=1e-3)
    before = copy.deepcopy(tiny.model.state_dict())
    steps = prepare(tiny, flip(toy_task.reserved), settings)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two = (mapping.mapping_module(tiny.model, steps, settings) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state()) and not one.training
    assert same(one.state_dict(), two.state_dict()) and same(before, tiny.model.state_dict())
    assert not same(before, one.state_dict())


def test_the_module_has_a_temperature_and_epochs_of_its_own(linear, monkeypatch):
    passes = []
    monkeypatch.setattr(mapping, "learn", lambda model, steps, optimizer, settings, temperature,
                        sign=1, read=None: passes.append((temperature, sign, len(steps))))
    mapping.mapping_module(linear[0], linear[1], BeDKDSettings(dmm_epochs=3), read_linear)
    assert passes == [(1.5, 1, 2)] * 3


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


def tail(n, hits, p):
    return sum(math.comb(n, k) * p**k * (1 - p)**(n - k) for k in range(hits, n + 1))


@pytest.mark.parametrize("labels, everyone, wanted", [
    ([1] * 10, [0, 1] * 50, 2 * 0.5**10),
    ([0] * 10, [0, 1] * 50, 2 * 0.5**10),
    ([0, 1] * 5, [0, 1] * 50, 1.0),
    ([1] * 3, [0, 1, 1, 1] * 9, 2 * 0.75**3),
    ([2] * 4, [0, 1, 2, 3] * 9, 4 * 0.25**4),
    ([1] * 5, [1] * 50, 1.0),  # one class only: nothing is strange
    ([], [0, 1] * 50, 1.0),
    ([0, 1] * 2500, [0, 1] * 2500, 1.0),
    ([1] * 5000, [0, 1] * 2500, 0.0),
    ([1] * 2600 + [0] * 2400, [0, 1] * 2500, float(2 * tail(5000, 2600, Fraction(1, 2)))),
])
def test_chance_by_hand(labels, everyone, wanted):
    assert chance(labels, everyone) == pytest.approx(wanted, rel=1e-6, abs=1e-300)


class Table:
    """Stands for a classifier: fixed probabilities for each text."""

    def __init__(self, table):
        self.table = table

    def logits(self, texts):
        return torch.tensor([self.table[text] for text in texts]).log()


def stage(gaps, labels=None, guesses=None, tag="row"):
    """Return a pool, and two classifiers with these gaps and guesses on it."""
    labels = labels or [1] * len(gaps)
    guesses = guesses or labels
    before, after = {}, {}
    for i, (delta, guess) in enumerate(zip(gaps, guesses)):
        for table, top in ((before, 0.9), (after, 0.9 - delta)):
            table[f"{tag} {i}"] = (1 - top, top) if guess else (top, 1 - top)
    return rows_of(TrainingSet, labels, tag=tag), Table(before), Table(after)


IN_FILE_ORDER = ScanSettings(threshold=0.1, shuffled=False)


def test_the_scan_flags_small_gaps_and_keeps_what_the_teacher_believes():
    pool, teacher, module = stage([0.0, 0.4, 0.05, 0.3, 0.02, 0.09], labels=[1, 1, 0, 0, 0, 1],
                                  guesses=[1, 1, 1, 0, 0, 1])
    found = scan(teacher, module, pool, None, IN_FILE_ORDER)
    assert found.rows == (0, 4, 5)  # row 2 is flagged, but the teacher says 1
    assert (found.flagged, found.scanned, found.threshold) == (4, 6, 0.1)
    assert len(found.held_out_gaps) == 0
    assert found.chance == chance([1, 0, 0, 1], pool.labels)


def test_the_scan_stops_at_its_cap():
    pool, teacher, module = stage([0.0, 0.4] * 100, guesses=[1, 1, 0, 0] * 50)
    found = scan(teacher, module, pool, None, replace(IN_FILE_ORDER, scan_cap=50))
    assert found.rows == tuple(range(0, 100, 4))  # the cap counts before the teacher is asked
    assert (found.flagged, found.scanned) == (50, 99)  # not one row further
    whole = scan(teacher, module, pool, None, replace(IN_FILE_ORDER, scan_cap=101))
    assert (whole.flagged, whole.scanned) == (100, 200)


def test_the_evidence_is_of_flagged_rows_among_scanned_rows():
    labels = [1, 0] * 10 + [1] * 100
    pool, teacher, module = stage([0.0, 0.4] * 60, labels=labels, guesses=[1, 1, 0, 0] * 30)
    found = scan(teacher, module, pool, None, replace(IN_FILE_ORDER, scan_cap=10))
    assert found.scanned == 19 and len(found.rows) == 5
    assert found.chance == chance([1] * 10, labels[:19]) < 0.01 < chance([1] * 10, labels)


def test_the_scan_goes_through_the_file_or_at_random():
    pool, teacher, module = stage([0.0] * 100)
    cap = replace(IN_FILE_ORDER, scan_cap=20)
    assert scan(teacher, module, pool, None, cap).rows == tuple(range(20))
    rows = [scan(teacher, module, pool, None, replace(cap, shuffled=True, seed=seed)).rows
            for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and len(set(rows[0])) == 20
    assert rows[0] != tuple(sorted(rows[0])) and max(rows[0]) > 50


def test_the_threshold_itself_is_not_below_the_threshold():
    pool, teacher, module = stage([0.25, 0.5, 0.125])
    edge = gap(teacher.logits(pool.texts), module.logits(pool.texts))[0].item()
    assert scan(teacher, module, pool, None,
                replace(IN_FILE_ORDER, threshold=edge)).rows == (2,)
    assert scan(teacher, module, pool, None, replace(
        IN_FILE_ORDER, threshold=math.nextafter(edge, 1))).rows == (0, 2)


@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_the_threshold_is_a_quantile_of_held_out_gaps(fpr):
    gaps = [0.2 + 0.005 * i for i in range(101)]
    random.Random(0).shuffle(gaps)
    held, one, two = stage(gaps, tag="clean")
    held = ReservedSet(held.texts, held.labels, held.label_names)
    pool, teacher, module = stage([0.01, 0.21, 0.35, 0.5])
    teacher.table |= one.table
    module.table |= two.table
    found = scan(teacher, module, pool, held,
                 ScanSettings(threshold=None, fpr=fpr, shuffled=False))
    assert found.threshold == pytest.approx(0.2 + 0.5 * fpr, abs=1e-5)
    assert found.held_out_gaps.tolist() == pytest.approx(gaps, abs=1e-5)
    assert sum(g < found.threshold for g in found.held_out_gaps.tolist()) == 100 * fpr
    assert found.rows == tuple(i for i, g in enumerate([0.01, 0.21, 0.35, 0.5])
                               if g < 0.2 + 0.5 * fpr)


def test_a_threshold_needs_a_number_or_held_out_rows():
    pool, teacher, module = stage([0.0])
    with pytest.raises(ValueError, match="needs held-out rows: give threshold"):
        scan(teacher, module, pool, None, ScanSettings())


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_the_scan_does_not_depend_on_batches(size, monkeypatch):
    rng = random.Random(0)
    gaps = [rng.random() * 0.5 for _ in range(150)]
    pool, teacher, module = stage(gaps, labels=[rng.randrange(2) for _ in gaps],
                                  guesses=[rng.randrange(2) for _ in gaps])
    settings = replace(IN_FILE_ORDER, shuffled=True, scan_cap=20)
    usual = scan(teacher, module, pool, None, settings)
    monkeypatch.setattr(mapping, "_search", partial(mapping._search, size=size))
    found = scan(teacher, module, pool, None, settings)
    assert found._replace(held_out_gaps=None) == usual._replace(held_out_gaps=None)


# ------------------------------------------------- adversarial distillation


@pytest.mark.parametrize("seen, settle, done", [
    ([(1.0, 0.2), (0.6, 0.2)], 4, False),
    ([(1.0, math.nan), (0.1, 0.2)], 4, True),  # rarer than elsewhere
    ([(1.0, math.nan), (0.2, 0.2)], 4, True),  # as often as elsewhere
    ([(1.0, math.nan), (0.3, 0.2)], 4, False),
    ([(0.4, 0.5), (0.25, 0.125)], 4, True),  # all bases count, and their mean is 0.3125
    ([(0.4, 0.0), (0.3, 0.5)], 4, False),  # ... 0.25
    ([(1.0, 0.0), *[(0.4, 0.0)] * 3], 4, False),
    ([(1.0, 0.0), *[(0.4, 0.0)] * 4], 4, True),  # has turned for good
    ([(1.0, 0.0), (0.4, 0.0), (0.9, 0.0), (0.4, 0.0)], 2, True),
    ([(1.0, 0.0), (0.4, 0.0)], 1, True),
    ([(1.0, 0.0), *[(0.5, 0.0)] * 3], 1, False),  # one half has not turned
    ([(math.nan, math.nan)] * 9, 1, False),  # nothing to observe
])
def test_the_stopping_rule(seen, settle, done):
    history = [Reading(i, rate, base) for i, (rate, base) in enumerate(seen)]
    assert finished(history, BeDKDSettings(settle=settle)) is done


def test_without_held_out_rows_only_the_turn_stops():
    history = [Reading(0, 1.0), *(Reading(i, 0.0) for i in range(1, 4))]
    assert not finished(history, BeDKDSettings(settle=4))
    assert finished([*history, Reading(4, 0.0)], BeDKDSettings(settle=4))


def read_linear(model, inputs):
    logits = model(inputs["x"])
    return logits, logits[:, None]


@pytest.fixture
def linear():
    """A teacher that is one matrix, two trust steps and one punish step."""
    torch.manual_seed(0)
    teacher = nn.Linear(3, 2)
    steps = []
    for label in (0, 1, 1):
        inputs = {"x": torch.randn(4, 3)}
        with torch.no_grad():
            steps.append(Step(inputs, torch.full((4,), label), *read_linear(teacher, inputs),
                              None))
    return teacher, steps[:2], steps[2:]


def distill(linear, readings, answer=None, **changes):
    """Run `purify` on scripted readings; return student, history and all that was watched."""
    script, seen = iter(readings), []

    def watch(model, reading):
        seen.append((reading.cycle, copy.deepcopy(model.state_dict())))
        return answer

    settings = BeDKDSettings(**{"lr": 0.01, "cycles": 4, "settle": 2, **changes})
    student, history = purify(*linear, lambda model: next(script), settings, read_linear, watch)
    assert [cycle for cycle, _ in seen] == [r.cycle for r in history[1:]]
    assert [r[1:4] for r in history] == list(readings)[:len(history)]
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
    student, history, seen = distill(linear, [(r, 0.1, 0.9) for r in rates], **changes)
    assert len(history) == len(rates)
    assert same(student, seen[-1]) and not same(student, before)
    assert same(linear[0].state_dict(), before)
    assert len(history[1].trust) == len(history[1].punish) == 3 and history[0].trust == ()


@pytest.mark.parametrize("answer", [True, False, "stop"])
def test_what_a_watcher_says_changes_nothing(linear, answer):
    readings = [(1.0, 0.1, 0.9)] * 5
    plain, _, _ = distill(linear, readings)
    student, history, seen = distill(linear, readings, answer)
    assert same(student, plain) and len(history) == 5 and len(seen) == 4


def test_distillation_leaves_the_global_generator_alone(linear):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    distill(linear, [(1.0, 0.1, 0.9)] * 5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_steps_are_dealt_to_cycles():
    rng = random.Random(0)
    whole = akd.cycle_of([1, 2, 3], 0, rng)
    assert list(itertools.islice(whole, 2)) == [[1, 2, 3]] * 2  # all, in their order
    parts = list(itertools.islice(akd.cycle_of(range(10), 4, rng), 5))
    assert [len(part) for part in parts] == [4] * 5
    passes = [sum(parts, [])[:10], sum(parts, [])[10:]]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1] != list(range(10))  # each pass has an order of its own
    assert len(next(akd.cycle_of([1, 2], 5, rng))) == 5  # more than there are: again
    assert list(itertools.islice(akd.cycle_of([], 3, rng), 2)) == [[], []]


def signs(monkeypatch, trust, punish, **changes):
    """Return what each cycle of `purify` hands to `learn`, in order."""
    calls = []

    def learn(student, steps, optimizer, settings, temperature, sign, read):
        calls.append((sign, list(steps), optimizer))
        assert temperature == settings.akd_temperature == 2.5
        return torch.full((3,), float(sign))

    monkeypatch.setattr(akd, "learn", learn)
    settings = BeDKDSettings(**{"cycles": 3, "stop": False, **changes})
    _, history = purify(nn.Linear(3, 2), trust, punish, lambda model: (1.0, 0.1, 0.9), settings)
    assert [r.trust for r in history[1:]] == [[1.0] * 3] * settings.cycles
    assert [r.punish for r in history[1:]] == [[-1.0] * 3] * settings.cycles
    return calls


def test_whole_passes_alternate(monkeypatch):
    calls = signs(monkeypatch, [1, 2, 3, 4, 5], [8, 9], trust_steps=0, punish_steps=0)
    assert [call[:2] for call in calls] == [(1, [1, 2, 3, 4, 5]), (-1, [8, 9])] * 3


def test_single_steps_alternate(monkeypatch):
    calls = signs(monkeypatch, list(range(7)), [8, 9], trust_steps=3, punish_steps=1, cycles=14)
    assert [(sign, len(steps)) for sign, steps, _ in calls] == [(1, 3), (-1, 1)] * 14
    for sign, steps, times in ((1, list(range(7)), 6), (-1, [8, 9], 7)):
        taken = [step for found, part, _ in calls if found == sign for step in part]
        assert Counter(taken) == dict.fromkeys(steps, times)  # no step is left out
    other = signs(monkeypatch, list(range(7)), [8, 9], trust_steps=3, cycles=14, seed=1)
    assert [call[:2] for call in other] != [call[:2] for call in calls]


def test_nothing_to_punish(monkeypatch):
    calls = signs(monkeypatch, [1, 2], [], trust_steps=2)
    assert [(sign, sorted(steps)) for sign, steps, _ in calls if steps] == [(1, [1, 2])] * 3


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_one_optimizer_or_two(monkeypatch, rate):
    calls = signs(monkeypatch, [1], [2], punish_lr=rate, lr=0.25)
    near, far = ({id(o): o for sign, _, o in calls if sign == s} for s in (1, -1))
    assert len(near) == len(far) == 1 and (near.keys() == far.keys()) is (rate == 0)
    assert [o.defaults["lr"] for o in (*near.values(), *far.values())] == [0.25, rate or 0.25]


@dataclass
class Words:
    """Stands for a classifier whose model maps a text to a class."""

    model: object

    def predict(self, texts):
        return [self.model(text) for text in texts]


POOL = TrainingSet(("a1", "b1", "c0", "d0"), (1, 1, 0, 0), ("no", "yes"))
HELD = ReservedSet(("e0", "f0", "g0", "h1", "i1"), (0, 0, 0, 1, 1), ("no", "yes"))


def test_the_defenders_readings_by_hand():
    answers = {"a1": 0, "b1": 0, "c0": 0, "d0": 1, "e0": 0, "f0": 1, "g0": 0, "h1": 0, "i1": 1}
    agreement, base, accuracy = akd.observer(Words(None), POOL, [0, 1, 2], HELD)(answers.get)
    assert agreement == pytest.approx(1 / 3)
    # Of the held-out 0 one in three is called 1, of the held-out 1 one in two is called 0.
    assert base == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert accuracy == pytest.approx(3 / 5)
    assert akd.base_rate([2, 2, 0, 1], [2, 0, 1, 1], [2]) == pytest.approx(1 / 3)


def test_the_defender_looks_only_where_something_can_be_decided():
    sure = dict.fromkeys((*POOL.texts, *HELD.texts), 1)
    most = akd.observer(Words(None), POOL, [0, 1, 2], HELD)(sure.get)
    assert most[0] == pytest.approx(2 / 3) and all(map(math.isnan, most[1:]))
    alone = akd.observer(Words(None), POOL, [2, 3], None)(sure.get)
    assert alone[0] == 0 and all(map(math.isnan, alone[1:]))
    nobody = akd.observer(Words(None), POOL, [], HELD)(sure.get)
    assert nobody[2] == pytest.approx(2 / 5) and all(map(math.isnan, nobody[:2]))
    assert all(map(math.isnan, akd.observer(Words(None), POOL, [], None)(sure.get)))


@pytest.mark.parametrize("wrong, changes, verdict", [
    (1, {}, "purified"), (2, {}, "purified"),  # 40 points are just allowed
    (3, {}, "undone"), (3, {"stop": False}, "purified")])
def test_too_much_harm_is_undone(wrong, changes, verdict):
    right = dict(zip(HELD.texts, HELD.labels))
    hurt = {**right, **{text: 1 - right[text] for text in HELD.texts[:wrong]}}
    settings = BeDKDSettings(max_loss=0.4, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert akd.verdict_on(Words(right.get), hurt.get, HELD, settings) == verdict
    assert [str(w.message)[:60] for w in caught] == (
        ["the defense took the held-out accuracy from 100.0% to 40.0% "]
        if verdict == "undone" else [])
    assert akd.verdict_on(Words(right.get), hurt.get, None, settings) == "purified"


# -------------------------------------------------------------- end to end

SMALL = BeDKDSettings(shares=(0.3, 0.4, 0.3), batch_size=4, lr=1e-3, punish_lr=1e-3,
                      dmm_epochs=1, cycles=2, threshold=1.1, scan_cap=12, punish_rows=3,
                      alpha=1.0, max_loss=1.0)


@pytest.fixture
def view(toy_task):
    return DefenderView(toy_task.reserved, toy_task.train)


def test_the_suspected_model_stays_as_it_is(tiny, view):
    before = copy.deepcopy(tiny.model.state_dict())
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bedkd(tiny, view, SMALL)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(before, tiny.model.state_dict()) and not tiny.model.training
    assert found.verdict == "purified" and not same(before, found.classifier.model.state_dict())
    assert found.classifier.model is not tiny.model and found.module.model is not tiny.model
    assert not same(before, found.module.model.state_dict())
    assert not found.classifier.model.training
    assert found.classifier.tokenizer is tiny.tokenizer and found.classifier.max_length == 24
    assert found.suspects.flagged == 12 and found.seconds.keys() == {"search", "purify"}
    assert [view.pool.labels[i] for i in found.suspects.rows] == tiny.predict(
        [view.pool.texts[i] for i in found.suspects.rows])
    assert 1 <= len(found.history) - 1 <= 2 and found.history[0].agreement == 1.0


def test_the_same_seed_gives_the_same_model_watched_or_not(tiny, view):
    seen = []

    def watch(model, reading):
        seen.append(reading.cycle)
        return "stop"

    one, two = bedkd(tiny, view, SMALL), bedkd(tiny, view, SMALL, watch)
    other = bedkd(tiny, view, replace(SMALL, seed=1))
    assert same(one.classifier.model.state_dict(), two.classifier.model.state_dict())
    assert not same(one.classifier.model.state_dict(), other.classifier.model.state_dict())
    assert repr(one.history) == repr(two.history) and seen == [r.cycle for r in two.history[1:]]


def test_only_the_first_suspects_are_punished_and_the_others_observed(tiny, view, monkeypatch):
    used = {}

    def purify(teacher, trust, punish, observe, *rest, **options):
        used.update(trust=trust, punish=punish)
        return teacher, []

    def observer(classifier, pool, rows, held_out):
        used.update(rows=list(rows), held_out=held_out)

    monkeypatch.setattr(akd, "purify", purify)
    monkeypatch.setattr(akd, "observer", observer)
    found = bedkd(tiny, view, SMALL).suspects.rows
    assert len(found) > 3 and used["rows"] == list(found[3:])
    ids = [tuple(row[mask.bool()].tolist()) for step in used["punish"]
           for row, mask in zip(step.inputs["input_ids"], step.mask)]
    assert sorted(ids) == sorted(map(tuple, tiny.encode([view.pool.texts[i]
                                                         for i in found[:3]])))
    assert sum(len(step.labels) for step in used["trust"]) == 8 and len(used["held_out"]) == 6
    bedkd(tiny, view, replace(SMALL, punish_rows=100))
    assert used["rows"] == list(found)  # none is left over, so the punished ones tell


def test_the_module_learns_the_first_part_with_flipped_labels(tiny, view, monkeypatch):
    used = []
    monkeypatch.setattr(akd, "mapping_module",
                        lambda model, steps, settings: used.extend(steps) or model)
    bedkd(tiny, view, SMALL)
    right = dict(zip(map(tuple, tiny.encode(view.reserved.texts)), view.reserved.labels))
    wrong = {tuple(row[mask.bool()].tolist()): label for step in used for row, mask, label
             in zip(step.inputs["input_ids"], step.mask, step.labels.tolist())}
    assert len(wrong) == 6 and all(right[ids] == 1 - label for ids, label in wrong.items())


@pytest.mark.parametrize("changes", [{"alpha": -1.0}, {"threshold": 0.0}])
def test_without_evidence_the_model_comes_back(tiny, view, changes):
    with pytest.warns(UserWarning, match="no evidence of a backdoor"):
        found = bedkd(tiny, view, replace(SMALL, **changes))
    assert same(found.classifier.model.state_dict(), tiny.model.state_dict())
    assert found.classifier.model is not tiny.model
    assert found.verdict == "no evidence" and found.history == ()
    assert found.module is not None and found.seconds.keys() == {"search", "purify"}


def test_harm_gives_the_suspected_model_back(tiny, view):
    with pytest.warns(UserWarning, match="held-out accuracy .* and was undone"):
        found = bedkd(tiny, view, replace(SMALL, max_loss=-2.0))
    assert same(found.classifier.model.state_dict(), tiny.model.state_dict())
    assert found.classifier.model is not tiny.model
    assert found.verdict == "undone" and len(found.history) > 1


@pytest.mark.parametrize("punish", ["random", "none"])
def test_the_comparisons_search_nothing(tiny, view, punish):
    pool = view.pool if punish == "random" else None
    found = bedkd(tiny, replace(view, pool=pool), replace(SMALL, punish=punish))
    assert found.suspects is None and found.module is None and found.verdict == "purified"
    assert not same(found.classifier.model.state_dict(), tiny.model.state_dict())
    assert math.isnan(found.history[0].agreement) is (punish == "none")


def test_a_defense_says_what_it_lacks(tiny, view):
    with pytest.raises(ValueError, match="give the view a pool"):
        bedkd(tiny, DefenderView(view.reserved), SMALL)
    with pytest.raises(ValueError, match="unknown punish 'flaged': use one of"):
        bedkd(tiny, view, replace(SMALL, punish="flaged"))
    three = replace(view.reserved, label_names=("negative", "neutral", "positive"))
    with pytest.raises(ValueError, match=r"number of classes: \[2, 3\]"):
        bedkd(tiny, DefenderView(three, view.pool), SMALL)
    renamed = replace(view.reserved, label_names=view.reserved.label_names[::-1])
    with pytest.raises(ValueError, match="differ in their classes"):
        bedkd(tiny, DefenderView(renamed, view.pool), SMALL)


def test_retraining_leaves_the_suspects_out(view):
    kept = akd.retrain_without(view.pool, (0, 5), lambda pool: pool)
    assert type(kept) is TrainingSet and len(kept) == 18
    assert not {view.pool.texts[0], view.pool.texts[5]} & set(kept.texts)


# -------------------------------------------------------------------- roles


def test_the_defense_is_given_a_model_and_a_view_and_nothing_else(tiny, toy_task):
    # Which rows are poisoned is neither in the view nor in the settings, so that any other
    # truth, such as a permuted one, gives the same result.
    assert list(inspect.signature(bedkd).parameters) == ["classifier", "view", "settings",
                                                         "watch"]
    assert {f for f in DefenderView.__dataclass_fields__} == {"reserved", "pool"}
    for parts in ((toy_task.test, toy_task.train), (toy_task.reserved, toy_task.test),
                  (toy_task.train, toy_task.train)):
        with pytest.raises(TypeError, match="must be a"):
            DefenderView(*parts)


def test_the_defense_knows_nothing_of_attacks_victims_and_test_data():
    for module in (mapping, akd):
        text = inspect.getsource(module)
        assert "TestSet" not in text
        words = {getattr(node, field) for node in ast.walk(ast.parse(text))
                 for field in ("id", "attr", "arg", "name")
                 if isinstance(getattr(node, field, None), str)}
        assert not words & {"test", "truth", "poisoned", "trigger", "target_label"}


def test_the_authors_values():
    wanted = {
        "ce_weight": 0.3, "lr": 3e-5, "batch_size": 16, "masked": False, "bounds": None,
        "seed": 42, "dmm_temperature": 1.5, "dmm_epochs": 20, "threshold": 0.1,
        "mean_gap": True, "shuffled": False, "scan_cap": 128, "punish_rows": 33, "alpha": 1.0,
        "akd_temperature": 2.5, "cycles": 50, "trust_steps": 0, "punish_steps": 0,
        "punish_lr": 0.0, "stop": False, "punish": "flagged"}
    assert {name: getattr(AUTHORS, name) for name in wanted} == wanted
    reserved = rows_of(ReservedSet, [0, 1] * 400)
    sizes = [Counter(part.labels) if part else None for part in split_reserved(reserved, AUTHORS)]
    assert sizes == [{0: 80, 1: 80}, {0: 320, 1: 320}, None]


def test_the_optimizer_is_plain_adam(linear):
    plain, short = mapping.adam(linear[0], 3e-5), mapping.adam(linear[0], 3e-5, beta=0.9)
    assert type(plain) is torch.optim.Adam and plain.defaults["weight_decay"] == 0
    assert [group["lr"] for group in plain.param_groups] == [3e-5]
    assert plain.defaults["betas"] == (0.9, 0.999) and short.defaults["betas"] == (0.9, 0.9)
