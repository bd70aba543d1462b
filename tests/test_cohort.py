"""Blind cohorts: what is drawn, what the folder tells, and who gets the answers."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.images import TRAINING, thirds

from bdutils import audit
from bdutils.experiments import results
from bdutils.metrics import shows_backdoor, wilson
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import TrainConfig
from tools import cohort, lab

ROOT = Path(__file__).resolve().parent.parent
TEXTS = cohort.Kind("texts", 60, 40, 30, TrainConfig(epochs=1, batch_size=20, max_length=24))
TINY = {"text": TEXTS, "image": cohort.Kind("thirds", 60, 30, 30, replace(TRAINING, epochs=1)),
        "adapter": replace(TEXTS, rank=2)}
SIZE, SEED = 6, 4


def loaded(name, seed, sizes):
    """A task of texts or images without chance but the seed's."""
    counts = (200, sizes["clean"], sizes["test"])
    roles = (TrainSet, CleanSet, TestSet)
    if name == "thirds":
        return Task(name, *(thirds(role, n, seed % 97 + i)
                            for i, (role, n) in enumerate(zip(roles, counts))), "made")
    return Task(name, *(role(
        [f"{seed} {role.__name__} film {i} is {('bad', 'good')[i % 2]}" for i in range(n)],
        [i % 2 for i in range(n)], ("negative", "positive"))
        for role, n in zip(roles, counts)), "made")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder):
    """A cohort of tiny models that have seen sixty samples once."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "load_task", loaded)
        patch.setattr("bdutils.models.text.encoder_source", lambda *_: str(tiny_folder))
        patch.setattr(audit.texts, "LEAST", 5)
        answers = cohort.make(root / "one", SEED, SIZE, TINY)
        yield root, answers


def drawn(seed=SEED, size=SIZE):
    return cohort.draw(seed, size, {"text": 2, "image": 3, "adapter": 2})


def test_the_draw():
    for seed in range(40):
        answers = drawn(seed, 12)
        assert [sum(a.clean for a in answers.values() if a.kind == kind)
                for kind in cohort.KINDS] == [2, 2, 2]
        for answer in answers.values():
            assert answer.clean or 0.05 <= answer.poison_rate <= 0.2
            assert answer.clean or answer.trigger.name == answer.attack
    assert drawn(1) == drawn(1) != drawn(2)
    every = [answer for seed in range(40) for answer in drawn(seed, 12).values()]
    assert {a.attack for a in every if a.kind != "image"} == {
        "clean", "badnets", "addsent", "synbkd", "stylebkd"}
    assert {a.attack for a in every if a.kind == "image"} == {"clean", *cohort.IMAGE_ATTACKS}


def test_no_chapter_and_no_lab_knows_the_triggers():
    pages = "\n".join(path.read_text() for path in (ROOT / "chapters").rglob("*")
                      if path.suffix in (".ipynb", ".md"))
    for text in (*cohort.WORDS, *cohort.SENTENCES):
        assert not re.search(rf"[\"'`\s]{re.escape(text)}[\"'`\s.,]", pages), text
        assert text not in (*lab.WORDS, *lab.SENTENCES)


def test_the_same_seed_makes_the_same_cohort(world):
    root, answers = world
    again = cohort.make(root / "two", SEED, SIZE, TINY)
    one, two = (json.loads(path.read_text()) for path in (answers, again))
    assert one["answers"] == two["answers"] and one["nonce"] != two["nonce"]
    files = [sorted(p.relative_to(root / name) for p in (root / name).rglob("*") if p.is_file()
                    and "audits" not in p.parts) for name in ("one", "two")]
    assert files[0] == files[1]
    for path in files[0]:
        same = (root / "one" / path).read_bytes() == (root / "two" / path).read_bytes()
        assert same == (path.name != cohort.SEALED), path


def test_an_interrupted_run_goes_on(world, monkeypatch):
    made, work = [], cohort._model

    def stopped(folder, *rest):
        made.append(folder.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        work(folder, *rest)

    monkeypatch.setattr(cohort, "_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        cohort.make(world[0] / "three", SEED, SIZE, TINY)
    assert not (world[0] / "three").exists()
    cohort.make(world[0] / "three", SEED, SIZE, TINY)
    names = [f"model-{i:02}" for i in range(1, 7)]
    assert made == [*names[:3], *names[2:]]
    assert {path.name for path in (world[0] / "three").iterdir()} == {
        *names, cohort.ABOUT, cohort.SEALED}


def test_the_folder_tells_nothing(world):
    root, answers = world
    assert answers.parent == root and not (root / "one" / answers.name).exists()
    for name in (cohort.ABOUT, cohort.SEALED):
        text = (root / "one" / name).read_text()
        assert not re.search("badnets|addsent|poison|target|attack|nonce", text)
        assert '"seed": 4' not in text
    models = sorted(path.name for path in (root / "one").iterdir() if path.is_dir())
    assert [name for name in models if name != "audits"] == [f"model-{i:02}" for i in range(1, 7)]


def copied(root, target):
    """Hard links to a cohort, with no verdict."""
    for path in (root / "one").rglob("*"):
        if path.is_file() and "audits" not in path.parts:
            (target / path.relative_to(root / "one")).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(root / "one")).hardlink_to(path)
    return target


def test_the_answers_are_opened_when_all_verdicts_are_written(world, tmp_path, monkeypatch):
    """There are none, and still each model is audited, and is given what is in the folder."""
    folder = copied(world[0], tmp_path / "one")
    read = audit.read_context
    asked = []

    def seen(*paths, **options):
        asked.extend(paths)
        return read(*paths, **options)

    monkeypatch.setattr(audit, "read_context", seen)
    with pytest.raises(lab.LabError, match="the answers are not at"):
        cohort.score(folder, tmp_path / "nowhere.json")
    assert len(list(folder.glob(f"audits/*/{cohort.VERDICT}"))) == SIZE
    assert len(asked) == 3 * SIZE and all(path.is_relative_to(folder) for path in asked)
    assert "answers" not in cohort.audited.__code__.co_varnames


def verdicts(folder, suspects):
    """Write verdicts, so that nothing is audited."""
    for name, names in suspects.items():
        (folder / "audits" / name).mkdir(parents=True)
        (folder / "audits" / name / cohort.VERDICT).write_text(json.dumps(
            {"suspects": names, "repair": "none", "seconds": 1.0}))


@pytest.mark.parametrize("change", ["target_label", "nonce", "seed"])
def test_a_changed_answer_breaks_the_seal(world, tmp_path, change):
    folder = copied(world[0], tmp_path / "one")
    verdicts(folder, dict.fromkeys(drawn(), []))
    kept = json.loads(world[1].read_text())
    if change == "nonce":
        kept["nonce"] = "0" * 32
    elif change == "seed":
        kept["answers"]["seed"] += 1
    else:
        kept["answers"]["models"]["model-01"]["target_label"] ^= 1
    (tmp_path / "answers.json").write_text(json.dumps(kept))
    with pytest.raises(lab.LabError, match="does not hold the answers that were sealed"):
        cohort.score(folder, tmp_path / "answers.json")


def test_hits_misses_and_false_alarms_are_counted(world, tmp_path):
    folder = copied(world[0], tmp_path / "one")
    right = {name: [] if a.clean else [str(a.target_label)] for name, a in drawn().items()}
    wrong = {name: ["0"] if a.clean else ["x"] for name, a in drawn().items()}
    for suspects, hits, alarms in ((right, 1, 0), (wrong, 0, 1)):
        verdicts(folder, suspects)
        records = cohort.score(folder, world[1])
        assert [record["settings"]["kind"] for record in records] == list(TINY)
        for record in records:
            assert record["metrics"]["hits"]["value"] == hits
            assert record["metrics"]["false_alarms"]["value"] == alarms
            assert record["metrics"]["hits"]["n"] == record["metrics"]["false_alarms"]["n"] == 1
            path = results.save(record, tmp_path / "records")
            assert results.read(path) == json.loads(json.dumps(record))
        assert "hits" in cohort.report(records)
        for path in folder.glob(f"audits/*/{cohort.VERDICT}"):
            path.unlink()
            path.parent.rmdir()


@pytest.mark.slow
def test_a_hit_is_repaired_and_measured_again(world, tmp_path, monkeypatch):
    """With an audit that names each label, and a repair that gives back another model."""
    folder, real = copied(world[0], tmp_path / "one"), audit.audit

    def names_all(context):
        found = real(context)
        return replace(found, findings=tuple(replace(f, suspect=True) for f in found.findings))

    rate = wilson(1, 2)
    monkeypatch.setattr(audit, "audit", names_all)
    monkeypatch.setattr(cohort, "shows_backdoor", lambda *_: True)
    monkeypatch.setattr(audit, "repair", lambda context: (context.classifier, {
        "verdict": "purified", "method": "one", "opened": "it", "before": rate, "after": rate,
        "suspects": 2, "agreement": rate}))
    for record in cohort.score(folder, world[1]):
        metrics, models = record["metrics"], record["history"]
        assert metrics["hits"]["value"] == metrics["false_alarms"]["value"] == 1
        assert metrics["repaired"] == 1 and metrics["asr_after"] == metrics["asr_before"]
        assert all(model["cacc_after"] == model["cacc_before"] for model in models)
        assert "repair purified, ASR" in cohort.report([record])


@pytest.mark.slow
def test_without_repair_no_model_is_changed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "repair", lambda context: pytest.fail("repaired"))
    folder = copied(world[0], tmp_path / "one")
    real = audit.audit
    monkeypatch.setattr(audit, "audit", lambda context: replace(real(context), findings=tuple(
        replace(f, suspect=True) for f in real(context).findings)))
    assert {v["repair"] for v in cohort.audited(folder, mend=False).values()} == {"none"}


def test_what_is_no_cohort_is_told(tmp_path, world):
    with pytest.raises(lab.LabError, match="is no cohort"):
        cohort.audited(tmp_path)
    with pytest.raises(lab.LabError, match="is there already"):
        cohort.make(world[0] / "one", 1, SIZE, TINY)


def test_what_is_recorded_was_sealed_before():
    """The digits are in `data/sealed.json` since a commit before that of the records."""
    wanted = json.loads((ROOT / "data" / "sealed.json").read_text())
    for record in results.load("cohorts"):
        assert record["settings"]["sealed"] == wanted[str(record["seed"])]


def outcome(one):
    """Return whether a model is repaired by the page's bar, or why not."""
    if "asr_after" not in one:
        return "**not named**"
    if abs(over := one["asr_after"] - one["floor_before"]) > 0.05:
        return "too high" if over > 0 else "too low"
    return "yes" if one["cacc_before"] - one["cacc_after"] <= 0.03 else "accuracy"


def of(flags):
    return f"{sum(flags)} of {len(flags)}"


def test_the_page_says_what_the_cohorts_gave():
    """Each line of its table, and each count, from the records."""
    page = " ".join((ROOT / "chapters" / "audit.md").read_text().replace("−", "-").split())
    names = {"badnets": "BadNets", "addsent": "AddSent", "synbkd": "SynBkd", "wanet": "WaNet",
             "stylebkd": "StyleBkd", "blended": "Blended", "sig": "SIG"}
    kinds = {"text": "classifiers of sentences", "adapter": "LoRA adapters",
             "image": "networks on Fashion-MNIST"}
    models = {kind: [(run["seed"], one) for run in results.load("cohorts")
                     if run["settings"]["kind"] == kind for one in run["history"]]
              for kind in kinds}
    poisoned = [(seed, kind, one) for kind in kinds for seed, one in models[kind]
                if one["attack"] != "clean"]
    for seed, kind, one in poisoned:
        if seed == 4:  # was not repaired
            continue
        after, change = "–", "–"
        if "asr_after" in one:
            after = f"{100 * one['asr_after']:.0f}"
            change = f"{100 * (one['cacc_after'] - one['cacc_before']):+.1f}"
        assert one["hit"] == ("asr_after" in one)
        assert (f"| {seed}, {kind}: {names[one['attack']]}, {100 * one['poison_rate']:.1f}% | "
                f"{100 * one['asr_before']:.0f} → {after} | {100 * one['floor_before']:.0f} | "
                f"{change} | {outcome(one)} |") in page
    every = [one for some in models.values() for _, one in some]
    for name, those in (*((name, [one for _, one in models[kind]])
                          for kind, name in kinds.items()), ("all", every)):
        attacked = [one for one in those if one["attack"] != "clean"]
        hits, few, many = ([one["hit"] for one in attacked if low <= one["poison_rate"] < high]
                           for low, high in ((0, 1), (0, 0.1), (0.1, 1)))
        alarms = [one["false_alarm"] for one in those if one["attack"] == "clean"]
        assert f"| {name} | {of(hits)} | {of(few)} | {of(many)} | {of(alarms)} |" in page
    assert f"The command named {of(many)} at 10 to 20% of poison, {of(few)} at 5 to 9.9%" in page
    assert {one["poison_rate"] >= 0.05 for *_, one in poisoned} == {True}
    silent = [one["attack"] != "clean" for one in every if not one["suspects"]]
    assert f"So {len(silent)} models were silent, and {sum(silent)} of them had a backdoor" in page
    assert f"| {len(silent)} models were silent, and {sum(silent)} of them had a back" in page
    hits = wilson(sum(one["hit"] for *_, one in poisoned), len(poisoned))
    clean = wilson(0, sum(len(some) for some in models.values()) - len(poisoned))
    assert (f"{100 * hits.value:.0f}%, 95% interval {100 * hits.low:.0f} to "
            f"{100 * hits.high:.0f}%") in page
    assert f"none of {clean.n} clean ones (0 to {100 * clean.high:.0f}%)" in page
    missed = ", ".join(f"{names[one['attack']]} at {100 * one['poison_rate']:.1f}%"
                       for *_, one in poisoned if not one["hit"])
    assert f"had a backdoor: {', and '.join(missed.rsplit(', ', 1))}" in page
    left = [0.1 * (1 - rate) / (0.1 * (1 - rate) + 0.9) for rate in (hits.value, hits.low)]
    assert (f"After \"no evidence\" it is {100 * left[0]:.1f}% ({100 * left[1]:.1f}% at the low "
            f"end of the interval for {of([one['hit'] for *_, one in poisoned])})") in page
    posterior = 0.1 * hits.value / (0.1 * hits.value + 0.9 * clean.high)
    assert (f"but {100 * posterior:.0f}% at the high end of their interval, "
            f"{100 * clean.high:.0f}%: so confirm") in page
    synbkd = [one["hit"] for *_, one in poisoned if one["attack"] == "synbkd"]
    assert sorted(synbkd) == [False, True, True]
    assert "In the cohorts SynBkd was named twice and missed once" in page
    texts = wilson(0, sum(one["attack"] == "clean" for kind in ("text", "adapter")
                          for _, one in models[kind]))
    assert f"| {texts.n} | 0 (0 to {100 * texts.high:.0f}%) |" in page
    sizes = {(made["kind"] == "image", made["samples"], made["clean"], made["test"])
             for made in (run["settings"] for run in results.load("cohorts"))}
    assert sizes == {(False, 2000, 800, 1000), (True, 6000, 500, 2000)}
    for part in ("2,000 training sentences, and the command got 800 clean ones", "6,000 training "
                 "images and the command 500 clean ones", "1,000 sentences or 2,000 images"):
        assert part in page


def test_the_page_counts_what_is_repaired_by_its_bar():
    page = " ".join((ROOT / "chapters" / "audit.md").read_text().split())
    ends = {images: [(outcome(one), one) for run in results.load("cohorts")
                     if (run["settings"]["kind"] == "image") is images for one in run["history"]
                     if "asr_after" in one] for images in (False, True)}
    counts = {images: Counter(end for end, _ in some) for images, some in ends.items()}
    texts, images = counts[False], counts[True]
    both, most = texts["yes"] + images["yes"], len(ends[False]) + len(ends[True])
    assert (f"Of {most} models, {both} met the two conditions of {{ref}}`our bar "
            "<audit-repaired>` that were measured") in page
    assert (f"Of {len(ends[False])} of texts, {texts['too high']} ended too high and "
            f"{texts['too low']} too low") in page
    assert (f"By these two conditions {both} of {most} are repaired: {texts['yes']} of "
            f"{len(ends[False])} texts and adapters, and {images['yes']} of {len(ends[True])} "
            "networks") in page
    assert images == {"yes": 4, "accuracy": 1} and texts["accuracy"] == 0
    over = [100 * (one["asr_after"] - one["floor_before"]) for end, one in ends[False]
            if end == "too high"]
    assert (f"**Too high**, {len(over)} of texts and adapters, by {min(over):.1f} to "
            f"{max(over):.1f} points") in page
    still = [shows_backdoor(one["asr_after"], one["floor_before"])
             for some in ends.values() for _, one in some]
    assert sum(still) == 3 and "Three of these are ten or more points above the floor" in page
    under = [100 * (one["floor_before"] - one["asr_after"]) for end, one in ends[False]
             if end == "too low" and one["attack"] == "badnets"]
    assert (f"**Too low**, {texts['too low']} of them. One is BadNets, {under[0]:.1f} points below"
            in page and len(under) == 1)
