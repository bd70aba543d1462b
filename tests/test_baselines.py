"""FT, FP, NAD, FT-SAM and I-BAU: losses and gradients by hand, and what a copy is trained on."""

import copy
import inspect
from dataclasses import fields, replace
from functools import partial
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.checks import near
from helpers.images import thirds
from helpers.texts import SIZES, built, some_texts
from helpers.walls import SECRETS
from torch import nn
from torch.func import functional_call
from transformers import BertConfig

from bdutils.attacks.base import PoisonConfig
from bdutils.attacks.image import BadNetsPatch
from bdutils.defenses import fineprune, finetune, ft_sam, ibau, nad
from bdutils.defenses.base import Context, clone
from bdutils.defenses.fineprune import FinePruning, dormant_channels, prune, without_channels
from bdutils.defenses.finetune import FineTuning, TuneConfig, fine_tune
from bdutils.defenses.ft_sam import FTSAM, sharp_loss
from bdutils.defenses.ibau import (
    IBAU,
    ascent_step,
    hypergradient,
    in_ball,
    universal_perturbation,
    unlearn,
)
from bdutils.defenses.nad import NAD, attention_maps
from bdutils.evaluation import evaluate
from bdutils.models.adopt import last_layer, layer_inputs
from bdutils.models.image import ImageClassifier
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import ImageTrainConfig, TrainConfig, cross_entropy, train, untrained

TRAINING = ImageTrainConfig(epochs=8, batch_size=32, lr=0.05, pad=1, flip=False)
# A network that is so confident has small gradients, and needs a higher rate of the ascent.
QUICK = IBAU(rounds=6, radius=1.0, ascent_lr=3e3)


@pytest.fixture(scope="module")
def task():
    return Task("thirds", thirds(TrainSet, 480, 0), thirds(CleanSet, 30, 1),
                thirds(TestSet, 150, 2), "made here")


@pytest.fixture(scope="module")
def three(task):
    """Three attacked models, of three seeds."""
    poisoned, _ = BadNetsPatch().poison(task.train, PoisonConfig(0.2, 0))
    models = []
    for seed in range(3):
        training = replace(TRAINING, seed=seed)
        models.append(untrained(poisoned, training))
        train(models[-1], poisoned, training)
    return models


@pytest.fixture(scope="module")
def model(three):
    return three[0]


@pytest.fixture(scope="module")
def context(model, task):
    return Context(model, task.clean, training=TRAINING)


@pytest.fixture(scope="module")
def images(task):
    """Clean images as a network sees them, and their labels."""
    return task.clean.inputs.pixels.float() / 255, torch.tensor(task.clean.labels)


@pytest.fixture
def trained(monkeypatch):
    """Record what would be trained."""
    calls = []
    for module in (finetune, ft_sam):
        monkeypatch.setattr(module, "train", lambda model, samples, training, loss=None: (
            calls.append(SimpleNamespace(model=model, samples=samples, training=training,
                                         loss=loss))))
    return calls


def of(values):
    return torch.tensor(values, dtype=torch.float32)


def whole(text):
    return torch.tensor(list(map(int, text.split())))


def weights_of(classifier):
    return copy.deepcopy(classifier.model.state_dict())


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


# ------------------------------------------------------------- by plain arithmetic
# Each check takes the function, so that it can also be given functions that are wrong.


def check_attention_maps(attention_maps):
    maps = of([[[[3.0, 0.0]], [[0.0, 2.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]])  # (2, 2, 1, 2)
    got, = attention_maps(SimpleNamespace(hidden_states=(maps,)))
    # Squares 9 and 4, of length sqrt(97); then 2 and 2.
    assert got.tolist() == [near([9 / 97**0.5, 4 / 97**0.5]), near([0.5**0.5] * 2)]


def maps_by(reduce):
    """Return wrong maps, made from the stages (b, C, H, W) in another way."""
    return lambda outputs: [reduce(stage) for stage in outputs.hidden_states]


class TwoWeights(nn.Module):
    """Logits (w x + b, 0)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.tensor(value)) for value in (weight, bias))

    def forward(self, x):
        return SimpleNamespace(logits=torch.stack([self.weight * x + self.bias, 0 * x], 1))


def check_sharp_loss(sharp_loss):
    # The loss of class 1 is ln(1 + e^z) with z = w x + b: both gradients are positive, s and s
    # for x = 1. With T = diag(3, 1), T g is s (3, 1) and its length s sqrt(10), so that the
    # weights move by rho (9, 1) / sqrt(10), and z from 3 - 1 by 10 rho / sqrt(10).
    model, batch = TwoWeights(3.0, -1.0), {"x": torch.ones(2), "labels": whole("1 1"),
                                           "indices": [5, 7]}
    for rho in (0.0, 0.5):
        value = sharp_loss(model, rho)(model(batch["x"]), batch)
        moved = 2 + rho * 10**0.5
        assert value.item() == near(log(1 + exp(moved)))
        # Taken there, for a step here.
        gradients = torch.autograd.grad(value, [*model.parameters()])
        assert [gradient.item() for gradient in gradients] == near([1 / (1 + exp(-moved))] * 2)
    model.bias.requires_grad_(False)  # what is not trained does not move
    value = sharp_loss(model, 0.5)(model(batch["x"]), batch)
    assert value.item() == near(log(1 + exp(3 + 0.5 * 3 - 1)))
    assert [p.item() for p in model.parameters()] == [3, -1]


def loss_moved_by(move):
    """Return a wrong loss, whose weights are moved in another way."""
    def sharp(model, rho):
        def loss(outputs, batch):
            weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(cross_entropy(outputs, batch), list(weights.values()),
                                            create_graph=True)
            moved = move(dict(zip(weights, gradients)), weights)
            at = {name: p + rho * moved[name] for name, p in weights.items()}
            return cross_entropy(functional_call(model, at, (), {"x": batch["x"]}), batch)

        return loss

    return sharp


def without_sizes(gradients, weights):
    length = torch.stack([g.detach().square() for g in gradients.values()]).sum().sqrt()
    return {name: g.detach() / length for name, g in gradients.items()}


def sized(gradients, weights, *, live=False, root=True, twice=True):
    """Move as FT-SAM does; or let the sizes have a gradient, forget the root, or one factor."""
    sizes = {name: p.abs() if live else p.detach().abs() for name, p in weights.items()}
    scaled = {name: sizes[name] * g.detach() for name, g in gradients.items()}
    length = torch.stack([s.square() for s in scaled.values()]).sum()
    length = length.sqrt() if root else length
    return {name: (sizes[name] if twice else 1) * s / length for name, s in scaled.items()}


def height(theta):
    """H = -d1^2 - 2 d2^2 + 2 d1 t1 + 4 d2 t2 + t1 t2, largest at d = t."""
    return lambda d: (-d[0]**2 - 2 * d[1]**2 + 2 * d[0] * theta[0] + 4 * d[1] * theta[1]
                      + theta[0] * theta[1])


def check_in_ball(in_ball):
    assert in_ball(of([[3, 4]]), 10).tolist() == [[3, 4]]
    assert in_ball(of([[3, 4]]), 2.5).tolist() == [near([1.5, 2])]
    assert in_ball(of([[0, 0]]), 2.5).tolist() == [[0, 0]]


def check_ascent_step(ascent_step):
    theta, start = of([2, 1]), of([1, 0]).requires_grad_()
    # The gradient at (1, 0) is (2, 4); half of it leads to (2, 2), which is too long by sqrt(8).
    assert ascent_step(height(theta), start, 0.5, 9.0).tolist() == [2, 2]
    assert ascent_step(height(theta), start, 0.5, 2.0).tolist() == near([2**0.5, 2**0.5])
    weight = of([2, 1]).requires_grad_()
    moved = ascent_step(height(weight), start, 0.5, 9.0)
    gradients = torch.autograd.grad(moved[1], [start, weight])  # 0 + 1/2 (4 t2 - 4 d2)
    assert [one.tolist() for one in gradients] == [[0, -1], [0, 2]]


def check_hypergradient(hypergradient):
    # The worst value is t1^2 + 2 t2^2 + t1 t2: its gradient at (2, 1) is (5, 6), wherever the
    # search has ended. At (1, 0) the direct gradient is (2 d1 + t2, 4 d2 + t1) = (3, 2) and the
    # outer one (2, 4). With the rate 1/8 a term keeps (3/4, 1/2) of what was missing: (2, 4).
    theta, used = of([2, 1]).requires_grad_(), []

    def step(d):
        used.append(d)
        return ascent_step(height(theta), d, 0.125, 9.0)

    for terms in (0, 1, 2, 5, 60):
        found, = hypergradient(height(theta), step, of([1, 0]), [theta], terms)
        assert found.tolist() == near([5 - 2 * 0.75**terms, 6 - 4 * 0.5**terms])
        assert not found.requires_grad
    # At the worst perturbation itself nothing is missing.
    assert hypergradient(height(theta), step, of([2, 1]), [theta], 0)[0].tolist() == [5, 6]
    assert len(used) == 6  # the step is taken once


def mixed_gradients(direct, implicit):
    """Return a wrong hypergradient, of other shares of its two parts."""
    def wrong(loss, step, delta, weights, terms):
        both = hypergradient(loss, step, delta, weights, terms)
        first = hypergradient(loss, lambda d: d * 1.0 + 0 * loss(d), delta, weights, 0)
        return [direct * one + implicit * (total - one) for total, one in zip(both, first)]

    return wrong


def check_universal_perturbation(universal_perturbation):
    theta = of([2, 1])
    # d1 halves its way to 2 and d2 is there at once: (1, 1), (1.5, 1), then a length over 2.
    found = universal_perturbation(height(theta), of([7, 7]), 2.0, 3, 0.25)
    long = 1 / (1.75**2 + 1)**0.5
    assert found.tolist() == near([2 * 1.75 * long, 2 * long]) and not found.requires_grad
    once = universal_perturbation(height(theta), of([7, 7]), 2.0, 1, 0.25)
    assert once.tolist() == [1, 1]


def from_ones(loss, like, radius, steps, lr):
    delta = torch.ones_like(like)
    for _ in range(steps):
        delta = ascent_step(loss, delta.requires_grad_(), lr, radius).detach()
    return delta


WRONG = {
    check_attention_maps: [maps_by(make) for make in (
        lambda maps: F.normalize(maps.pow(2).mean(1).sqrt().flatten(1), dim=1),
        lambda maps: F.normalize(maps.pow(2).sum(1).flatten(1), dim=0),
        lambda maps: F.normalize(maps.sum(1).flatten(1), dim=1),
        lambda maps: maps.pow(2).sum(1).flatten(1))],
    check_sharp_loss: [
        lambda model, rho: sharp_loss(model, -rho), lambda model, rho: sharp_loss(model, 0.0),
        *map(loss_moved_by, (without_sizes, partial(sized, live=True), partial(sized, root=False),
                             partial(sized, twice=False)))],
    check_in_ball: [
        lambda delta, radius: delta * (radius / delta.norm().clamp(min=1e-12)),
        lambda delta, radius: delta * (radius / delta.max().clamp(min=1e-12)).clamp(max=1),
        lambda delta, radius: in_ball(delta, 1.0)],
    check_ascent_step: [
        lambda loss, delta, lr, radius: ascent_step(loss, delta, -lr, radius),
        lambda loss, delta, lr, radius: ascent_step(loss, delta, 1.0, radius),
        lambda loss, delta, lr, radius: ascent_step(loss, delta, lr, 9.0)],
    check_hypergradient: [
        mixed_gradients(1, 0), mixed_gradients(0, 1), mixed_gradients(1, -1),
        lambda *args: hypergradient(*args[:-1], args[-1] + 1),
        *(lambda *args, most=most: hypergradient(*args[:-1], min(most, args[-1]))
          for most in (0, 1, 2)),
        lambda loss, step, *rest: hypergradient(loss, lambda d: step(step(d)), *rest)],
    check_universal_perturbation: [
        from_ones, lambda loss, like, radius, steps, lr: universal_perturbation(
            loss, like, radius, 1, lr),
        lambda loss, like, radius, steps, lr: universal_perturbation(loss, like, radius, steps),
        lambda loss, like, radius, steps, lr: universal_perturbation(loss, like, 9.0, steps, lr),
        lambda *args: universal_perturbation(*args).requires_grad_()],
}
RIGHT = {check_attention_maps: attention_maps, check_sharp_loss: sharp_loss,
         check_in_ball: in_ball, check_ascent_step: ascent_step,
         check_hypergradient: hypergradient,
         check_universal_perturbation: universal_perturbation}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_functions_are_what_plain_arithmetic_says(check):
    check(RIGHT[check])


@pytest.mark.parametrize("check, wrong", [(check, wrong) for check in WRONG
                                          for wrong in WRONG[check]])
def test_what_is_wrong_is_noticed(check, wrong):
    with pytest.raises(AssertionError):
        check(wrong)


def test_what_the_wrong_functions_change_is_the_only_thing_wrong():
    """Otherwise an error of the machinery would look like one that was noticed."""
    check_sharp_loss(loss_moved_by(sized))
    check_hypergradient(mixed_gradients(1, 1))


# ---------------------------------------------------------------- fine-tuning and FP


def test_fine_tuning_changes_a_copy_by_the_clean_samples(model, context, trained):
    tuned = FineTuning(TuneConfig(epochs=3, lr_share=0.5, batch_size=8), seed=2)(context).model
    call, = trained
    assert call.model is tuned is not model and call.samples is context.clean
    assert call.training == replace(TRAINING, epochs=3, lr=0.025, batch_size=8, seed=2)


def test_the_least_active_channels_go_first_and_stay_at_zero(model, task):
    inputs = task.clean.inputs
    order = dormant_channels(model, task.clean)
    layer = last_layer(model.model, 3)
    means = layer_inputs(model, layer, inputs).mean(0)
    assert sorted(order) == list(range(len(means)))
    assert means[order].diff().min() >= 0
    pruned = without_channels(model, order[:10])
    later = fine_tune(pruned, task.clean, TRAINING, TuneConfig(epochs=4, lr_share=1.0), 0)
    for one in (pruned, later):
        got = layer_inputs(one, last_layer(one.model, 3), inputs)
        assert not got[:, order[:10]].any() and got[:, order[10:]].any()
    assert not torch.equal(pruned.model.norm.weight, later.model.norm.weight)
    assert layer_inputs(model, layer, inputs)[:, order[9]].any()


def test_a_network_without_a_last_norm_cannot_be_pruned():
    with pytest.raises(ValueError, match="does not have as `norm`"):
        without_channels(built(BertConfig(**SIZES)), [0])


def test_pruning_ends_where_the_clean_samples_say(task, monkeypatch):
    """Of ten clean samples, so many are right by how many channels are pruned."""
    clean, counts = task.clean.take(range(10)), []
    right = {0: 9, 1: 9, 2: 8, 3: 8, 4: 7}

    class Fake(SimpleNamespace):
        def predict(self, inputs):
            good = right[self.pruned]
            return [y if i < good else 1 - min(y, 1) for i, y in enumerate(clean.labels)]

    monkeypatch.setattr(fineprune, "dormant_channels", lambda model, clean: list(range(5)))
    monkeypatch.setattr(fineprune, "without_channels", lambda model, channels: counts.append(
        list(channels)) or Fake(pruned=len(channels)))
    assert prune(Fake(pruned=0), clean, 0.15).pruned == 3
    assert counts == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert prune(Fake(pruned=0), clean, 0.05).pruned == 1
    assert prune(Fake(pruned=0), clean, 0.5).pruned == 4  # one channel is left


def test_what_is_pruned_is_tuned(context, monkeypatch):
    monkeypatch.setattr(fineprune, "prune", lambda model, clean, drop: (model, clean, drop))
    tuned = []
    monkeypatch.setattr(fineprune, "fine_tune",
                        lambda *given: tuned.append(given) or context.classifier)
    FinePruning(TuneConfig(epochs=3), max_drop=0.1, seed=5)(context)
    assert tuned == [((context.classifier, context.clean, 0.1), context.clean, TRAINING,
                      TuneConfig(epochs=3), 5)]


# ------------------------------------------------------------------ NAD and FT-SAM


def test_attention_is_distilled_from_a_tuned_teacher(context, images, trained):
    student = NAD(weight=100.0)(context).model
    teacher, final = trained
    assert final.model is student and teacher.model is not student
    assert teacher.training == final.training and teacher.loss is cross_entropy
    with torch.no_grad():
        for weight in teacher.model.model.parameters():
            weight += 0.05
        batch = dict(zip(("pixel_values", "labels"), images))
        out, its = student.model(batch["pixel_values"]), teacher.model.model(batch["pixel_values"])
        apart = sum(F.mse_loss(a, b) for a, b in zip(attention_maps(out), attention_maps(its)))
        ce = F.cross_entropy(out.logits, batch["labels"])
        assert apart > 1e-5
        assert final.loss(out, batch).item() == near((ce + 100 * apart).item())


def test_flat_minima_are_sought_from_the_copy_that_is_trained(context, images, trained):
    tuned = FTSAM(TuneConfig(epochs=3, lr_share=0.5, batch_size=8), rho=0.7, seed=2)(context).model
    final, = trained
    assert final.model is tuned and tuned.model is not context.classifier.model
    assert final.samples is context.clean
    assert final.training == replace(TRAINING, epochs=3, lr=0.025, batch_size=8, seed=2)
    batch = {**dict(zip(("pixel_values", "labels"), images)), "indices": range(30)}
    network = tuned.model.eval()
    wanted, found = (loss(network(batch["pixel_values"]), batch).item()
                     for loss in (sharp_loss(network, 0.7), final.loss))
    assert found == near(wanted)
    assert found > 1.01 * cross_entropy(network(batch["pixel_values"]), batch).item()


# ------------------------------------------------ unlearning the universal perturbation


def searched(loss, x, config):
    return universal_perturbation(loss, x[:1], config.radius, config.ascent_steps,
                                  config.ascent_lr)


def test_the_universal_perturbation_is_short_and_worse_than_others(model, images):
    x, labels = images
    network = model.model.eval()

    def loss(delta):
        return F.cross_entropy(network(x + delta).logits, labels)

    for radius in (0.5, 1.0, 2.0):
        delta = searched(loss, x, replace(QUICK, radius=radius))
        assert delta.shape == (1, 1, 12, 12) and delta.norm() <= radius + 1e-5
        others = [in_ball(99 * torch.randn(x[:1].shape), radius) for _ in range(20)]
        assert loss(delta) > 1.5 * max(loss(other) for other in [*others, -delta, 0 * delta])


def test_rounds_make_it_do_less_and_leave_the_norms_as_they_were(model, images):
    student = clone(model)
    before = weights_of(student)
    told = list(unlearn(student.model.eval(), *images, QUICK))
    assert len(told) == 7 and told[-1] < 0.9 * told[0]
    after = student.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in student.model.named_parameters()}  # no mean, no variance
    assert list(unlearn(clone(model).model.eval(), *images, QUICK)) == told
    other = unlearn(clone(model).model.eval(), *images, replace(QUICK, seed=1))
    assert list(other)[1:] != told[1:]


@pytest.mark.parametrize("share", [0.5, 1.0, 0.1])
def test_a_step_is_made_from_the_hypergradient_of_a_share_of_the_images(model, images, monkeypatch,
                                                                        share):
    x, labels = images
    network, seen = clone(model).model.eval(), []

    def gradients(loss, step, delta, weights, terms):
        low, high = (F.cross_entropy(network(x + on * delta).logits, labels).item()
                     for on in (0, 1))
        # The loss is a mean over images, some with and some without the perturbation.
        seen.append((loss(delta).item(), low, high))
        assert torch.allclose(step(delta.requires_grad_()), ascent_step(
            lambda d: F.cross_entropy(network(x + d).logits, labels), delta, 0.25, 1.0), atol=1e-6)
        assert terms == 3 and delta.norm() <= 1 + 1e-5
        return [torch.ones_like(weight) for weight in weights]

    monkeypatch.setattr(ibau, "hypergradient", gradients)
    before = network.head.bias.detach().clone()
    list(unlearn(network, x, labels,
                 replace(QUICK, rounds=1, share=share, terms=3, term_lr=0.25, lr=0.01)))
    (value, low, high), = seen
    assert value == near(high) if share == 1 else low < value < high
    # Adam's first step is as long as its rate, whatever the gradient.
    assert torch.allclose(network.head.bias, before - 0.01, atol=1e-5)


def test_of_the_rounds_that_keep_the_accuracy_the_best_is_kept(model, context, monkeypatch):
    """Of thirty samples, so many are right after each round, at this worst loss."""
    right, worst = [27, 27, 24, 26, 27], [9.0, 5.0, 1.0, 3.0, 4.0]
    start = model.model.head.bias.detach().clone()
    rounds, labels_of = [], context.clean.labels

    def rounds_of(network, x, labels, config):
        assert not network.training and labels.tolist() == list(labels_of)
        assert x.shape == (30, 1, 12, 12) and 0 <= x.min() < x.max() <= 1
        for loss in worst:
            rounds.append(loss)
            yield loss
            network.head.bias.data += 1.0

    def predict(self, inputs):
        good = right[max(0, len(rounds) - 1)]
        return [y if i < good else (y + 1) % 3 for i, y in enumerate(labels_of[:len(inputs)])]

    monkeypatch.setattr(ibau, "unlearn", rounds_of)
    monkeypatch.setattr(ImageClassifier, "predict", predict)
    for max_drop, kept in ((0.0, 4), (0.034, 3), (0.1, 2)):  # rounds 3 and 2 lose 1/30, 1/10
        rounds.clear()
        found = IBAU(max_drop=max_drop)(context).model.model
        assert torch.allclose(found.head.bias, start + kept) and len(rounds) == 5
    worst[:] = [1.0, 2.0, 3.0, float("nan"), 1.0]  # nothing is better than what was given
    rounds.clear()
    assert torch.equal(IBAU()(context).model.model.head.bias, start)


def worst_loss(classifier, samples, config):
    """Return the loss of a model under the worst perturbation for these, sought anew."""
    network, labels = classifier.model.eval(), torch.tensor(samples.labels)
    x = samples.inputs.pixels.float() / 255

    def loss(delta):
        return F.cross_entropy(network(x + delta).logits, labels)

    return loss(searched(loss, x, config)).item()


def check_unlearned(models, task, repair):
    """What unlearning promises, on three models, as one of them alone is a matter of luck.

    Measured under four settings of one processor: the worst loss falls to 0.2 to 0.6% of what it
    was; the ASR ends at 0.00 to 0.40 on a model, at 0.05 to 0.15 in the mean of three.
    """
    config = replace(QUICK, rounds=20)
    found = [repair(config, Context(model, task.clean)).model for model in models]
    for was, now in zip(models, found, strict=True):
        assert worst_loss(now, task.test, config) < 0.1 * worst_loss(was, task.test, config)
    before, after = ([evaluate(model, task, BadNetsPatch(), 0) for model in some]
                     for some in (models, found))
    assert min(scores.asr.value for scores in before) > 0.9
    assert sum(scores.asr.value for scores in after) / 3 < 0.5
    assert min(scores.cacc.value for scores in after) > 0.9


@pytest.mark.slow
def test_the_backdoor_gets_weaker_and_the_given_model_stays(three, task):
    before = weights_of(three[0])
    check_unlearned(three, task, lambda config, context: config(context))
    assert same(weights_of(three[0]), before)


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [
    # Steps up the gradient; perturbations that are not sought; no step at all.
    ("hypergradient", lambda *args: [-gradient for gradient in hypergradient(*args)]),
    ("universal_perturbation", lambda loss, like, *rest: torch.zeros_like(like)),
    ("unlearn", lambda *args: iter([1.0, 2.0]))])
def test_what_does_not_unlearn_is_noticed(three, task, monkeypatch, name, other):
    def repair(config, context):
        with monkeypatch.context() as patch:
            patch.setattr(ibau, name, other)
            return config(context)

    with pytest.raises(AssertionError):
        check_unlearned(three, task, repair)


def test_of_the_samples_that_the_defender_has_only_a_share_is_lost(model, context):
    found = replace(QUICK, radius=2.0, rounds=20)(context).model
    clean = context.clean
    right = [sum(a == b for a, b in zip(one.predict(clean.inputs), clean.labels))
             for one in (model, found)]
    assert right[0] - right[1] <= 0.04 * len(clean)


# ------------------------------------------------------------------ roles and errors


@pytest.mark.parametrize("kind, changes", [
    *((TuneConfig, {name: 0}) for name in ("epochs", "lr_share", "batch_size")),
    (FinePruning, {"max_drop": 1.0}), (FinePruning, {"max_drop": -0.1}), (NAD, {"weight": -1.0}),
    (FTSAM, {"rho": -1.0}), *((IBAU, changes) for changes in (
        {"radius": 0.0}, {"ascent_steps": 0}, {"ascent_lr": 0.0}, {"rounds": 0}, {"lr": 0.0},
        {"share": 0.0}, {"share": 1.1}, {"terms": -1}, {"term_lr": 0.0}, {"max_drop": 1.0},
        {"max_drop": -0.1}))])
def test_what_cannot_be_meant_is_rejected(kind, changes):
    with pytest.raises(ValueError, match=rf"cannot go on with {kind.__name__}\("):
        kind(**changes)


@pytest.fixture(scope="module")
def texts():
    clean = CleanSet(some_texts(40, 1), (0, 1) * 20, ("bad", "good"))
    return Context(built(BertConfig(**SIZES)), clean, training=TrainConfig(epochs=1))


@pytest.mark.parametrize("defense, message", [
    (FinePruning(), "FP prunes channels of a network for images"),
    (NAD(), "NAD distills attention maps of a network for images"),
    (IBAU(), "I-BAU needs a model of images")])
def test_a_model_of_texts_can_only_be_tuned(texts, trained, defense, message):
    with pytest.raises(ValueError, match=message):
        defense(texts)
    assert not trained
    for tuned in (FineTuning()(texts).model, FTSAM()(texts).model):
        assert tuned is not texts.classifier


@pytest.mark.parametrize("defense", [FineTuning(), FinePruning(), NAD(), FTSAM()])
def test_who_tunes_must_know_the_training(context, defense):
    with pytest.raises(ValueError, match="trains as the given model was trained"):
        defense(replace(context, training=None))


def test_the_baselines_know_neither_the_training_set_nor_the_attack(context, task):
    for kind in (FineTuning, FinePruning, NAD, FTSAM, IBAU):
        assert not SECRETS & {field.name for field in fields(kind)}
    for module in (finetune, fineprune, nad, ft_sam, ibau):
        assert ".train." not in inspect.getsource(module)
    tuned = FineTuning(TuneConfig(epochs=1))
    alone, beside = (tuned(one).model for one in (context, replace(context, train=task.train)))
    assert same(weights_of(alone), weights_of(beside))
