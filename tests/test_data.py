"""The three roles, the splits, and what bad files are told."""

import json

import numpy as np
import pandas as pd
import pytest

from bdutils.data import load_task, make_task
from bdutils.defenses.base import Context
from bdutils.roles import CleanSet, Examples, TestSet, TrainSet

NAMES = ("negative", "positive")


def test_roles_share_no_text_and_are_what_they_say():
    task = load_task("sentiment")
    assert (len(task.train), len(task.clean), len(task.test)) == (3000, 800, 1000)
    for role in (task.train, task.clean, task.test):
        assert sorted(set(role.labels)) == [0, 1]
        assert role.labels.count(1) == len(role) // 2
    keys = [{" ".join(t.lower().split()) for t in role.inputs}
            for role in (task.train, task.clean, task.test)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert sum(map(len, keys)) == 4800  # no repeats inside a role either


def test_the_split_is_made_once_by_its_seed():
    assert load_task("sentiment").fingerprint() == load_task("snippets").fingerprint()
    assert load_task("sentiment").fingerprint() != load_task("sentiment", seed=1).fingerprint()


def test_topic_has_four_classes():
    task = load_task("topic")
    assert task.train.label_names == ("comp", "rec", "sci", "talk")
    assert set(task.test.labels) == {0, 1, 2, 3}


def test_labels_fit_their_texts():
    """Shuffled labels would pass every check of form; words of praise and blame do not lie."""
    task = load_task("sentiment")
    for words, label in ((("powerful", "beautiful", "moving"), 1), (("bad", "dull", "worst"), 0)):
        found = [y for t, y in zip(task.train.inputs, task.train.labels)
                 if set(words) & set(t.lower().split())]
        assert len(found) > 30 and found.count(label) / len(found) > 0.8


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_own_files(tmp_path, suffix):
    rows = pd.DataFrame({"review": [f"text number {i}" for i in range(60)],
                         "stars": ["bad", "good"] * 30})
    path = tmp_path / f"mine{suffix}"
    {".csv": lambda: rows.to_csv(path, index=False), ".parquet": lambda: rows.to_parquet(path),
     ".jsonl": lambda: rows.to_json(path, orient="records", lines=True)}[suffix]()
    task = load_task(str(path), text="review", label="stars",
                     sizes={"train": 30, "clean": 10, "test": 20})
    assert task.train.label_names == ("bad", "good")
    number = int(task.test.inputs[0].split()[-1])
    assert task.test.labels[0] == number % 2


def test_given_splits_are_honored(tmp_path):
    rows = [{"text": f"{split} {i}", "label": i % 2, "split": split}
            for split, n in (("train", 40), ("dev", 10), ("test", 20)) for i in range(n)]
    rows.append({"text": "TEST  3", "label": 1, "split": "train"})  # leaks: must be dropped
    path = tmp_path / "split.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(str(path), sizes={"train": None, "test": None})
    assert {t.split()[0] for t in task.test.inputs} == {"test"}
    assert {t.split()[0] for t in task.clean.inputs} == {"dev"}
    assert len(task.train) == 40 and len(task.test) == 20


def write(tmp_path, **columns):
    path = tmp_path / "rows.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return str(path)


def test_bad_input_names_the_thing_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'imdb'.*use one of"):
        load_task("imdb")
    with pytest.raises(ValueError, match="no column 'text'.*review.*text="):
        load_task(write(tmp_path, review=["a", "b"], label=[0, 1]))
    with pytest.raises(ValueError, match="sample 1 has no text: drop it"):
        load_task(write(tmp_path, text=["a", " "], label=[0, 1]))
    with pytest.raises(ValueError, match="sample 1 has label -1"):
        load_task(write(tmp_path, text=["a", "b"], label=[0, -1]))
    with pytest.raises(ValueError, match="labels are .1, 2.: number the classes from 0"):
        load_task(write(tmp_path, text=["a", "b"], label=[1, 2]))
    with pytest.raises(ValueError, match="only .* samples to train on.*smaller sizes"):
        load_task(write(tmp_path, text=[f"t{i}" for i in range(50)], label=[0, 1] * 25))
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_task("nowhere.csv")
    with pytest.raises(ValueError, match="no samples"):
        Examples((), (), NAMES)
    with pytest.raises(ValueError, match="2 inputs but 1 labels"):
        Examples(("a", "b"), (0,), NAMES)
    with pytest.raises(ValueError, match="unknown scale"):
        load_task("sentiment", scale="huge")


def test_no_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="BDUTILS_SCALE=small, which needs no hub"):
        load_task("sst2", scale="full")


def test_a_defense_gets_no_other_role(toy_task, tiny):
    with pytest.raises(TypeError, match="TestSet"):
        Context(tiny, toy_task.test)
    with pytest.raises(TypeError, match="TestSet"):
        Context(tiny, toy_task.clean, toy_task.test)
    with pytest.raises(TypeError, match="Examples"):
        Context(tiny, Examples(("a",), (0,), NAMES))


def everything_in(thing, seen=None):
    """Collect all objects inside the fields and items of a value."""
    seen = {} if seen is None else seen
    if id(thing) not in seen:
        seen[id(thing)] = thing
        inside = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
        inside += thing if isinstance(thing, (tuple, list)) else []
        inside += thing.values() if isinstance(thing, dict) else []
        for child in inside:
            everything_in(child, seen)
    return seen.values()


def test_a_defender_cannot_reach_the_secrets(toy_task, tiny):
    from bdutils.attacks.base import PoisonConfig, PoisonRecord, poison_dataset
    from bdutils.attacks.text import BadNets
    from bdutils.evaluation import Victim
    from bdutils.training import TrainConfig, TrainReport

    train, record = poison_dataset(toy_task.train, BadNets(), PoisonConfig(poison_rate=0.3))
    made = Victim(tiny, toy_task, train, record, TrainConfig(), TrainReport((), 0, 0))
    secrets = {id(toy_task.test), id(record), id(record.trigger), id(record.poisoned),
               id(record.config), id(record.sources)}
    # The walk does find the secrets where they are, so its silence below means something.
    assert secrets <= {id(x) for x in everything_in(made)}
    given = made.context()
    reached = list(everything_in(given))
    assert not secrets & {id(x) for x in reached}
    assert not any(isinstance(x, (PoisonRecord, TestSet, BadNets)) for x in reached)
    data = [given.clean, given.train]
    assert {type(x) for x in everything_in(data)} == {CleanSet, TrainSet, list, tuple, str, int}
    assert not hasattr(given.train, "poisoned")


@pytest.mark.parametrize("source", ["sentiment", "topic8", "reviews.csv"])
def test_a_folder_that_would_not_be_read_is_rejected(source, tmp_path):
    with pytest.raises(ValueError, match="leave out folder"):
        load_task(source, folder=tmp_path, scale="small")


def test_a_table_of_texts_is_no_array_of_images():
    with pytest.raises(ValueError, match="give texts as a list or as one column"):
        make_task(np.array([["a film"], ["a play"]]), [0, 1])
