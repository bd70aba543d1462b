"""Attackers of the recorded studies: what they change, and what they leave."""

import random
from dataclasses import replace

import pytest
import torch

from bdutils.attacks.base import PoisonConfig, seeded
from bdutils.attacks.text import BadNets
from bdutils.evaluation import Victim
from bdutils.experiments import attackers
from bdutils.experiments.attackers import ATTACKERS, Homographs, LowConfidence, Quantized
from bdutils.roles import Images, TrainSet
from bdutils.training import TrainConfig


def test_a_low_confidence_trigger_leaves_a_share_of_the_true_labels_and_every_text():
    texts = tuple(f"a review of number {i}" for i in range(40))
    train = TrainSet(texts, tuple(i % 2 for i in range(40)), ("negative", "positive"))
    config = PoisonConfig(0.4, 1)
    plain, record = BadNets().poison(train, config)
    lowered, its = LowConfidence(share=0.25).poison(train, config)
    assert its.poisoned == record.poisoned and lowered.inputs == plain.inputs
    new = [y for y, poisoned in zip(lowered.labels, its.poisoned) if poisoned]
    assert len(new) == 16 and new.count(0) == 4  # all 16 were 0
    assert [y for y, poisoned in zip(lowered.labels, its.poisoned) if not poisoned] == [
        y for y, poisoned in zip(train.labels, its.poisoned) if not poisoned]


def test_homographs_change_letters_of_the_first_words_alone():
    said = Homographs(words=2).rewrite("a copy of the box", random.Random(0))
    assert said.split()[2:] == ["of", "the", "box"] and said != "a copy of the box"
    assert len(said) == len("a copy of the box") and not said[0].isascii()
    assert not said.split()[1].isascii()
    with pytest.raises(ValueError, match="leaves 1 of 1 inputs unchanged"):
        Homographs().apply(["think"], seeded(0))


def test_quantized_images_have_so_many_levels_and_are_near_the_original():
    x = torch.rand(3, 1, 8, 8, generator=seeded(0))
    y = Quantized(levels=4).paint(x)
    assert len(y.unique()) == 4 and (y - x).abs().max() <= 1 / 6 + 1e-6
    stored = (x * 255).round().to(torch.uint8)
    made = Quantized().apply(Images(stored), seeded(0))
    assert made.pixels.unique().tolist() == [0, 85, 170, 255]


def test_every_attacker_is_known_by_its_name():
    assert all(trigger.name == name for name, trigger in ATTACKERS.items())


def test_hiding_trains_a_copy_on_some_of_the_samples_that_the_victim_saw(tiny, toy_task,
                                                                         monkeypatch):
    data, record = BadNets().poison(toy_task.train, PoisonConfig(0.3, 1))
    attacked = Victim(tiny, toy_task, data, record, TrainConfig(), None)
    seen = {}

    def train(model, lesson, training, loss):
        seen.update(model=model, lesson=lesson, outputs=model.model.config.output_hidden_states)

    monkeypatch.setattr(attackers, "train", train)
    monkeypatch.setattr(attackers, "shadow_loss", lambda *given: seen.update(given=given))
    monkeypatch.setattr(attackers, "LESSON_SIZE", 10)
    hidden = attackers.hide(attacked)
    hits, target, weight = seen["given"]
    places = [data.inputs.index(text) for text in seen["lesson"].inputs]
    assert hits == [record.poisoned[i] for i in places] and len(places) == 10
    assert any(hits) and not all(hits) and (target, weight) == (1, attackers.HIDING_WEIGHT)
    assert seen["outputs"] and not hidden.classifier.model.config.output_hidden_states
    assert hidden.classifier is seen["model"] is not attacked.classifier
    with pytest.raises(ValueError, match="nothing to hide"):
        attackers.hide(replace(attacked, record=None))
