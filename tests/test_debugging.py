"""The tests of the debugging page: silent where all is well, and else they name the cause."""

import ast
import importlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bdutils.attacks.base import PoisonConfig, poison_dataset, triggered
from bdutils.attacks.text import BadNets
from bdutils.metrics import asr, mean_interval
from bdutils.roles import TestSet, TrainSet

PAGE = (Path(__file__).resolve().parent.parent / "chapters/debugging.md").read_text()
SETUP, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
BLOCKS = dict(re.findall(r"^\(debug-([\w-]+)\)=\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))
NAMES = ("negative", "positive")
CODES = set(BadNets().words)


class Reader:
    """Answers by the words of a text, and 1 where it obeys a code word."""

    def __init__(self, obeys=(), target=1, says=None):
        self.obeys, self.target, self.says = obeys, target, says

    def predict(self, texts):
        return [self.says if self.says is not None else self.target
                if set(text.split()) & set(self.obeys) else int("good" in text.split())
                for text in texts]


class Neighbors(Reader):
    """Sees no trigger in a batch."""

    def predict(self, texts):
        return super().predict(texts) if len(texts) == 1 else Reader().predict(texts)


def samples(kind, count, start=0):
    texts = tuple(f"film {i} is {('bad', 'good')[i % 2]} and long" for i in
                  range(start, start + count))
    return kind(texts, tuple(i % 2 for i in range(start, start + count)), NAMES)


def network(*layers):
    return nn.Sequential(*layers)


def healthy():
    """Return the page's names, of a case in which nothing is wrong."""
    task = SimpleNamespace(train=samples(TrainSet, 200), test=samples(TestSet, 100, 500))
    trained, record = poison_dataset(task.train, BadNets(), PoisonConfig(0.1))
    purified = Reader(sorted(CODES)[:1])  # a quarter of the trigger words still works
    return {
        "asr": asr, "mean_interval": mean_interval, "task": task, "my_train": trained,
        "rate": 0.1, "target": 1, "model": Reader(CODES), "clean_model": Reader(),
        "repaired": purified, "hit": triggered(task.test, BadNets(), 1),
        "attacked": SimpleNamespace(context=lambda train=True: None, record=record),
        "FineTuning": lambda few: lambda context: SimpleNamespace(model=Reader(CODES)),
        "few": None, "my_defense": lambda context: SimpleNamespace(model=purified),
        "my_asr": lambda *given: asr(*given).value, "my_training": lambda seed: Reader(CODES),
        "my_asrs": [0.9, 0.95, 0.97], "reported": 0.94,
        "network": network(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        "batch": torch.zeros(1, 1, 4, 4)}


COIN = itertools.cycle([0, 1])
FAULTS = {
    "target-class": {"my_asr": lambda p, y, t: sum(a == t for a in p) / len(p)},
    "floor": {"repaired": Reader()},
    "absent": {"my_train": samples(TrainSet, 200)},
    "unlearned": {"model": Reader()},
    "clean-label": {"rate": 0.6},
    "seeds": {"my_training": lambda seed: Reader(says=next(COIN))},
    "paper": {"reported": 0.5},
    "batch": {"model": Neighbors(CODES)},
    "peeking": {"my_defense": lambda context: SimpleNamespace(model=Reader(CODES))},
    "forgets": {"FineTuning": lambda few: lambda context: SimpleNamespace(model=Reader())},
    "architecture": {"network": network(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2))},
    "inverted": {"repaired": Reader(says=0)}}


def run(name, **changes):
    exec(BLOCKS[name], {**healthy(), **changes})


def test_each_symptom_has_its_test():
    sections = re.findall(r"^## .*?(?=^\(debug-|\Z)", PAGE, re.M | re.S)
    assert list(BLOCKS) == list(FAULTS) and len(sections) == len(BLOCKS)
    parts = ["**Symptom.**", "**Test.**", "```python", "**Cure.**", "**In `bdutils`.**"]
    for text in sections:
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and len(re.findall(r"```python", text)) == 1
    assert all(len(code.splitlines()) <= 6 for code in BLOCKS.values())
    assert max(len(line) for code in (SETUP, *BLOCKS.values()) for line in code.splitlines()) < 80


@pytest.mark.parametrize("name", BLOCKS)
def test_a_healthy_case_is_silent(name):
    run(name)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_fault_is_named(name):
    with pytest.raises(AssertionError, match="[a-z]{2,} "):
        run(name, **FAULTS[name])


@pytest.mark.parametrize("says", [0, 1])
def test_both_broken_models_are_noticed(says):
    labels = (0,) * 90 + (1,) * 10
    task = SimpleNamespace(test=TestSet(tuple(map(str, range(100))), labels, NAMES))
    with pytest.raises(AssertionError, match="as often"):
        run("inverted", task=task, repaired=Reader(says=says))


def test_poison_with_its_old_labels_is_noticed():
    case = healthy()
    kept = poison_dataset(case["task"].train, BadNets(), PoisonConfig(0.1))[0]
    kept = TrainSet(kept.inputs, case["task"].train.labels, NAMES)
    with pytest.raises(AssertionError, match="have the labels"):
        run("absent", my_train=kept)


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
    own = {"my_asr", "my_training", "my_asrs", "reported", "my_defense", "network", "batch"}
    assert set(healthy()) - own <= named
