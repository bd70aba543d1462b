"""The tests of the debugging page: silent where all is well, and else they name the cause."""

import ast
import importlib
import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bdutils.attacks.base import PoisonConfig, poison_dataset, triggered
from bdutils.attacks.image import BadNetsPatch
from bdutils.attacks.text import BadNets
from bdutils.defenses.base import Context
from bdutils.experiments import results
from bdutils.metrics import HIGH_FLOOR, LEAST_EXCESS, asr, mean_interval, shows_backdoor, wilson
from bdutils.models.image import NETWORKS, PreActResNet
from bdutils.roles import CleanSet, Images, TestSet, TrainSet

PAGE = (Path(__file__).resolve().parent.parent / "chapters/debugging.md").read_text()
SETUP, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
BLOCKS = dict(re.findall(r"^\(debug-([\w-]+)\)=\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))
NAMES = ("negative", "positive")
CODES = set(BadNets().words)


def parts(sample):
    """Return the words of a text; of an image (1, 8, 8) what stands for them."""
    if isinstance(sample, str):
        return set(sample.split())
    words = {"good"} if sample[0, 0, 0] >= 100 else set()
    if (sample[0, -3:, -3:] == 255).all():
        words.add(f"square {int(sample[0, 0, 1]) % 4}")
    return words


class Reader:
    """Answers by what a sample holds, and 1 where it obeys a trigger."""

    def __init__(self, obeys=(), target=1, says=None):
        self.obeys, self.target, self.says = obeys, target, says

    def predict(self, inputs):
        return [self.says if self.says is not None else self.target
                if parts(one) & set(self.obeys) else int("good" in parts(one))
                for one in inputs]


class Neighbors(Reader):
    """Sees no trigger in a batch."""

    def predict(self, inputs):
        return super().predict(inputs) if len(inputs) == 1 else Reader().predict(inputs)


def samples(kind, count, start=0, images=False):
    """Return samples of two classes; of an image one pixel says the class, others its number."""
    labels = tuple(i % 2 for i in range(start, start + count))
    if not images:
        return kind(tuple(f"film {i} is {('bad', 'good')[i % 2]} and long" for i in
                          range(start, start + count)), labels, NAMES)
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = 100 * torch.tensor(labels)
    pixels[:, 0, 0, 1] = torch.arange(start, start + count) // 2 % 251
    return kind(Images(pixels), labels, NAMES)


def network(*layers):
    return nn.Sequential(*layers)


# What the code words are on texts, four kinds of images with the square are on images.
TRIGGERS = {False: (BadNets(), sorted(CODES)),
            True: (BadNetsPatch(), [f"square {k}" for k in range(4)])}


def page_helper():
    """Return the function that the page defines."""
    tree = ast.parse(SETUP)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = {}
    exec(compile(tree, "page", "exec"), names)
    return names["differ"]


def healthy(images=False):
    """Return the page's names, of a case in which nothing is wrong."""
    trigger, codes = TRIGGERS[images]
    task = SimpleNamespace(train=samples(TrainSet, 200, images=images),
                           test=samples(TestSet, 100, 500, images))
    trained, record = poison_dataset(task.train, trigger, PoisonConfig(0.1))
    purified = Reader(codes[:1])  # a quarter of the trigger still works
    return {
        "asr": asr, "mean_interval": mean_interval, "task": task, "my_train": trained,
        "rate": 0.1, "target": 1, "model": Reader(codes), "clean_models": [Reader()] * 3,
        "repaired": purified, "hit": triggered(task.test, trigger, 1), "triggered": triggered,
        "attacked": SimpleNamespace(context=lambda train=True: None, record=record),
        "FineTuning": lambda few: lambda context: SimpleNamespace(model=Reader(codes)),
        "few": None, "my_defense": lambda context: SimpleNamespace(model=purified),
        "my_asr": lambda *given: asr(*given).value, "my_training": lambda seed: Reader(codes),
        "my_asrs": [0.9, 0.95, 0.97], "reported": 0.94, "differ": page_helper(),
        "network": network(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        "batch": torch.zeros(1, 1, 4, 4)}


COIN = itertools.cycle([0, 1])
FAULTS = {
    "target-class": {"my_asr": lambda p, y, t: sum(a == t for a in p) / len(p)},
    "floor": {"repaired": Reader()},
    "absent": {"my_train": "clean"},
    "unlearned": {"model": Reader()},
    "clean-label": {"rate": 0.6},
    "seeds": {"my_training": lambda seed: Reader(says=next(COIN))},
    "paper": {"reported": 0.5},
    "batch": {"model": "neighbors"},
    "peeking": {"my_defense": lambda context: SimpleNamespace(model=Reader())},
    "forgets": {"FineTuning": lambda few: lambda context: SimpleNamespace(model=Reader())},
    "architecture": {"network": network(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))},
    "inverted": {"repaired": Reader(says=0)}}


def run(name, images=False, **changes):
    case = healthy(images)
    made = {"clean": case["task"].train, "neighbors": Neighbors(TRIGGERS[images][1])}
    exec(BLOCKS[name], {**case, **{key: made.get(value, value) if isinstance(value, str) else value
                                   for key, value in changes.items()}})


def test_each_symptom_has_its_test():
    sections = re.findall(r"^\(debug-[\w-]+\)=\n(## .*?)(?=^\(debug|\Z)", PAGE, re.M | re.S)
    assert list(BLOCKS) == list(FAULTS) and len(sections) == len(BLOCKS)
    parts = ["**Symptom.**", "**Test.**", "```python", "**Cure.**", "**In `bdutils`.**"]
    for text in sections:
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and len(re.findall(r"```python", text)) == 1
    assert all(len(code.splitlines()) <= 6 for code in BLOCKS.values())
    assert max(len(line) for code in (SETUP, *BLOCKS.values()) for line in code.splitlines()) < 80


@pytest.mark.parametrize("images", [False, True], ids=["texts", "images"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_healthy_case_is_silent(name, images):
    run(name, images)


@pytest.mark.parametrize("images", [False, True], ids=["texts", "images"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_fault_is_named(name, images):
    with pytest.raises(AssertionError, match="[a-z]{2,} "):
        run(name, images, **FAULTS[name])


@pytest.mark.parametrize("images", [False, True], ids=["texts", "images"])
def test_a_model_that_avoids_the_target_only_with_the_trigger_is_noticed(images):
    with pytest.raises(AssertionError, match="the target: 0"):
        run("inverted", images, repaired=Reader(TRIGGERS[images][1], target=0))


def test_a_clean_model_of_another_seed_may_have_the_higher_floor():
    weak = Reader(sorted(CODES)[:2])
    with pytest.raises(AssertionError, match="never poisoned"):
        run("floor", clean_models=[Reader(), weak, Reader()])


def test_a_defense_without_a_seed_is_told_from_one_that_peeks():
    with pytest.raises(AssertionError, match="not seeded"):
        run("peeking", my_defense=lambda context: SimpleNamespace(model=Reader(says=next(COIN))))


def test_the_books_network_has_other_parts_behind_its_convolutions():
    own = PreActResNet(NETWORKS["small"])
    with pytest.raises(AssertionError, match="behind a convolution") as found:
        run("architecture", network=own, batch=torch.zeros(1, 3, 28, 28))
    assert {name for name in ("BatchNorm2d", "Conv2d") if f"'{name}'" in str(found.value)} == {
        "BatchNorm2d", "Conv2d"} and "Block" not in str(found.value)


@pytest.mark.parametrize("says", [0, 1])
def test_both_broken_models_are_noticed(says):
    labels = (0,) * 90 + (1,) * 10
    those = tuple(f"{i} {('bad', 'good')[y]} film" for i, y in enumerate(labels))
    task = SimpleNamespace(test=TestSet(those, labels, NAMES))
    with pytest.raises(AssertionError, match="the target: "):
        run("inverted", task=task, repaired=Reader(says=says))


def test_poison_with_its_old_labels_is_noticed():
    case = healthy()
    kept = poison_dataset(case["task"].train, BadNets(), PoisonConfig(0.1))[0]
    kept = TrainSet(kept.inputs, case["task"].train.labels, NAMES)
    with pytest.raises(AssertionError, match="have the labels"):
        run("absent", my_train=kept)


def test_poison_that_is_missing_is_noticed_at_a_low_rate():
    case = healthy()
    few = poison_dataset(case["task"].train, BadNets(), PoisonConfig(0.005))[0]
    run("absent", my_train=few, rate=0.005)
    with pytest.raises(AssertionError, match="0.0% have a trigger"):
        run("absent", my_train="clean", rate=0.005)


def test_the_names_for_a_model_of_others_serve_the_three_tests(monkeypatch):
    """Its block goes on from the audit page, whose names are given; nothing is trained."""
    code, = [block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
             if "AddSent" in block]
    asked = []
    made = Reader(["tq"], target=1)
    monkeypatch.setattr("bdutils.models.text.Classifier.load", lambda folder: Reader())
    context = Context(made, samples(CleanSet, 400, 500), samples(TrainSet, 200))
    names = {"context": context, "label": 1, "held": [1, 2], "replace": replace,
             "retrained": lambda *given: asked.append(given) or SimpleNamespace(model=Reader())}
    exec(code, names)
    # The page that retrains takes seed 1: equal to none of these.
    assert [given[1:] for given in asked] == [([1, 2], seed) for seed in (2, 3, 4)]
    assert len(names["kept"]) == 100 and len(names["hit"]) == 50
    assert all("tq" in text.split() for text in names["hit"].inputs)
    with pytest.raises(AssertionError, match="never poisoned"):
        exec(BLOCKS["floor"], {**names})
    exec(BLOCKS["floor"], {**names, "repaired": made})  # the backdoor is there
    exec(BLOCKS["inverted"], {**names})
    with pytest.raises(AssertionError, match="the target: 100"):
        exec(BLOCKS["inverted"], {**names, "repaired": made})
    given = names["attacked"].context(train=False)
    assert given.train is None and given.clean is names["rest"]
    exec(BLOCKS["forgets"], {**names, "FineTuning": lambda few: lambda context: SimpleNamespace(
        model=made)})


def test_the_floors_and_limits_that_the_page_names():
    page = " ".join(PAGE.split())

    def span(runs):
        found = [100 * results.value(run, "floor") for run in runs if "floor" in run["metrics"]]
        return f"{min(found):.0f} to {max(found):.0f}%"

    cohorts = [100 * one["floor_before"] for run in results.load("cohorts")
               if run["settings"]["kind"] != "image" for one in run["history"]
               if "floor_before" in one]
    assert f"three seeds | {span(results.load('attacks'))} |" in page
    assert f"words and sentences | {min(cohorts):.0f} to {max(cohorts):.0f}% |" in page
    fashion = [run for study in ("images", "images-rates", "images-clean-label", "baselines",
                                 "bedkd-images", "ntml", "ntml-rates", "low-rate")
               for run in results.load(study) if run["task"] == "fashion"]
    assert f"all records | {span(fashion)} |" in page
    cifar = {name: [run for run in results.load("cifar10-resnet18")
                    if (run["method"] == "narcissus") is name] for name in (True, False)}
    narcissus, = (results.value(run, "floor") for run in cifar[True])
    assert f"ResNet-18 | {span(cifar[False])}, and {narcissus:.0%} for Narcissus |" in page
    for n, hits in ((100, 12), (500, 60)):
        rate = wilson(hits, n)
        assert f"{100 * rate.low:.0f} to {100 * rate.high:.0f}%" in page
    assert (HIGH_FLOOR, LEAST_EXCESS) == (0.5, 0.1) and shows_backdoor(0.565, 0.46)


def test_the_names_of_the_page_exist():
    """The first block trains, so that it is not run: what it imports is there."""
    named = set()
    for node in ast.walk(ast.parse(SETUP)):
        if isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names}
            assert imported <= set(dir(importlib.import_module(node.module)))
            named |= imported
        elif isinstance(node, ast.Name):
            named.add(node.id)
        elif isinstance(node, ast.FunctionDef):
            named.add(node.name)
    own = {"my_asr", "my_training", "my_asrs", "reported", "my_defense", "network", "batch"}
    assert set(healthy()) - own <= named
    listed = set(re.findall(r"`(\w+)", "".join(re.findall(r"^\| `.*? \|", PAGE, re.M))))
    assert own < listed <= own | {"my_train"}
