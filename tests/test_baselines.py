"""The baselines: losses, gradients and clusters by hand, and what is trained on what."""

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
from bdutils.defenses import (
    abl,
    ac,
    clp,
    cube,
    fineprune,
    finetune,
    ft_sam,
    ibau,
    nad,
    retrain,
    spectral,
)
from bdutils.defenses.abl import ABL
from bdutils.defenses.ac import ActivationClustering
from bdutils.defenses.base import Context, Outcome, clone
from bdutils.defenses.clp import CLP
from bdutils.defenses.cube import CUBE
from bdutils.defenses.fineprune import FinePruning, dormant_channels, prune, without_channels
from bdutils.defenses.finetune import (
    FineTuning,
    FineTuningSweep,
    TuneConfig,
    fine_tune,
    held_out_accuracy,
)
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
from bdutils.defenses.spectral import SpectralSignatures
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
        {"max_drop": -0.1})),
    *((FineTuningSweep, changes) for changes in (
        {"shares": ()}, {"shares": (0.0, 1.0)}, {"slack": -0.1}, {"folds": 1})),
    (CLP, {"spread": 0.0}), (SpectralSignatures, {"share": 0.0}),
    (SpectralSignatures, {"share": 0.7}), *((ActivationClustering, changes) for changes in (
        {"dims": 0}, {"max_share": 0.6}, {"max_share": 0.0}, {"min_silhouette": 1.1})),
    (CUBE, {"dims": 0}), (CUBE, {"neighbors": 1}),
    *((ABL, changes) for changes in (
        {"early": 0.0}, {"early": 1.0}, {"gamma": 0.0}, {"isolated": 0.0}, {"epochs": 0},
        {"lr_share": 0.0}, {"batch_size": 0}))])
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


@pytest.mark.parametrize("defense", [FineTuning(), FineTuningSweep(), FinePruning(), NAD(),
                                     FTSAM()])
def test_who_tunes_must_know_the_training(context, defense):
    with pytest.raises(ValueError, match="trains as the given model was trained"):
        defense(replace(context, training=None))


def test_the_baselines_know_neither_the_training_set_nor_the_attack(context, task):
    for kind in (FineTuning, FineTuningSweep, FinePruning, NAD, FTSAM, IBAU, CLP, ABL, CUBE,
                 SpectralSignatures, ActivationClustering):
        assert not SECRETS & {field.name for field in fields(kind)}
    for module in (finetune, fineprune, nad, ft_sam, ibau, clp):
        assert ".train." not in inspect.getsource(module)
    tuned = FineTuning(TuneConfig(epochs=1))
    alone, beside = (tuned(one).model for one in (context, replace(context, train=task.train)))
    assert same(weights_of(alone), weights_of(beside))


# ---------------------------------------------- a rate that held-out samples choose


def check_largest_rate(largest_rate):
    seen = {0.1: 0.80, 0.5: 0.795, 0.2: 0.81, 1.0: 0.70}
    assert [largest_rate(seen, slack) for slack in (0, 0.012, 0.02, 0.5)] == [0.2, 0.2, 0.5, 1.0]


def check_folds_of(folds_of):
    assert folds_of([0, 0, 1, 0, 1, 0, 2], 3) == [0, 1, 0, 2, 1, 0, 0]


def test_each_sample_is_held_out_once_and_judged_by_a_model_that_did_not_see_it(context,
                                                                                monkeypatch):
    pixels, labels = context.clean.pixels, context.clean.labels
    seen = []

    def tune(classifier, clean, training, tuning, seed):
        inside = {image.numpy().tobytes() for image in clean.pixels}

        def predict(inputs):
            held = [image.numpy().tobytes() for image in inputs.pixels]
            assert not inside & {*held} and len(inside) + len(held) == 30
            seen.extend(held)
            by_image = {p.numpy().tobytes(): y for p, y in zip(pixels, labels)}
            return [by_image[image] if i else 9 for i, image in enumerate(held)]  # one is wrong

        return SimpleNamespace(predict=predict)

    monkeypatch.setattr(finetune, "fine_tune", tune)
    found = held_out_accuracy(context.classifier, context.clean, TRAINING, TuneConfig(), 5, 0)
    assert found == near(25 / 30) and len(seen) == len({*seen}) == 30


def test_the_sweep_tunes_with_all_samples_at_the_rate_that_was_chosen(context, monkeypatch,
                                                                      trained):
    accuracy = {0.1: 0.80, 0.5: 0.79, 2.0: 0.4}
    monkeypatch.setattr(finetune, "held_out_accuracy",
                        lambda model, clean, training, tuning, *rest: accuracy[tuning.lr_share])
    outcome = FineTuningSweep(shares=(0.1, 0.5, 2.0), seed=3)(context)
    call, = trained
    assert call.model is outcome.model and call.samples is context.clean
    assert call.training == replace(TRAINING, epochs=50, lr=0.025, batch_size=32, seed=3)
    assert outcome.report == {"lr_share": 0.5, "accuracy": accuracy}


# ------------------------------------------------------- channels that can grow most


def check_channel_bounds(channel_bounds):
    conv, norm = nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3, eps=0.0)
    conv.weight.data = torch.zeros(3, 2, 2, 2)
    conv.weight.data[0, 0, 0] = of([3, 4])  # one kernel of length 5
    conv.weight.data[1, 0, 0, 0], conv.weight.data[1, 1, 1, 1] = 2.0, 1.0  # apart: 2 and 1
    conv.weight.data[2, :, 0, 0] = of([3, 4])  # alike: 5 together
    norm.weight.data, norm.running_var = of([1, -2, 0.5]), of([1, 4, 25])
    assert channel_bounds(conv, norm).tolist() == near([5, 2, 0.5])


def bounds_by(scale, length):
    """Return bounds whose scale or length is another."""
    return lambda conv, norm: length((conv.weight * scale(norm)[:, None, None, None]).flatten(2))


def scaled_by_norm(norm):
    return norm.weight / norm.running_var.sqrt()


def spectral_norm(kernels):
    return torch.linalg.matrix_norm(kernels, ord=2)


@pytest.fixture
def loud(context):
    """A model of random weights in which one channel of each of two norms stands out."""
    model = context.new_model(TRAINING)
    model.model.stages[1][0].conv1.weight.data[7] *= 9
    model.model.stages[2][0].conv2.weight.data[11] *= 9  # before the last norm
    return replace(context, classifier=model)


def pruned_channels(model):
    return {(name, i) for name, part in model.model.named_modules()
            if isinstance(part, nn.BatchNorm2d)
            for i in (part.weight == 0).nonzero()[:, 0].tolist()}


def check_clp(loud):
    before = weights_of(loud.classifier)
    outcome = CLP(spread=4.0)(loud)
    assert pruned_channels(outcome.model) == {("stages.1.0.norm2", 7), ("norm", 11)}
    assert outcome.report == {"pruned": 2}
    assert same(weights_of(loud.classifier), before)


def test_the_channels_that_can_grow_most_are_pruned(loud):
    check_clp(loud)
    norms = [norm for _, norm in clp.norms_of(loud.classifier.model)]
    assert len({*norms}) == len(norms) == sum(
        isinstance(part, nn.BatchNorm2d) for part in loud.classifier.model.modules())


@pytest.mark.parametrize("other", [
    lambda conv, norm: torch.rand(len(norm.weight)),  # any channel
    lambda conv, norm: -clp_bounds(conv, norm), lambda conv, norm: norm.running_var])
def test_what_prunes_other_channels_is_noticed(loud, monkeypatch, other):
    monkeypatch.setattr(clp, "channel_bounds", other)
    with pytest.raises(AssertionError):
        check_clp(loud)


# ---------------------------------------------------- with the training set at hand


def check_outlier_scores(outlier_scores):
    # Centered: (4, 0), (-4, 0), (0, 2), (0, -2). The first direction is the widest.
    found = outlier_scores(of([[4, 9], [-4, 9], [0, 11], [0, 7]]))
    assert found.tolist() == near([16, 16, 0, 0])


def scores_along(which, *, center=True, square=True):
    """Return scores along another direction, or made in another way."""
    def scores(features):
        centered = features - features.mean(0) if center else features
        along = centered @ torch.linalg.svd(centered, full_matrices=False)[2][which]
        return along.square() if square else along

    return scores


def at_random(features):
    return (features @ F.normalize(torch.randn(features.shape[1]), dim=0)).square()


def clouds(*sizes, seed=0):
    """Return dense clouds of these sizes, far from each other."""
    rng = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(size, 4, generator=rng) + 20 * place
                      for place, size in enumerate(sizes)])


def check_halves(halves):
    for sizes, wanted in (((30, 12), [False] * 30 + [True] * 12),
                          ((12, 30), [True] * 12 + [False] * 30)):
        small, apart = halves(clouds(*sizes), 3, 0)
        assert small.tolist() == wanted and apart > 0.8
    assert halves(clouds(60), 3, 0)[1] < 0.4


def check_in_largest(in_largest):
    scattered = 200 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for order in ((60, 25), (25, 60)):
        kept = in_largest(torch.cat([clouds(*order), scattered]), 3, 10)
        wanted = [size == 60 for size in order for _ in range(size)] + [False] * 5
        assert sum(a != b for a, b in zip(kept.tolist(), wanted)) <= 4
    assert in_largest(of([[0, 0], [5, 1], [1, 9]]), 3, 3).all()  # in no cluster, all of them


def check_ascent_loss(ascent_loss):
    for logit, sign in ((0.0, 1), (3.0, -1)):  # losses 0.69 and 0.05
        z = torch.tensor([[logit, 0.0]], requires_grad=True)
        value = ascent_loss(0.5)(SimpleNamespace(logits=z), {"labels": whole("0")})
        assert value.item() == near(sign * log(1 + exp(-logit)))
        gradient, = torch.autograd.grad(value, z)
        assert gradient[0, 0].item() == near(-sign / (1 + exp(logit)))


def check_easiest(easiest):
    data = TrainSet(some_texts(4, 0), (0, 1, 0, 1), ("bad", "good"))
    model = SimpleNamespace(logits=lambda inputs: of([[1, 0], [9, 0], [3, 0], [0, 2]]))
    assert [easiest(model, data, share) for share in (0.1, 0.5, 0.75)] == [[2], [2, 3], [2, 3, 0]]


WRONG_TRAINED = {
    check_largest_rate: [
        lambda seen, slack: max(seen, key=seen.get), lambda seen, slack: max(seen),
        lambda seen, slack: min(rate for rate, a in seen.items() if a >= max(
            seen.values()) - slack)],
    check_folds_of: [lambda labels, count: [i % count for i in range(len(labels))],
                     lambda labels, count: finetune.folds_of(labels, 2)],
    check_channel_bounds: [
        bounds_by(lambda norm: norm.weight, spectral_norm),
        bounds_by(lambda norm: norm.weight / norm.running_var, spectral_norm),
        bounds_by(scaled_by_norm, lambda kernels: kernels.flatten(1).norm(dim=1)),
        bounds_by(scaled_by_norm, lambda kernels: kernels.abs().amax((1, 2))),
        lambda conv, norm: clp_bounds(conv, norm) * norm.weight.sign()],
    check_outlier_scores: [scores_along(1), scores_along(0, center=False),
                           scores_along(0, square=False), at_random],
    check_halves: [lambda *args: (~ac.halves(*args)[0], ac.halves(*args)[1]),
                   lambda *args: (ac.halves(*args)[0], 0.5),
                   lambda features, *rest: (torch.arange(len(features)) < len(features) / 2, 0.9)],
    check_in_largest: [lambda *args: ~cube.in_largest(*args),
                       lambda features, *rest: torch.ones(len(features), dtype=torch.bool),
                       lambda features, *rest: features.norm(dim=1) < 10],
    check_ascent_loss: [
        lambda gamma: cross_entropy, lambda gamma: abl.unlearning_loss,
        lambda gamma: abl.ascent_loss(0.0), lambda gamma: abl.ascent_loss(9.0),
        lambda gamma: lambda *args: (cross_entropy(*args) - gamma).abs()],
    check_easiest: [
        lambda model, data, share: abl.easiest(model, data, 1.0)[::-1][:max(1, round(share * 4))],
        lambda model, data, share: abl.easiest(model, data, 0.5),
        lambda model, data, share: model.logits(data.inputs).amax(1).argsort(
            descending=True)[:round(4 * share)].tolist()],
}
clp_bounds = clp.channel_bounds
RIGHT_TRAINED = {
    check_largest_rate: finetune.largest_rate, check_folds_of: finetune.folds_of,
    check_channel_bounds: clp.channel_bounds, check_outlier_scores: spectral.outlier_scores,
    check_halves: ac.halves, check_in_largest: cube.in_largest,
    check_ascent_loss: abl.ascent_loss, check_easiest: abl.easiest}


@pytest.mark.parametrize("check", RIGHT_TRAINED, ids=lambda check: check.__name__)
def test_steps_are_what_plain_arithmetic_says(check):
    check(RIGHT_TRAINED[check])


@pytest.mark.parametrize("check, wrong", [(check, wrong) for check in WRONG_TRAINED
                                          for wrong in WRONG_TRAINED[check]])
def test_a_step_that_is_wrong_is_noticed(check, wrong):
    with pytest.raises(AssertionError):
        check(wrong)


@pytest.fixture(scope="module")
def few(task):
    """A model that was attacked with few samples, what its defender has, and which these are."""
    poisoned, record = BadNetsPatch().poison(task.train, PoisonConfig(0.06, 0))
    model = untrained(poisoned, TRAINING)
    train(model, poisoned, TRAINING)
    return Context(model, task.clean, poisoned, TRAINING), record.poisoned


@pytest.fixture
def dropped(monkeypatch):
    """Train nothing anew, and record what would be left out."""
    for module in (spectral, ac, cube):
        monkeypatch.setattr(module, "retrained", lambda context, indices, seed: Outcome(
            context.classifier, report={"dropped": tuple(indices)}))
    return lambda defense, context: defense(context).report["dropped"]


def found(dropped, poisoned):
    """Return which share of the poisoned samples and of the others is dropped."""
    hit = {True: 0, False: 0}
    for i in dropped:
        hit[poisoned[i]] += 1
    return hit[True] / sum(poisoned), hit[False] / (len(poisoned) - sum(poisoned))


DETECTORS = {"spectral": SpectralSignatures(share=0.15), "ac": ActivationClustering(dims=5),
             "cube": CUBE(dims=5, neighbors=10)}


def check_found(defense, few, dropped):
    context, poisoned = few
    out = dropped(defense, context)
    assert len({*out}) == len(out)
    tpr, fpr = found(out, poisoned)
    assert tpr > 0.8 and fpr < 0.4


@pytest.mark.parametrize("name", DETECTORS)
def test_few_poisoned_samples_are_found(few, dropped, name):
    check_found(DETECTORS[name], few, dropped)


@pytest.mark.parametrize("name, module, step, wrong", [
    ("spectral", spectral, "outlier_scores", lambda features: scores_along(-1)(features)),
    ("spectral", spectral, "outlier_scores", lambda features: -scores_along(0)(features)),
    ("ac", ac, "halves", lambda *args: (~ac_halves(*args)[0], 0.9)),
    ("ac", ac, "halves", lambda *args: (ac_halves(*args)[0], 0.0)),
    ("cube", cube, "in_largest", lambda *args: ~cube_largest(*args)),
    ("cube", cube, "in_largest", lambda features, *rest: torch.ones(
        len(features), dtype=torch.bool))])
def test_who_finds_others_is_noticed(few, dropped, monkeypatch, name, module, step, wrong):
    monkeypatch.setattr(module, step, wrong)
    with pytest.raises(AssertionError):
        check_found(DETECTORS[name], few, dropped)


ac_halves, cube_largest = ac.halves, cube.in_largest


def test_each_class_loses_the_share_that_was_assumed(few, dropped):
    context, _ = few
    out = dropped(SpectralSignatures(share=0.1, excess=2.0), context)
    labels = context.train.labels
    for label in range(3):
        assert sum(labels[i] == label for i in out) == round(0.2 * labels.count(label))


def test_a_cluster_that_is_large_or_near_stays(few, dropped):
    context, _ = few
    assert not dropped(ActivationClustering(min_silhouette=1.0), context)
    assert not dropped(ActivationClustering(max_share=0.001), context)
    every = dropped(ActivationClustering(max_share=0.5, min_silhouette=-1.0), context)
    assert {context.train.labels[i] for i in every} == {0, 1, 2}


def test_a_new_model_is_trained_on_all_the_others(few, monkeypatch):
    context, _ = few
    calls = []
    monkeypatch.setattr(retrain, "train", lambda *given: calls.append(given))
    outcome = retrain.retrained(context, [5, 2], 4)
    (model, kept, training), = calls
    assert training == replace(TRAINING, seed=4) and type(kept) is TrainSet
    assert kept.labels == context.train.labels[:2] + context.train.labels[3:5] \
        + context.train.labels[6:]
    assert outcome.model is model and outcome.report == {"dropped": (2, 5)}
    assert same(weights_of(model), weights_of(context.new_model(training)))
    nothing = retrain.retrained(context, [], 4)
    assert nothing.model is context.classifier and nothing.verdict == "no evidence"
    assert len(calls) == 1


def test_what_was_learned_first_is_unlearned_last(few, monkeypatch):
    context, _ = few
    calls = []
    monkeypatch.setattr(abl, "train", lambda model, data, training, loss=cross_entropy:
                        calls.append((model, len(data), training, loss)))
    monkeypatch.setattr(abl, "easiest", lambda model, data, share: [4, 1, 7])
    outcome = ABL(early=0.25, epochs=9, lr_share=0.1, batch_size=7, seed=2)(context)
    whole = replace(TRAINING, seed=2)
    assert all(model is outcome.model for model, *_ in calls)
    assert [(n, training) for _, n, training, _ in calls] == [
        (480, replace(whole, epochs=2)), (477, replace(whole, epochs=6)),
        (3, replace(whole, epochs=9, batch_size=7, lr=0.1 * TRAINING.lr))]
    assert calls[1][3] is cross_entropy and calls[2][3] is abl.unlearning_loss
    z = SimpleNamespace(logits=of([[3, 0]]))
    assert calls[0][3](z, {"labels": whole_zero}) == -cross_entropy(z, {"labels": whole_zero})
    assert outcome.report == {"dropped": (1, 4, 7)}


whole_zero = torch.tensor([0])


@pytest.mark.parametrize("defense", [SpectralSignatures(), ActivationClustering(), CUBE(), ABL()])
def test_who_trains_anew_needs_the_training_set_and_how(few, defense):
    context, _ = few
    with pytest.raises(ValueError, match="needs the training set: give the context a `train`"):
        defense(replace(context, train=None))
    with pytest.raises(ValueError, match="give the context a `training`"):
        defense(replace(context, training=None))


def test_channels_are_pruned_in_a_known_network_only(texts):
    with pytest.raises(ValueError, match="it takes a PreActResNet, not a BertForSequence"):
        CLP()(texts)
