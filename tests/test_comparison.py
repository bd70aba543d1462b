"""The comparison: nothing is missing without a reason, and its arithmetic is right."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.images import TRAINING, thirds

from bdutils.attacks.base import PoisonConfig
from bdutils.attacks.image import BadNetsPatch
from bdutils.evaluation import Victim
from bdutils.experiments import comparison, results
from bdutils.experiments import run as running
from bdutils.experiments.comparison import (
    ABSENT,
    ATTACKS,
    NAMES,
    NEEDS,
    RARE,
    USUAL,
    collect,
    row_of,
)
from bdutils.experiments.variants import VARIANTS, WITH_TRAIN_SET
from bdutils.plotting import SortableTable
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import train, untrained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def frame():
    return collect()


def made(defense, attack="badnets", seed=0, asr=0.1, cacc=0.85, task="snippets", rate=None,
         **more):
    """Return what a record holds, as far as the comparison reads it."""
    def share(value):
        return {"value": value, "n": 500, "low": value - 0.01, "high": value + 0.01}

    rate = (0.2 if task == "snippets" else 0.1) if rate is None else rate
    found = {"cacc": cacc, "cacc_before": 0.9}
    if attack != "clean":
        found |= {"asr": asr, "asr_before": 1.0, "floor": 0.1, "pacc": 0.8, "clean_pacc": 0.9}
    return {"task": task, "method": attack, "seed": seed, "name": "toy", "seconds": {"a": 1.0},
            "settings": {"poison_rate": rate, "defense": defense},
            "metrics": {name: share(value) for name, value in (found | more).items()}}


def table_of(runs):
    return pd.DataFrame([row_of(run) for run in runs])


def grid(der_of, seeds=3):
    """Return a frame of texts in which a defense has a given ASR: der_of(name, attack, seed)."""
    return table_of([
        made(name, attack, seed, asr=der_of(name, attack, seed))
        for name in ("bedkd", "dup", "onion") for attack in USUAL["text"]
        for seed in range(seeds)])


# ------------------------------------------------------------------------- what is recorded


def test_no_cell_is_missing_without_a_reason(frame):
    there = set(zip(frame["kind"], frame["defense"], frame["attack"]))
    for kind, attacks in USUAL.items():
        for name, attack in itertools.product(NAMES.values(), (*attacks, "clean")):
            reason = ABSENT.get((kind, name))
            assert ((kind, name, attack) in there) != bool(reason), (kind, name, attack)


def test_the_seeds_that_every_cell_has(frame):
    wanted = {0, 1, 2}
    for kind in USUAL:
        assert wanted <= set(comparison.compared(frame, kind)["seed"]), kind
        for attack in ("clean", f"{RARE[kind]}, rare"):
            rows = frame[frame["kind"].eq(kind) & frame["attack"].eq(attack)]
            assert set(rows["defense"]) == set(frame[frame["kind"].eq(kind)]["defense"])
            assert all(wanted <= set(of["seed"]) for _, of in rows.groupby("defense")), kind


def test_every_row_says_what_it_was_measured_on(frame):
    for run in frame["run"]:
        assert run["command"].startswith("python -m bdutils.sweep ")
        # A defended and an undefended model of a cell were measured on the same samples.
        assert run["metrics"]["cacc"]["n"] == run["metrics"]["cacc_before"]["n"] >= 1000
    data = frame.groupby("kind")["run"].agg(lambda runs: {run["data"] for run in runs})
    assert all(len(found) == 1 for found in data)


def test_all_runs_of_a_cell_before_the_defense_are_the_same_model(frame):
    """Defenses are compared on the same victims."""
    attacked = frame[frame["attack"] != "clean"]
    for _, rows in attacked.groupby(["kind", "attack", "seed"]):
        before = [results.value(run, "asr_before") for run in rows["run"]]
        # Threads and machines move a trained model a little.
        assert max(before) - min(before) < 0.06


# ------------------------------------------------------------------------------- arithmetic


def test_a_row_by_hand():
    row = row_of(made("ft-text"))
    assert row["defense"] == "fine-tuning" and row["kind"] == "text"
    assert row["lost"] == pytest.approx(0.05) and row["excess"] == 0
    assert row["gap"] == pytest.approx(0.1) and row["der"] == pytest.approx(0.925)
    assert row_of(made("ft", "badnets", task="fashion"))["kind"] == "image"


@pytest.mark.parametrize("run", [
    made("bedkd-forced"), made("", "badnets"), made("bedkd", rate=0.05),
    made("bedkd", task="topics"), made("dup", "several"),
    made("ft", "badnets", task="fashion", rate=0.01)])
def test_runs_of_other_studies_are_left_out(run):
    assert row_of(run) is None


def test_rare_and_clean_runs_are_cases_of_their_own():
    rare = row_of(made("bedkd", RARE["text"], rate=0.01))
    assert rare["attack"] == "addsent, rare" and "der" in rare
    clean = row_of(made("bedkd", "clean", rate=0.0))
    assert clean["attack"] == "clean" and "der" not in clean
    assert clean["lost"] == pytest.approx(0.05)


def test_a_run_that_is_there_twice_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "load", lambda study, folder: [made("bedkd")])
    with pytest.raises(ValueError, match="recorded twice: .'toy'."):
        collect(("a", "b"), tmp_path)


def test_a_clear_order_is_never_chance_and_a_tie_is():
    quality = {"bedkd": 0.1, "dup": 0.5, "onion": 0.9}
    clear = comparison.resampled(grid(lambda name, *_: quality[name]), "text", 500)
    assert list(clear.rank(axis=1, ascending=False).mean().sort_values().index) == [
        "BeDKD", "DUP", "ONION"]
    assert (comparison.ahead(clear) == 1).all()
    # One is better on two attacks, the other on the other two.
    swap = {("bedkd", a): 0.1 + 0.6 * (i < 2) for i, a in enumerate(USUAL["text"])} | {
        ("dup", a): 0.1 + 0.6 * (i >= 2) for i, a in enumerate(USUAL["text"])}
    tied = comparison.resampled(grid(lambda name, attack, _: swap.get((name, attack), 0.95)),
                                "text", 2000)
    share = (tied["BeDKD"] > tied["DUP"]).mean()
    assert 0.2 < share < 0.5 and (tied["ONION"] < tied["DUP"]).mean() > 0.9
    low, high = tied["BeDKD"].quantile([.025, .975])
    assert low < tied["BeDKD"].mean() < high and high - low > 0.2


def test_a_draw_is_the_same_for_all_defenses():
    """One that is a constant worse loses every draw, however much the attacks differ."""
    hard = dict(zip(USUAL["text"], (0.0, 0.3, 0.6, 0.9)))
    drawn = comparison.resampled(grid(
        lambda name, attack, seed: hard[attack] + 0.02 * seed + 0.01 * (name == "dup")),
        "text", 300)
    np.testing.assert_allclose(drawn["BeDKD"] - drawn["DUP"], 0.005)
    assert drawn["BeDKD"].std() > 0.05


def test_only_seeds_that_every_defense_has_are_compared():
    """A defense with an easy seed more than the others would have an advantage."""
    frame = grid(lambda name, attack, seed: 0.0 if seed == 2 else 0.5)
    assert len(comparison.compared(frame, "text")) == 36
    lacking = frame[~(frame["defense"].eq("DUP") & frame["seed"].eq(2)
                      & frame["attack"].eq("stylebkd"))]
    assert set(comparison.compared(lacking, "text")["seed"]) == {0, 1}
    assert comparison.resampled(lacking, "text", 50).to_numpy().max() < 0.75
    with pytest.raises(ValueError, match="no seed of text has every run: .*of 4"):
        comparison.compared(frame.iloc[[0, 4, 9]], "text")


def test_standings_by_hand():
    frame = pd.concat([grid(lambda name, attack, _: 0.9 if attack == "stylebkd" and name == "dup"
                            else {"bedkd": 0.1, "dup": 0.2, "onion": 1.0}[name]),
                       table_of([made(name, "clean", seed, cacc=0.9 - loss, rate=0.0)
                                 for name, loss in (("bedkd", 0.01), ("dup", 0.02), ("onion", 0))
                                 for seed in range(3)])])
    table = comparison.standings(frame, "text")
    assert list(table.index) == ["BeDKD", "DUP", "ONION"]
    assert list(table["worst ASR"]) == [10.0, 90.0, 100.0] and table.loc["DUP", "on"] == "StyleBkd"
    assert list(table["lost, clean"]) == [1.0, 2.0, 0.0] and set(table["lost"]) == {5.0}
    assert table.loc["BeDKD", "DER"] == pytest.approx(0.925, abs=0.006)
    assert table.loc["BeDKD", "rank"] == "1 [1, 1]"
    assert list(comparison.advice(frame, "text", ()).index) == ["ONION"]
    assert list(comparison.advice(frame, "text", ("training set", "weights")).index) == [
        "BeDKD", "DUP", "ONION"]
    with pytest.raises(ValueError, match="unknown: .'money'.*training set"):
        comparison.advice(frame, "text", ("money",))


def test_every_defense_says_what_it_needs():
    assert set(NEEDS) == set(NAMES.values())
    for variant, name in NAMES.items():
        given = isinstance(VARIANTS[variant], WITH_TRAIN_SET)
        assert ("training set" in NEEDS[name]) == given, name


def test_tables_name_attacks_as_the_field_does(frame):
    shown = comparison.leaderboard(frame).shown
    assert {*shown["attack"]} == {*ATTACKS.values(), "clean"}
    for kind, keys in USUAL.items():
        assert {*shown[shown["kind"].eq(kind)]["attack"]} == {
            "clean", *(ATTACKS[key] for key in (*keys, f"{RARE[kind]}, rare"))}


def test_the_leaderboard_is_plain_html_that_can_be_sorted(frame):
    board = comparison.leaderboard(frame)
    page = board._repr_html_()
    assert page.count("<tr>") == 1 + len(board.shown) and "<script" not in page
    assert 'class="dataframe bd-sortable"' in page and "data-order" in page
    ders = board.order["DER"]
    assert list(ders) == sorted(ders, reverse=True)
    for name, unit in (("ASR", 100), ("DER", 100), ("s", 1)):
        for shown, key in zip(board.shown[name], board.order[name]):
            assert not shown or float(shown.split()[0]) == pytest.approx(unit * key, abs=0.051)
    tags = SortableTable(pd.DataFrame([["<b>"]], columns=["&"]), pd.DataFrame([['"']]), "c")
    assert "&lt;b&gt;" in tags._repr_html_() and "&amp;" in tags._repr_html_()
    with pytest.raises(ValueError, match="cannot be sorted by"):
        SortableTable(pd.DataFrame([[1]]), pd.DataFrame([[1, 2]]), "")


def test_reported_figures_have_a_source_that_is_in_the_bibliography():
    keys = re.findall(r"@\w+\{(\w+),", (ROOT / "references.bib").read_text())
    for row in json.loads((ROOT / "data/reported.json").read_text()):
        assert row["source"] in keys and row["defense"] in NAMES.values()
        assert row["attack"] in USUAL[row["kind"]]
        assert all(0 <= row[name] <= 100 for name in ("asr", "cacc", "asr_before", "cacc_before"))


# ------------------------------------------------------------------------------- re-learning


@pytest.fixture(scope="module")
def victim():
    task = Task("thirds", thirds(TrainSet, 300, 0), thirds(CleanSet, 60, 1),
                thirds(TestSet, 120, 2), "made here")
    train_set, record = BadNetsPatch().poison(task.train, PoisonConfig(0.2, 0))
    model = untrained(train_set, TRAINING)
    train(model, train_set, TRAINING)
    return Victim(model, task, train_set, record, TRAINING, None)


def test_a_lesson_has_as_many_triggered_samples_as_it_says(victim, monkeypatch):
    lessons = []
    monkeypatch.setattr(running, "train", lambda model, lesson, config: lessons.append(lesson))
    found = running.relearned(victim.classifier, victim, 0)
    assert list(found) == [f"asr_after_{dose}" for dose in running.DOSES]
    clean = {p.numpy().tobytes(): y for p, y in
             zip(victim.task.train.inputs.pixels, victim.task.train.labels)}
    poisoned = {victim.task.train.inputs.pixels[i].numpy().tobytes()
                for i, hit in enumerate(victim.record.poisoned) if hit}
    for dose, lesson in zip(running.DOSES, lessons):
        triggered = [y for p, y in zip(lesson.inputs.pixels, lesson.labels)
                     if p.numpy().tobytes() not in clean]
        assert triggered == [0] * dose and len(lesson) == dose + running.PLAIN
        assert not poisoned & {p.numpy().tobytes() for p in lesson.inputs.pixels}


def test_too_few_samples_for_a_lesson_are_rejected(victim):
    task = replace(victim.task, train=victim.task.train.take(range(200)))
    with pytest.raises(ValueError, match="50 triggered samples beside 100 clean ones needs more"):
        running.relearned(victim.classifier, replace(victim, task=task, record=replace(
            victim.record, poisoned=victim.record.poisoned[:200])), 0)


def test_a_model_that_never_saw_the_trigger_learns_it_from_enough_samples(victim):
    clean = untrained(victim.task.train, TRAINING)
    train(clean, victim.task.train, TRAINING)
    before = [p.clone() for p in clean.model.parameters()]
    found = running.relearned(clean, replace(victim, training=replace(TRAINING, lr=0.2)), 0)
    assert all((a == b).all() for a, b in zip(before, clean.model.parameters()))
    rates = [rate.value for rate in found.values()]
    assert rates[0] < 0.2 and rates[-1] > rates[0] + 0.3


# ------------------------------------------------------------------------ the first page's figure


@pytest.fixture
def landing():
    from tools.sphinx import landing

    return landing


def test_the_first_page_has_every_attack_and_every_defense(frame, landing):
    assert {*landing.ATTACKS} == {(kind, key) for kind, keys in USUAL.items() for key in keys}
    for kind, attacks in USUAL.items():
        for attack in attacks:
            found = landing.models(frame[frame["kind"].eq(kind) & frame["attack"].eq(attack)])
            left = [float(asr.split()[0]) for _, asr, _ in found[1:-1]]
            assert left == sorted(left)
            assert {name for name, *_ in found} == {
                *frame[frame["kind"].eq(kind)]["defense"], *landing.MODEL}


def test_a_bar_is_as_long_as_its_rate(landing):
    defended = [made("bedkd", seed=seed, asr=0.2 + seed / 10) for seed in (0, 1, 2)]
    found = landing.models(table_of([*defended, made("dup", asr=0.25)]))
    assert [name for name, *_ in found] == [landing.MODEL[0], "DUP", "BeDKD", landing.MODEL[1]]
    assert [asr.split()[0] for _, asr, _ in found] == ["100.0", "25.0", "30.0", "10.0"]
    text = landing.table_of([("a <b>", "30.0 [1.0, 60.0]", "")], "of \"c\"")
    assert 'width:30.0%' in text and "a &lt;b&gt;" in text and "of &quot;c&quot;" in text


# ----------------------------------------------------------------------------- made again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuning", "STRIP"])
def test_a_cell_made_again_lies_in_its_interval(frame, name, tmp_path):
    """By the printed command, from nothing but what a fresh machine has."""
    rows = frame[frame["kind"].eq("image") & frame["defense"].eq(name)
                 & frame["attack"].eq("badnets")]
    chosen = rows[rows["seed"].eq(0)]["run"].item()
    command = shlex.split(chosen["command"])
    assert command[:3] == ["python", "-m", "bdutils.sweep"]
    subprocess.run([sys.executable, *command[1:], "--results", str(tmp_path)], check=True,
                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    again = results.read(results.place(chosen["study"], chosen["name"], tmp_path))
    for metric in ("asr", "cacc"):
        assert results.value(again, metric) in results.interval(list(rows["run"]), metric), metric
    assert again["data"] == chosen["data"]
    # A setting that was added later has a default that changes nothing.
    now, then = again["settings"], chosen["settings"]
    assert now.pop("defense_settings").items() >= then["defense_settings"].items()
    assert now.items() == {k: v for k, v in then.items() if k != "defense_settings"}.items()
