"""The comparison: nothing is missing without a reason, its orders hold, its sums are right."""

import itertools
import json
import math
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
from bdutils.data import load_task
from bdutils.evaluation import Victim, evaluate
from bdutils.experiments import comparison, results
from bdutils.experiments import run as running
from bdutils.experiments.comparison import (
    ABSENT,
    ATTACKS,
    HOLDS,
    LATER,
    MEASURES,
    NAMES,
    NEEDS,
    OLDER,
    ONCE,
    ORDERS,
    RARE,
    STUDIES,
    USUAL,
    WHOSE,
    ahead,
    collect,
    entry_of,
    summary,
    usual,
)
from bdutils.experiments.studies import Run
from bdutils.experiments.variants import CLEAN_IMAGES, VARIANTS, WITH_TRAIN_SET
from bdutils.plotting import SortableTable
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import train, untrained

ROOT = Path(__file__).resolve().parent.parent
PAGE = json.loads((ROOT / "chapters/13_comparison.ipynb").read_text(encoding="utf8"))
CLAIMS = PAGE["metadata"]["claims"]
SHOWN = {key: WHOSE.get(key, name) for key, name in NAMES.items()}
MAIN = [name for key, name in SHOWN.items()
        if key not in ("spectral", "ac", "abl", "cube", "clp", "ft_sweep")]


@pytest.fixture(scope="module")
def frame():
    return collect()


@pytest.fixture(scope="module")
def whole():
    """With the defenses that the first page leaves out."""
    return collect(STUDIES + OLDER)


def made(defense, attack="badnets", seed=0, asr=0.1, cacc=0.85, task="snippets", rate=None,
         **more):
    """Return what a record holds, as far as the comparison reads it."""
    def share(value):
        return {"value": value, "n": 500, "low": value - 0.01, "high": value + 0.01}

    rate = (0.2 if task == "snippets" else 0.1) if rate is None else rate
    found = {"cacc": cacc, "cacc_before": 0.9}
    if attack != "clean":
        found |= {"asr": asr, "asr_before": 1.0, "floor": 0.1, "pacc": 0.8, "clean_pacc": 0.9,
                  "ra": 1 - asr}
    return {"task": task, "method": attack, "seed": seed, "name": "toy", "seconds": {"a": 1.0},
            "settings": {"poison_rate": rate, "defense": defense,
                         "defense_settings": {"margin": {}, "contrast": 3.0}},
            "metrics": {name: share(value) for name, value in (found | more).items()}}


def table_of(runs):
    return pd.DataFrame([entry_of(run) for run in runs])


def grid(asr_of, seeds=3, **more):
    """Return a frame of texts in which a defense has a given ASR: asr_of(name, attack, seed)."""
    return table_of([
        made(name, attack, seed, asr=asr_of(name, attack, seed), **more)
        for name in ("bedkd", "dup", "onion") for attack in USUAL["text"]
        for seed in range(seeds)])


# ------------------------------------------------------------------------- what is recorded


def test_no_cell_is_missing_without_a_reason(frame):
    for kind, attacks in USUAL.items():
        whole = usual(frame, kind)
        clean = frame[frame["kind"].eq(kind) & frame["attack"].eq("clean")]
        for name, attack in itertools.product(MAIN, attacks):
            there = ((whole["defense"] == name) & (whole["attack"] == attack)).any()
            assert there != ((kind, name) in ABSENT), (kind, name, attack)
        assert set(clean["defense"]) == set(whole["defense"])


def test_the_seeds_that_every_cell_has(frame):
    for kind in USUAL:
        rare = frame[frame["kind"].eq(kind) & frame["rate"].eq(0.01)
                     & frame["attack"].eq(RARE[kind])]
        clean = frame[frame["kind"].eq(kind) & frame["attack"].eq("clean")]
        for cells in (usual(frame, kind), rare, clean):
            assert set(cells["defense"]) == set(frame[frame["kind"].eq(kind)]["defense"])
            assert all({0, 1, 2} <= set(of["seed"])
                       for _, of in cells.groupby(["defense", "attack"])), kind


def test_every_run_says_what_it_was_measured_on(frame):
    for run in frame["run"]:
        assert run["command"].startswith("python -m bdutils.sweep ")
        # A defended and an undefended model of a cell were measured on the same samples.
        assert run["metrics"]["cacc"]["n"] == run["metrics"]["cacc_before"]["n"] >= 1000
    data = frame.groupby("kind")["run"].agg(lambda runs: {run["data"] for run in runs})
    assert all(len(found) == 1 for found in data)


def test_all_runs_of_a_cell_before_the_defense_are_the_same_model(frame):
    """Defenses are compared on the same victims."""
    attacked = frame[frame["attack"] != "clean"]
    for _, runs in attacked.groupby(["kind", "attack", "seed", "rate"]):
        # Threads and machines move a trained model a little.
        assert runs["before"].max() - runs["before"].min() < 6


def test_what_ran_once_has_one_seed(frame):
    once = collect(ONCE)
    assert set(once["seed"]) == {0}
    assert set(once["defense"]) == {WHOSE["bedkd-authors"], WHOSE["dup-authors"],
                                    "fine-tuning (chosen rate)"}
    assert set(once["kind"]) == {"text"}
    assert not set(once["defense"]) & set(usual(frame, "text")["defense"])


def test_the_older_defenses_have_every_attack_and_seed_and_a_clean_model():
    older = collect(OLDER)
    both = {"Spectral Signatures", "Activation Clustering"}
    assert set(older[older["kind"].eq("image")]["defense"]) == {
        *both, "ABL", "CLP", "fine-tuning (chosen rate)"}
    assert set(older[older["kind"].eq("text")]["defense"]) == {
        *both, "CUBE", WHOSE["dup-retraining"]}
    for (kind, _), runs in older.groupby(["kind", "defense"]):
        assert {(attack, seed) for attack, seed in zip(runs["attack"], runs["seed"])} == set(
            itertools.product([*USUAL[kind], "clean"], (0, 1, 2)))


# ------------------------------------------------------------------------------------ orders


def sentences(page):
    """Return the sentences of a notebook's text that name two defenses and compare them."""
    text = " ".join("".join(cell["source"]) for cell in page["cells"]
                    if cell["cell_type"] == "markdown")
    text = re.sub(r"\n:::\{solution.*?\n:::|\n\|.*", " ", text, flags=re.DOTALL | re.MULTILINE)
    word = re.compile(r"\b(ahead|better|worse|best|worst|nearer|beats?|first|outperforms?)\b")
    for sentence in re.split(r"(?<=[.!?:])\s+", text):
        named = [name for name in NAMES.values() if re.search(
            rf"(?<![\w-]){re.escape(name)}(?![\w-])", sentence)]
        if len(named) > 1 and word.search(sentence) and not re.search(
                r"no order|over\b.*:|^- |no rank", sentence):
            yield sentence


def contradicted(claims, frame, most=0.2):
    """Return which claims of an order a measure contradicts, in more than this share of draws."""
    return [f"{claim['kind']}: {one} over {other} by {name}: {share:.0%} of the draws"
            for claim in claims for one in claim["better"] for other in claim["than"]
            for name, share in ahead(frame, claim["kind"], one, other).items()
            if share < 1 - most]


@pytest.mark.parametrize("seeds", [LATER, (0, 1, 2)])
def test_no_measure_contradicts_an_order_that_the_page_claims(whole, seeds, monkeypatch):
    """By distance, PACC gap, RA and DER, in at most 20% of the draws."""
    monkeypatch.setattr(ahead, "__defaults__", (seeds,))
    assert contradicted(CLAIMS, whole) == []


def test_every_order_in_the_text_is_a_claim():
    text = re.sub(r"\s+", " ", " ".join("".join(cell["source"]) for cell in PAGE["cells"]
                                       if cell["cell_type"] == "markdown"))
    for claim in CLAIMS:
        assert claim["sentence"] in text
        assert not {*claim["better"], *claim["than"]} - {*SHOWN.values(), *WHOSE.values()}
    begins = tuple(claim["sentence"] for claim in CLAIMS)
    assert [s for s in sentences(PAGE) if not re.sub(r"\s+", " ", s).startswith(begins)] == []


def test_a_claim_that_is_not_in_the_list_is_noticed():
    cell = {"cell_type": "markdown", "source": ["So NAD is better than I-BAU. ONION is not."]}
    assert list(sentences({"cells": [cell]})) == ["So NAD is better than I-BAU."]


def test_a_claim_that_one_measure_contradicts_is_noticed():
    """Ending below the floor helps DER without the clip, and no other measure here."""
    asr = {"bedkd": 0.15, "dup": 0.3, "onion": 0.9}
    runs = grid(lambda name, *_: asr[name])
    claim = {"kind": "text", "better": ["BeDKD (ours)"], "than": ["DUP (ours)", "ONION"]}
    pacc = runs["defense"].map({"BeDKD (ours)": 0.0, "DUP (ours)": 5.0, "ONION": 40.0})
    assert contradicted([claim], runs.assign(gap=pacc)) == []
    found = contradicted([claim], runs.assign(gap=-pacc))
    assert len(found) == 2 and all("by gap: 0% of the draws" in line for line in found)
    # Not a tie either: half of the draws is too few.
    rng = np.random.default_rng(0)
    assert contradicted([claim], runs.assign(gap=rng.normal(size=len(runs))))


def test_the_four_measures_have_their_directions(frame):
    for kind in USUAL:
        whole = usual(frame, kind).groupby("defense")[list(ORDERS)].mean()
        signs = pd.Series(ORDERS)
        assert signs[whole.corr()["distance"] < 0].eq(1).all()
    assert set(ORDERS) <= set(MEASURES)


# --------------------------------------------------------------------------------- the tree


def evidence(frame, kind, defense, what):
    """Return the text of a leaf."""
    if "@" in what:
        attack, rate = what.split("@")
        cell = frame[frame["rate"].eq(float(rate[:-1]) / 100) & frame["attack"].eq(attack)
                     & frame["kind"].eq(kind) & frame["defense"].eq(defense)]
        return f"{cell['distance'].mean():.0f}"
    if what in ATTACKS:
        cell = usual(frame, kind, LATER).query("defense == @defense and attack == @what")
        return f"{cell['distance'].mean():.0f}"
    if what == "clean" and defense == "defender":
        return str(CLEAN_IMAGES if kind == "image" else len(load_task("sentiment").clean))
    found = summary(frame, kind).loc[defense, what]
    if isinstance(found, str):
        return found
    return f"{found:+.0f}".replace("-", "−") if what == "worst" else f"{found:.0f}"


def test_the_leaves_of_the_tree_say_what_the_records_say(frame):
    text = (ROOT / "chapters/images/decide.svg").read_text(encoding="utf8")
    leaves = re.findall(r'<tspan data-of="([^"|]+)\|([^"|]+)\|([^"|]+)">([^<]+)</tspan>', text)
    assert len(leaves) >= 15 and text.count("nothing here works") == 2
    wanted = {leaf[:3]: evidence(frame, *leaf[:3]) for leaf in leaves}
    assert {leaf[:3]: leaf[3] for leaf in leaves} == wanted
    # Each number of a leaf is such an evidence.
    bare = re.sub(r"<!--.*?-->|<style.*?</style>|<tspan.*?</tspan>", "", text, flags=re.DOTALL)
    assert not re.findall(r">[^<]*\d[^<]*<", re.sub("1% poison|SST-2", "", bare))


def test_the_tree_recommends_only_what_the_branch_holds(frame):
    assert NEEDS["I-BAU"] == HOLDS[1] and NEEDS["STRIP"] == HOLDS[2]
    assert all(NEEDS[WHOSE[key]] == HOLDS[0] for key in ("bedkd", "dup", "ntml"))
    for kind, holds, best in (("image", "weights", "I-BAU"), ("text", "weights", "FT-SAM"),
                              ("image", "training set", WHOSE["ntml"])):
        table = summary(frame, kind)
        assert table[table["holds"] == holds].index[0] == best


# ------------------------------------------------------------------------------- arithmetic


def test_an_entry_by_hand():
    entry = entry_of(made("ft-text"))
    assert entry["defense"] == "fine-tuning" and entry["kind"] == "text"
    assert entry["lost"] == pytest.approx(5) and entry["distance"] == 0
    assert entry["gap"] == pytest.approx(10) and entry["der"] == pytest.approx(92.5)
    assert entry_of(made("ft", "badnets", task="fashion"))["kind"] == "image"


def test_all_that_is_compared_is_of_the_present_form(frame):
    for key, setting in (("bedkd", "margin"), ("dup", "contrast")):
        runs = frame[frame["defense"].eq(WHOSE[key]) & frame["kind"].eq("text")]["run"]
        assert len(runs) > 15 and hasattr(VARIANTS[key], setting)
        assert all(setting in run["settings"]["defense_settings"] for run in runs)


def test_the_floor_counts_from_both_sides():
    below, at, above = (entry_of(made("dup", asr=asr)) for asr in (0.0, 0.1, 0.2))
    assert below["distance"] == above["distance"] == pytest.approx(10) and at["distance"] == 0
    assert below["der"] == at["der"] > above["der"]  # clipped: nothing is earned below the floor
    assert comparison.distance(4.0, 12.0) == comparison.distance(20.0, 12.0) == 8.0


@pytest.mark.parametrize("run", [
    made("bedkd-forced"), made("", "badnets"), made("bedkd", task="topics"),
    made("dup", "several"), made("dup", asr_before=0.12)])
def test_runs_of_other_studies_and_without_a_backdoor_are_left_out(run):
    assert entry_of(run) is None


def test_rare_and_clean_runs_are_not_the_usual_ones():
    frame = table_of([made("bedkd", RARE["text"], rate=0.01), made("bedkd", "clean", rate=0.0),
                      made("bedkd", RARE["text"], seed=1)])
    assert list(usual(frame, "text")["seed"]) == [1]
    assert frame["der"].isna().tolist() == [False, True, False]
    assert frame["lost"].tolist() == pytest.approx([5, 5, 5])


def test_a_run_that_is_there_twice_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "load", lambda study, folder: [made("bedkd")])
    with pytest.raises(ValueError, match="recorded twice: .'toy'."):
        collect(("a", "b"), tmp_path)


def test_a_clear_order_is_never_chance_and_a_tie_is():
    quality = {"bedkd": 0.1, "dup": 0.5, "onion": 0.9}
    clear = grid(lambda name, *_: quality[name])
    assert list(summary(clear, "text").index) == ["BeDKD (ours)", "DUP (ours)", "ONION"]
    assert ahead(clear, "text", "BeDKD (ours)", "DUP (ours)")["distance"] == 1
    # One is better on two attacks, the other on the other two.
    swap = {("bedkd", a): 0.1 + 0.6 * (i < 2) for i, a in enumerate(USUAL["text"])} | {
        ("dup", a): 0.1 + 0.6 * (i >= 2) for i, a in enumerate(USUAL["text"])}
    tied = grid(lambda name, attack, _: swap.get((name, attack), 0.95))
    assert 0.2 < ahead(tied, "text", "BeDKD (ours)", "DUP (ours)")["distance"] < 0.5
    line = summary(tied, "text").loc["BeDKD (ours)"]
    assert line["low"] < line["distance"] < line["high"] and line["high"] - line["low"] > 20


def test_a_draw_is_the_same_for_defenses_with_the_same_models():
    """One that is a constant worse loses every draw, however much attacks and seeds differ."""
    hard = dict(zip(USUAL["text"], (0.1, 0.3, 0.6, 0.8)))
    runs = grid(lambda name, attack, seed: hard[attack] + 0.05 * seed + 0.01 * (name == "dup"))
    drawn = comparison.resampled(runs, "text")
    np.testing.assert_allclose(drawn["DUP (ours)"] - drawn["BeDKD (ours)"], 1)
    assert drawn["BeDKD (ours)"].std() > 5


def test_models_that_were_trained_anew_have_seeds_of_their_own():
    """The seed of one says nothing of the other's; the attack is still the same."""
    def spread_of(frame):
        drawn = comparison.resampled(frame, "text")
        return (drawn["DUP (ours)"] - drawn["BeDKD (ours)"]).std()

    runs = [made(name, attack, seed, asr=0.2 + 0.2 * seed) for name in ("bedkd", "dup")
            for attack in USUAL["text"] for seed in range(3)]
    anew = [run if run["settings"]["defense"] == "dup" else made(
        "bedkd", run["method"], run["seed"], run["metrics"]["asr"]["value"], cacc_before=0.91)
        for run in runs]
    assert spread_of(table_of(runs)) == 0 and spread_of(table_of(anew)) > 1


def test_only_defenses_that_have_every_run_are_compared():
    """A defense with an easy seed more than the others would have an advantage."""
    runs = grid(lambda name, attack, seed: 0.1 if seed == 0 else 0.5)
    assert len(comparison.compared(runs, "text")) == 24
    assert summary(runs, "text")["distance"].tolist() == pytest.approx([40] * 3)
    lacking = runs[~(runs["defense"].eq("DUP (ours)") & runs["seed"].eq(2)
                     & runs["attack"].eq("stylebkd"))]
    assert "DUP (ours)" not in set(comparison.compared(lacking, "text")["defense"])
    with pytest.raises(ValueError, match="no defense has all attacks of text on seeds .1, 2."):
        comparison.compared(runs[runs["seed"].eq(1)], "text")


def test_a_summary_by_hand():
    frame = pd.concat([
        grid(lambda name, attack, seed: 0.9 if (name, attack, seed) == ("dup", "stylebkd", 0)
             else {"bedkd": 0.05, "dup": 0.2, "onion": 1.0}[name]),
        table_of([made(name, "clean", seed, cacc=0.9 - loss, rate=0.0)
                  for name, loss in (("bedkd", 0.01), ("dup", 0.02), ("onion", 0))
                  for seed in range(3)])])
    table = summary(frame, "text")
    assert list(table.index) == ["BeDKD (ours)", "DUP (ours)", "ONION"]
    assert table["distance"].tolist() == pytest.approx([5, 10, 90])
    # The worst run is that of all seeds, those the settings were chosen on as well.
    assert table["worst"].tolist() == pytest.approx([-5, 80, 90])
    assert table.loc["DUP (ours)", "worst_on"] == "StyleBkd, seed 0"
    assert table["clean"].tolist() == pytest.approx([1, 2, 0])
    assert table["lost"].tolist() == pytest.approx([5] * 3)


def test_every_defense_says_what_it_needs():
    assert set(NEEDS) == {*SHOWN.values(), *WHOSE.values()}
    for variant, name in (SHOWN | WHOSE).items():
        given = isinstance(VARIANTS[variant], WITH_TRAIN_SET)
        assert (NEEDS[name] == "training set") == given, name


# --------------------------------------------------------------------------------- the page


def test_tables_name_attacks_as_the_field_does(frame):
    shown = comparison.leaderboard(frame).shown
    assert {*shown["Attack"]} == {*ATTACKS.values(), "none: clean model"}
    assert {*shown["Poison"]} >= {"1%", "20%", "10%", "none"} and {*shown["Holds"]} == {*HOLDS}


def test_the_leaderboard_is_plain_html_that_can_be_sorted_and_filtered():
    board = comparison.leaderboard(collect(STUDIES + ONCE))
    page = board._repr_html_()
    assert page.count("<tr>") == 1 + len(board.shown) and "<script" not in page
    assert 'class="dataframe bd-sortable"' in page and "data-order" in page
    assert re.findall(r"<th data-filter>(\w+)<", page) == ["Data", "Holds", "Poison"]
    for name in ("ASR", "Floor", "RA", "CACC lost"):
        for shown, key in zip(board.shown[name], board.order[name]):
            assert shown == "–" or float(shown) == pytest.approx(key, abs=0.051)
    assert not board.shown.isin(["", "nan", "-0.0"]).any(axis=None)
    tags = SortableTable(pd.DataFrame([["<b>"]], columns=["&"]), pd.DataFrame([['"']]), "c")
    assert "&lt;b&gt;" in tags._repr_html_() and "&amp;" in tags._repr_html_()
    with pytest.raises(ValueError, match="cannot be sorted by"):
        SortableTable(pd.DataFrame([[1]]), pd.DataFrame([[1, 2]]), "")


def test_no_cell_of_a_table_on_the_page_is_empty():
    for cell in PAGE["cells"]:
        for output in cell.get("outputs", []):
            page = "".join(output.get("data", {}).get("text/html", ""))
            body = page.partition("<tbody>")[2]
            assert not re.search(r"<td[^>]*>\s*(nan|NaN|None)?\s*</td>", body), cell["id"]


def test_reported_figures_have_a_source_that_is_in_the_bibliography():
    keys = re.findall(r"@\w+\{(\w+),", (ROOT / "references.bib").read_text())
    for entry in json.loads((ROOT / "data/reported.json").read_text()):
        assert entry["source"] in keys and entry["defense"] in NAMES.values()
        assert entry["attack"] in USUAL[entry["kind"]]
        assert all(0 <= entry[name] <= 100
                   for name in ("asr", "cacc", "asr_before", "cacc_before"))


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


def test_a_clean_model_is_measured_with_the_trigger_of_each_attack(victim, monkeypatch):
    asked = []

    def trained(run, benchmark):
        asked.append(run)
        return victim, victim, 0

    monkeypatch.setattr(running, "_trained", trained)
    run = Run("images", None, 0.0, 2, defense="ft")
    found = running.on_every_attack(run, victim)(victim.classifier)
    assert [r.seed for r in asked] == [2] * 6 and not any(r.defense for r in asked)
    assert {name for name in found if "_" in name} == {
        f"{kind}_{r.attack}" for r in asked for kind in ("asr", "pacc")}
    # The victim's own trigger stands for all here, so its ASR is found in each place.
    own = evaluate(victim.classifier, victim.task, victim.record.trigger, 0, every_class=True)
    assert found["asr_wanet"].value == own.asr.value > 0.5 > found["pacc_sig"].value
    assert own.pacc.value == found["pacc_sig"].value


def test_who_holds_more_images_than_usual_meets_another_split():
    run = Run("images", "badnets", 0.1, 0)
    asked = {name: running.sizes_of(replace(run, defense=name), small=True)
             for name in ("", "ft", "ft-500", "ft-steps-100", "ft-2500", "ft-brief-2500",
                          "anew-2500")}
    assert asked == {"": {}, "ft": {}, "ft-500": {}, "ft-steps-100": {},
                     "ft-2500": {"clean": 2500}, "ft-brief-2500": {"clean": 2500},
                     "anew-2500": {"clean": 2500}}
    text = Run("sst2", "badnets", 0.2, 0, defense="ft-text-400")
    assert running.sizes_of(text, small=True) == {"train": None, "test": None}
    assert running.sizes_of(text, small=False) == {}


# ------------------------------------------------------------------------ the first page's figure


@pytest.fixture
def landing():
    from tools.sphinx import landing

    return landing


def test_the_first_page_has_every_attack_and_every_defense(frame, landing):
    assert {*landing.ATTACKS} == {(kind, key) for kind, keys in USUAL.items() for key in keys}
    for kind, attacks in USUAL.items():
        for attack in attacks:
            cell = usual(frame, kind)
            cell = cell[cell["attack"].eq(attack)]
            found = landing.models(cell)
            away = [(line.holds == HOLDS[2],
                     cell[cell["defense"].eq(line.name)]["distance"].mean())
                    for line in found[1:-1]]
            assert away == sorted(away)
            assert {line.name for line in found} == {
                *frame[frame["kind"].eq(kind)]["defense"], *landing.MODEL}
            for line in found[1:-1]:
                own = cell[cell["defense"].eq(line.name)]
                assert line.holds == NEEDS[line.name]
                assert line.floor == pytest.approx(own["floor"].mean())


def test_the_gray_bars_of_the_first_page_are_of_all_models_that_the_defenses_met(frame, landing):
    for kind in USUAL:
        for attack, cell in usual(frame, kind).groupby("attack"):
            found, met = landing.models(cell), landing.victims(cell)
            for line, key in ((found[0], "asr_before"), (found[-1], "floor")):
                every = {(run["seed"], results.value(run, "cacc_before"),
                          results.value(run, key)) for run in cell["run"]}
                assert len(met) == len(every)
                mean = 100 * np.mean([value for *_, value in every])
                assert float(line.asr.split()[0]) == pytest.approx(mean, abs=0.06), (attack, key)
            text = landing.caption_of(cell, "")
            assert (f"met {len(met)} models" in text) == (len(met) > 3) == (kind == "image")
            assert "3 seeds" in text and f"{100 * cell['rate'].iloc[0]:.0f}% of" in text


def test_what_the_pages_say_of_bedkd_and_dup_on_sst2():
    """Points above the floor, by attack, against the sentences of three pages."""
    pages = {name: " ".join((ROOT / "chapters" / name).read_text(encoding="utf8").split())
             for name in ("index.md", "part_repair.md", "06_bedkd.ipynb", "13_comparison.ipynb")}
    above, changed = ({key: {run["method"]: of(run) for run in results.load(f"{key}-sst2")}
                       for key in ("bedkd", "dup")} for of in (
        lambda run: 100 * (results.value(run, "asr") - results.value(run, "floor")),
        lambda run: bool(run["metrics"]["changed"])))
    assert all(abs(points) < 8 for points in above["dup"].values())
    assert "DUP ends within eight points on all four attacks" in pages["index.md"]
    assert "within 8 points of the floor on SST-2" in pages["13_comparison.ipynb"]
    assert [name for name, acted in changed["bedkd"].items() if not acted] == ["stylebkd"]
    assert "leaves one attack of four intact and DUP none" in pages["part_repair.md"]
    rounded = {name: round(points) for name, points in above["bedkd"].items()}
    assert rounded == {"badnets": 4, "addsent": 2, "stylebkd": 67, "synbkd": -14}
    assert ("leaves StyleBkd intact on SST-2 with MiniLM (67 points); SynBkd ends 14 points below "
            "its floor, the others 2 and 4 above") in pages["13_comparison.ipynb"]
    assert "end 2 to 4 points above it" in pages["06_bedkd.ipynb"]
    tpr, fpr = ([round(100 * results.value(run, key)) for run in results.load("bedkd-sst2")
                 if run["method"] in ("stylebkd", "synbkd")] for key in ("tpr", "fpr"))
    assert (tpr, fpr) == ([36, 41], [14, 7])
    assert "flags 36 and 41% of their samples, at an FPR of 14 and 7%" in pages["06_bedkd.ipynb"]
    syn, = (run for run in results.load("bedkd-sst2") if run["method"] == "synbkd")
    clean = [round(100 - 100 * results.value(syn, key)) for key in ("precision", "purity")]
    assert clean == [26, 12]
    assert "26% of its suspects are clean, 12% by the estimated purity" in pages["06_bedkd.ipynb"]


def test_what_the_pages_say_of_bedkd_on_images():
    runs = results.load("bedkd-images")
    acted = {(run["method"], run["seed"]) for run in runs if run["metrics"]["changed"]}
    attacked = [run for run in runs if run["method"] != "clean"]
    assert (len(acted), len(attacked)) == (2, 18)
    assert {name for name, _ in acted} == {"label_consistent"}
    for name, said in (("index.md", "no evidence in 16 of 18 runs"),
                       ("06_bedkd.ipynb", "On images the search finds evidence in 2 of 18 runs"),
                       ("13_comparison.ipynb", "evidence in 2 of 18 runs, both of LC")):
        assert said in " ".join((ROOT / "chapters" / name).read_text(encoding="utf8").split())


def test_a_bar_is_as_long_as_its_rate(landing):
    defended = [made("bedkd", seed=seed, asr=0.2 + seed / 10) for seed in (0, 1, 2)]
    found = landing.models(table_of([*defended, made("dup", asr=0.25), made("onion", asr=0.0)]))
    assert [line.name for line in found] == [
        landing.MODEL[0], WHOSE["dup"], WHOSE["bedkd"], "ONION", landing.MODEL[1]]
    assert [line.asr.split()[0] for line in found] == ["100.0", "25.0", "30.0", "0.0", "10.0"]
    assert [line.floor for line in found] == pytest.approx([10] * 5)
    text = landing.table_of([landing.Line("a <b>", "30.0 [1.0, 60.0]", "8.0 [7.0, 9.0]", "",
                                          12.34, "weights")], "of \"c\"")
    assert 'width:30.0%' in text and "a &lt;b&gt;" in text and "of &quot;c&quot;" in text
    assert "left:12.3%" in text and "<td>8.0</td><td></td>" in text and "weights" in text


def test_the_pdf_has_the_same_numbers_as_the_first_page(frame, landing):
    cell = usual(frame, "text")
    cell = cell[cell["attack"].eq("badnets")]
    lines = landing.models(cell)
    rows = landing.plain_table_of(lines, "caption").splitlines()
    assert rows[0] == "caption" and len(rows) == len(lines) + 4
    for row, line in zip(rows[4:], lines, strict=True):
        name, asr, pacc, cacc = (part.strip() for part in row.strip("|").split("|"))
        assert name.startswith(line.name) and line.holds in name
        assert asr == line.asr and line.pacc.startswith(pacc) and line.cacc.startswith(cacc)


def test_what_the_comparison_says_of_the_errors_of_bedkd_and_dup(frame):
    page = " ".join("".join("".join(cell["source"]) for cell in PAGE["cells"]).split())
    text = usual(frame, "text")
    above = {key: (text["asr"] - text["floor"])[text["defense"].eq(WHOSE[key])]
             for key in ("bedkd", "dup")}
    assert [len(of) for of in above.values()] == [12, 12]
    assert ((above["bedkd"] > 5).sum(), (above["dup"] > 5).sum()) == (4, 0)
    assert round(above["dup"].min()) == -13
    assert ("BeDKD ends more than 5 points above the floor in four, DUP in none and once 13 below"
            in page)
    # What the mean of both classes hides: triggered samples of the target class, minus a clean
    # model's. The classes are equally large, and of two classes one has 1 - ASR.
    fewer = {}
    for key in ("bedkd", "dup"):
        fewer[key] = sorted(
            round(200 * (results.value(run, "clean_pacc") - results.value(run, "pacc"))
                  - excess(run)) for run in results.load(key)
            if run["settings"]["defense"] == key and run["method"] != "clean")
    assert fewer["dup"][-3:] == [12, 12, 17] and fewer["dup"][-4] < 6 and fewer["bedkd"][-1] < 9
    assert ("in three runs DUP gets 12 to 17 points fewer of the triggered *positive* reviews "
            "right than a clean model") in page
    at_5 = frame[frame["rate"].eq(0.05)].set_index(["defense", "attack"])["distance"]
    assert at_5[WHOSE["dup"], "badnets"] > 80 and at_5[WHOSE["bedkd"], "synbkd"] > 60
    assert "At 5% (seed 0) DUP leaves BadNets intact and BeDKD SynBkd." in page


def excess(run):
    return 100 * (results.value(run, "asr") - results.value(run, "floor"))


def spent(run):
    return 100 * (results.value(run, "cacc_before") - results.value(run, "cacc"))


def test_what_the_comparison_says_of_more_clean_samples_and_of_fewer():
    page = "".join("".join(cell["source"]) for cell in PAGE["cells"])
    seed_0 = [run for study in ("clean-counts", "ntml-counts", "baselines")
              for run in results.load(study) if run["seed"] == 0]
    runs = {(run["method"], run["settings"]["defense"]): run for run in seed_0}
    images = {key: round(excess(run)) for (attack, key), run in runs.items()
              if attack == "badnets" and run["task"] == "fashion"}
    assert abs(images["ntml-25"]) < 1 and "25 images are enough for NT-ML" in page
    assert f"I-BAU with 25 loses {spent(runs['badnets', 'ibau-25']):.0f} points" in page
    # Steps remove the backdoor, whatever the number of images; images keep the accuracy.
    few = {key: runs["badnets", key] for key in ("ft", "ft-brief-2500")}
    many = {key: runs["badnets", key] for key in ("ft-steps-100", "ft-2500")}
    assert min(map(excess, few.values())) > 90 and max(map(excess, many.values())) < 15
    assert spent(many["ft-steps-100"]) > 10 and max(
        spent(few["ft-brief-2500"]), spent(many["ft-2500"])) < 0.2
    assert "In these runs steps remove the backdoor, and images keep the accuracy." in page
    text = {key: run for (attack, key), run in runs.items() if attack == "addsent"}
    assert not any(text[f"{key}-{few}"]["metrics"]["changed"]
                   for key in ("bedkd", "dup") for few in (50, 100))
    over = {key: round(excess(run)) for key, run in text.items()}
    assert (f"With 200, DUP ends {-over['dup-200']} points below the floor and BeDKD "
            f"{over['bedkd-200']} above, with 400 DUP {-over['dup-400']} below and BeDKD "
            f"{over['bedkd-400']} above.") in page
    left = {(attack, key): round(100 * results.value(run, "asr"))
            for (attack, key), run in runs.items() if key.endswith("2500")}
    assert (f"the fixed rate leaves {left['blended', 'ft-2500']} and {left['sig', 'ft-2500']}% on "
            f"Blended and SIG, and FT-SAM {left['blended', 'ft_sam-2500']} and "
            f"{left['sig', 'ft_sam-2500']}%.") in page
    ends = {attack: 100 * results.value(run, "asr") for (attack, key), run in runs.items()
            if key == "ft_sweep-2500"}
    assert (f"at the floor on Blended ({ends['blended']:.1f}%), SIG ({ends['sig']:.1f}%) and "
            f"WaNet ({ends['wanet']:.1f}%) too") in page
    assert all(spent(runs[attack, "ft_sweep-2500"]) < 0.3 for attack in ends)
    assert all(results.value(runs[attack, "ft_sweep-2500"], "lr_share") == 2
               for attack in ("sig", "wanet"))
    # The bar: at a rate chosen on held-out images within ten points of the reported ASR, and no
    # accuracy lost.
    tuned = runs["badnets", "ft_sweep-2500"]
    assert abs(100 * results.value(tuned, "asr") - 1.7) < 1 and spent(tuned) < 0
    assert ("and one run at a rate chosen on held-out ones all of it, at no cost in accuracy"
            in page)
    # The control: a network that starts from nothing.
    new = runs["badnets", "anew-2500"]
    assert "a *new* network, trained on these images alone by the same rule" in page
    assert abs(excess(new)) < 1 and f"is {spent(new) - spent(tuned):.1f} points less" in page
    assert results.value(new, "lr_share") == 2
    later = {run["seed"]: 100 * results.value(run, "asr") for run in results.load("clean-counts")
             if run["settings"]["defense"] == "ft-2500" and run["method"] == "badnets"}
    assert f"(two more seeds: {later[1]:.0f} and {later[2]:.0f}%)" in page


def test_what_the_chapters_say_of_the_time_of_a_repair():
    """Side by side in one run; the bars were 5 and 3 times as fast."""
    for method, name, bar in (("bedkd", "06_bedkd", 5), ("dup", "08_dup", 1)):
        run = results.read(results.FOLDER / "throughput" / f"repair-{method}.json")
        page = (ROOT / f"chapters/{name}.ipynb").read_text(encoding="utf8")
        theirs, ours = (run["seconds"][f"{who}_total"] for who in ("authors", "ours"))
        assert (f"| seconds on one core (BadNets, one run) | {theirs:,.0f} | {ours:,.0f} |" in page
                and theirs / ours > bar)


def test_what_the_pages_say_of_a_backdoor_that_comes_back():
    after = {run["name"]: run for run in results.load("relearning") if run["task"] == "snippets"}
    for seed, key in itertools.product(range(3), ("bedkd", "dup")):
        never = after[f"badnets-rate0.2-seed{seed}"]
        repaired = after[f"badnets-rate0.2-seed{seed}-{key}"]
        assert results.value(repaired, "asr_after_20") > results.value(never, "floor_after_20")
    for name in ("index", "part_repair"):
        page = " ".join((ROOT / f"chapters/{name}.md").read_text(encoding="utf8").split())
        assert ("20 triggered samples bring BadNets back sooner than a clean model learns it, on "
                "three seeds") in page


def test_what_the_pages_say_of_the_older_defenses(whole):
    page = "".join("".join(cell["source"]) for cell in PAGE["cells"])
    swept = usual(whole, "image", LATER).query("defense == 'fine-tuning (chosen rate)'")
    kept = sum(results.value(run, "lr_share") == 0.1 for run in swept["run"])
    assert (kept, len(swept)) == (8, 12) and "keeps that rate in eight of twelve runs" in page
    page = (ROOT / "chapters/10_baselines.ipynb").read_text(encoding="utf8")
    older = {name: runs for name, runs in usual(whole, "image").groupby("defense")}
    abl = older["ABL"].sort_values("asr")
    assert [*abl["attack"][:2]] == ["label_consistent", "badnets"]
    assert (f"one BadNets model to {abl['asr'].iloc[1]:.0f}% and one of Label-Consistent to "
            f"{abl['asr'].iloc[0]:.0f}%, the rest to {abl['asr'].iloc[2]:.0f}% or more, at a "
            f"cost of {abl['lost'].min():.0f} to {abl['lost'].max():.0f} points") in page
    for name, said in (("CLP", "7, 38 and 82% on Input-Aware"),
                       ("fine-tuning (chosen rate)", "80 to 99% on BadNets")):
        attack = "input_aware" if name == "CLP" else "badnets"
        seen = older[name].loc[older[name]["attack"].eq(attack), "asr"].round().astype(int)
        assert said in page and {min(seen), max(seen)} <= {int(x) for x in re.findall(
            r"\d+", said)}
    rest = pd.concat([older["Spectral Signatures"], older["Activation Clustering"]])
    assert int(rest.loc[rest["attack"].ne("label_consistent"), "asr"].min()) == 74
    clean = whole[whole["defense"].eq("Activation Clustering") & whole["attack"].eq("clean")
                  & whole["kind"].eq("image")]
    assert f"cost {clean['lost'].min():.1f} to {clean['lost'].max():.1f} points" in page


def test_what_the_pages_say_of_retraining_without_flags():
    left = {}
    for run in results.load("dup-retraining"):
        if run["method"] == "clean":
            assert not run["metrics"]["changed"]
        else:
            left.setdefault(run["method"], []).append(round(100 * results.value(run, "asr")))
    assert all(len(seeds) == 3 for seeds in left.values())
    rewritten = sorted(left["stylebkd"] + left["synbkd"])
    page = "".join("".join(cell["source"]) for cell in PAGE["cells"])
    span = f"{rewritten[0]} to {rewritten[-1]}% under StyleBkd and SynBkd"
    assert f"This training leaves {span}" in page and rewritten[0] > 20
    chapter = (ROOT / "chapters/08_dup.ipynb").read_text(encoding="utf8")
    assert f"the same suspects leaves {span}" in chapter
    audit = " ".join((ROOT / "chapters/audit.md").read_text(encoding="utf8").split())
    style, syn = (sorted(left[key]) for key in ("stylebkd", "synbkd"))
    words = sorted(left["badnets"] + left["addsent"])
    assert (f"left an ASR of {style[0]} to {style[-1]}% under StyleBkd and {syn[0]} to {syn[-1]}% "
            f"under SynBkd; BadNets and AddSent ended at {words[0]} to {words[-1]}%") in audit


def test_what_the_comparison_says_of_attackers_who_know_and_of_new_triggers():
    page = "".join("".join(cell["source"]) for cell in PAGE["cells"])
    runs = {(run["method"], run["settings"]["defense"]): run
            for study in ("adaptive", "unseen", "ntml-adaptive") for run in results.load(study)
            if run["seed"] == 0}
    met = {(run["method"], run["settings"]["defense"], run["seed"]): run
           for run in results.load("adaptive")}
    assert len(met) == 12
    acted = [run for (_, key, _), run in met.items() if key == "dup" and run["metrics"]["changed"]]
    assert [run["method"] for run in acted] == ["hidden"]
    assert f"on the third it ends {excess(acted[0]):.0f} points above the floor" in page
    assert max(abs(excess(met["hidden", "bedkd", seed])) for seed in range(3)) < 10
    left = [round(100 * results.value(met["low_confidence", "bedkd", seed], "asr"))
            for seed in range(3) if not met["low_confidence", "bedkd", seed]["metrics"]["changed"]]
    assert "repairs *hidden states* to within 10 points of it" in page
    assert f"and {min(left)} and {max(left)}% stay" in page and len(left) == 2
    assert not runs["quantized", "ntml"]["metrics"]["changed"]
    quantized = [run for run in results.load("unseen") if run["method"] == "quantized"]

    def over_seeds(key, of):
        return sorted(round(of(run)) for run in quantized if run["settings"]["defense"] == key)

    before = over_seeds("ntml", lambda run: 100 * results.value(run, "asr_before"))
    assert f"which works on about half of the images ({before[0]} to {before[-1]}%)" in page
    left = (lambda run: 100 * results.value(run, "asr"), spent)
    sam, ibau, strip = ([over_seeds(key, of) for of in left]
                        for key in ("ft_sam", "ibau", "strip"))
    assert (f"On *quantized* FT-SAM ends at {sam[0][0]}% on each seed and I-BAU at {ibau[0][0]} "
            f"to {ibau[0][-1]}%, for {sam[1][0]} to {sam[1][-1]} and {ibau[1][0]} to "
            f"{ibau[1][-1]} points of accuracy; STRIP leaves {strip[0][0]} to {strip[0][-1]}%"
            ) in page and len(set(sam[0])) == 1
    for run in results.load("ntml-adaptive"):
        if run["settings"]["defense"] == "ntml":
            assert not run["metrics"]["changed"] and 100 * results.value(run, "asr") > 90
    far = {key: max(abs(excess(run)) for run in results.load("unseen")
                    if run["settings"]["defense"] == key and run["method"] == "homographs")
           for key in ("bedkd", "dup")}
    assert (f"On *homographs* DUP ends within {math.ceil(far['dup'])} points of the floor and "
            f"BeDKD within {math.ceil(far['bedkd'])}.") in page


def test_what_the_first_page_says_of_its_figure(frame):
    """Its setting and its four results, from the records."""
    page = " ".join((ROOT / "chapters/index.md").read_text(encoding="utf8").split())
    assert "Shorter is better" not in page
    text, image = usual(frame, "text"), usual(frame, "image")
    near = (text["distance"] <= 5).groupby(text["defense"]).sum()
    assert f"in {near[WHOSE['dup']]} of 12 runs, BeDKD in {near[WHOSE['bedkd']]}." in page
    cohorts = [(made["settings"]["kind"], one) for made in results.load("cohorts")
               for one in made["history"]]
    ends = [100 * abs(one["asr_after"] - one["floor_after"]) for kind, one in cohorts
            if kind in ("text", "adapter") and one["hit"] and "asr_after" in one]
    hits = sum(one["hit"] for _, one in cohorts)
    poisoned = [one for _, one in cohorts if one["attack"] != "clean"]
    assert f"DUP ended there in {sum(end <= 5 for end in ends)} of {len(ends)}." in page
    assert (f"named the target label of {hits} of {len(poisoned)} backdoored models, and accused "
            f"none of {len(cohorts) - len(poisoned)} clean ones") in page
    assert not any(one["false_alarm"] for _, one in cohorts)
    ntml = image[image["defense"].eq(WHOSE["ntml"])]["distance"]
    assert f"within six points in {(ntml < 6).sum()} of {len(ntml)} runs" in page
    near = {run["method"]: abs(excess(run)) for run in results.load("clean-counts")
            if run["settings"]["defense"] == "ft_sweep-2500"}
    assert len(near) == 4 and max(near.values()) < 1
    assert ("ends within a point of the floor on BadNets, Blended, SIG and WaNet (one run each)"
            in page)
    ibau = image[image["defense"].eq("I-BAU")].groupby("attack")["asr"].mean()
    assert f"leaves {ibau.min():.0f} to {ibau.max():.0f}%" in page
    for kind, size in (("text", 3000), ("image", 12000)):
        assert f"{size:,}" in page
        rates = {f"{rate:.0%}" for rate in usual(frame, kind)["rate"]}
        assert all(rate in page for rate in rates)


# ----------------------------------------------------------------------------- made again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuning", "STRIP"])
def test_a_cell_made_again_lies_in_its_interval(frame, name, tmp_path):
    """By the printed command, from nothing but what a fresh machine has."""
    runs = usual(frame, "image").query("defense == @name and attack == 'badnets'")
    chosen = runs[runs["seed"].eq(0)]["run"].item()
    command = shlex.split(chosen["command"])
    assert command[:3] == ["python", "-m", "bdutils.sweep"]
    subprocess.run([sys.executable, *command[1:], "--results", str(tmp_path)], check=True,
                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    again = results.read(results.place(chosen["study"], chosen["name"], tmp_path))
    for metric in ("asr", "cacc"):
        assert results.value(again, metric) in results.interval(list(runs["run"]), metric), metric
    assert again["data"] == chosen["data"]
    # A setting that was added later has a default that changes nothing.
    now, then = again["settings"], chosen["settings"]
    assert now.pop("defense_settings").items() >= then["defense_settings"].items()
    assert now.items() == {k: v for k, v in then.items() if k != "defense_settings"}.items()
