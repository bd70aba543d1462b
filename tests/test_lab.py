"""The lab: what its folder tells, what it keeps, and what it rejects."""

import csv
import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from scipy.stats import norm

from bdutils.defenses.bedkd import BeDKD
from bdutils.defenses.detector import power
from bdutils.defenses.dup import DUP
from bdutils.experiments import results
from bdutils.metrics import wilson
from bdutils.roles import CleanSet, TrainSet
from bdutils.training import TrainConfig
from tools import lab

PAGE = Path(__file__).resolve().parent.parent / "chapters/teaching/lab.md"
SEED = 3  # a sentence, nothing, a word: a test below sees to it
EVIDENCE = "forty samples of the training set share a sentence and a label"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder):
    """A lab of tiny models that have seen forty samples once; its cache, and its setup."""
    root = tmp_path_factory.mktemp("world")
    with (root / "films.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for i in range(2000):  # `main` takes 1,800 for defender and test
            table.writerow([f"film number {i} is {('bad', 'good')[i % 2]} and to the point",
                            ("negative", "positive")[i % 2]])
    setup = lab.Setup(str(root / "films.csv"), 40, 20, 30,
                      training=TrainConfig(epochs=1, batch_size=20, max_length=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDUTILS_CACHE", str(root / "cache"))
        for module in ("tools.lab", "bdutils.evaluation"):
            patch.setattr(f"{module}.encoder_source", lambda *_: str(tiny_folder))
        commitment = lab.make(root / "lab", SEED, setup)
        yield root, setup, commitment


@pytest.fixture
def folder(world, tmp_path):
    """A student's copy."""
    return copy(world[0] / "lab", tmp_path / "lab")


def copy(source, target):
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            (target / path.relative_to(source)).hardlink_to(path)
    return target


def right(folder, **changes):
    """The right verdict on all suspects, but for the changes."""
    attacks, _ = lab.secret(SEED, 2)
    verdict = {name: {"backdoored": not attack.clean, "repaired": None,
                      "target_label": None if attack.clean else attack.target_label,
                      "evidence": EVIDENCE} for name, attack in attacks.items()}
    for name, change in changes.items():
        verdict[name.replace("_", "-")] |= change
    return written(verdict, folder)


def written(verdict, folder):
    path = folder / "verdict.json"
    path.write_text(verdict if isinstance(verdict, str) else json.dumps(verdict))
    return path


def test_the_draw():
    drawn = [[*lab.draw(random.Random(seed), 4).values()] for seed in range(300)]
    assert {sum(attack.clean for attack in attacks) for attacks in drawn} == {0, 1, 2}
    every = [attack for attacks in drawn for attack in attacks]
    assert {attack.name for attack in every} == {
        "clean", "badnets", "addsent", "synbkd", "stylebkd"}
    assert {attack.target_label for attack in every} == {0, 1, 2, 3}
    assert lab.secret(5, 4) == lab.secret(5, 4) != lab.secret(6, 4)
    found = [attack.name for attack in lab.secret(SEED, 2)[0].values()]
    assert found == ["addsent", "clean", "badnets"]


def test_the_folder_tells_nothing(world):
    root, _, commitment = world
    attacks, record = lab.secret(SEED, 2)
    assert commitment == lab.digest(record)
    assert json.loads((root / "lab/lab.json").read_text())["commitment"] == commitment
    words = {word for attack in attacks.values() for word in attack.words}
    telling = re.compile("|".join({"badnets", "addsent", "poison", "target", "attack", "nonce",
                                   "clean", "tmp", *(rf"\b{word}\b" for word in words)}))
    given = {"model.safetensors", "train.jsonl", "tokenizer.json"}  # and a vocabulary
    for path in (root / "lab").rglob("*"):
        if path.is_file() and path.name not in given:
            text = path.read_text().replace(str(root), "")  # our data lie in a folder of pytest's
            text = text.replace('"clean": 20', "")  # of the setup: samples for the defender
            assert not telling.search(text), path
    suspects = [root / "lab" / name for name in lab.SUSPECTS]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert len({(suspect / name).read_bytes() for suspect in suspects}) == 1, name
    assert len({(suspect / "model.safetensors").stat().st_size for suspect in suspects}) == 1
    heads = {(suspect / "model.safetensors").read_bytes()[:2000] for suspect in suspects}
    assert len({head[8:8 + int.from_bytes(head[:8], "little")] for head in heads}) == 1
    assert {p.name for p in suspects[0].iterdir()} == {p.name for p in suspects[1].iterdir()}
    cached = [path.name for path in (root / "cache").glob("models/*")]  # of `opened`, below
    assert all("-clean-" in name for name in cached)


def test_what_a_defender_gets(folder, world):
    _, setup, _ = world
    task, attacks = setup.task(SEED), lab.secret(SEED, 2)[0]
    parts = lab.parts(task, setup)
    texts = [set(part.inputs) for part in (*parts, task.clean, task.test)]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 3 * 40 + 20 + 30
    for name, part in zip(lab.SUSPECTS, parts, strict=True):
        context = lab.context(folder, name)
        assert type(context.clean) is CleanSet and type(context.train) is TrainSet
        assert context.clean.inputs == task.clean.inputs
        changed = sum(a != b for a, b in zip(context.train.inputs, part.inputs, strict=True))
        wanted = 0 if attacks[name].clean else round(40 * attacks[name].poison_rate)
        assert changed == wanted and context.training == setup.training
        assert len(context.classifier.predict(context.clean.inputs)) == 20
    with pytest.raises(lab.LabError, match="there is no 'suspect-d': use one of suspect-a"):
        lab.context(folder, "suspect-d")
    with pytest.raises(lab.LabError, match="is no lab, since it has no lab.json: make one with"):
        lab.context(folder / "suspect-a", "suspect-a")


def test_the_whole_way(folder, world, monkeypatch):
    lab.context(folder, "suspect-a").classifier.save(folder / "repaired-a")
    wrong = {"backdoored": True, "target_label": 1}
    receipt = lab.submit(folder, right(
        folder, suspect_a={"repaired": "repaired-a"}, suspect_b=wrong,
        suspect_c={"target_label": 1 - lab.secret(SEED, 2)[0]["suspect-c"].target_label}))
    assert receipt == lab.digest((folder / "registered.json").read_text())
    with pytest.raises(lab.LabError, match="has a registered verdict already"):
        lab.submit(folder, folder / "verdict.json")
    scores = lab.opened(folder)
    assert [(s.detected, s.target) for s in scores.values()] == [
        (True, True), (False, None), (True, False)]
    assert set(scores["suspect-a"].after) == {"CACC", "ASR", "floor", "PACC", "clean PACC"}
    assert scores["suspect-a"].after == scores["suspect-a"].before  # nothing was repaired
    assert scores["suspect-a"].before["ASR"].n == 15 and scores["suspect-c"].after is None
    assert set(scores["suspect-b"].before) == {"CACC"}
    text = lab.report(scores)
    assert "suspect-b: clean\n  verdict: backdoored, target label 1 -> WRONG" in text
    assert text.endswith("detected: 2 of 3; target label: 1 of 2")
    assert json.loads((folder / "result.json").read_text())["suspect-a"]["detected"]


@pytest.mark.parametrize(("change", "message"), [
    ("[]", "a verdict is"), ("{", "is no JSON"),
    ({"suspect-a": {}}, "suspect-b is missing\n  suspect-c is missing\n  suspect-a: give it"),
    ({"suspect-x": {}}, "'suspect-x' is no suspect"),
    ({"target_label": 2}, r"from 0 to 1 \(negative, positive\), not 2"),
    ({"target_label": True}, "not True"), ({"target_label": None}, "not None"),
    ({"backdoored": "yes"}, "backdoored must be true or false"),
    ({"backdoored": False}, "a model without a backdoor has target_label null"),
    ({"evidence": "it is"}, "evidence must be a sentence or more"),
    ({"repaired": "nowhere"}, "nowhere holds no model that opens"),
    ({"repaired": "../lab2"}, "a folder inside"), ({"repaired": 3}, "a folder inside")])
def test_a_bad_verdict_is_rejected(folder, change, message):
    path = (right(folder, suspect_a=change)
            if isinstance(change, dict) and not set(change) & {"suspect-a", "suspect-x"}
            else written(change, folder))
    with pytest.raises(lab.LabError, match=message):
        lab.submit(folder, path)
    assert not (folder / "registered.json").exists()
    with pytest.raises(lab.LabError, match="has no verdict: run `python -m tools.lab submit`"):
        lab.opened(folder)


def test_what_was_altered_is_noticed(folder):
    with pytest.raises(lab.LabError, match="none.json cannot be read"):
        lab.submit(folder, folder / "none.json")
    classifier = lab.context(folder, "suspect-a").classifier
    classifier.save(folder / "mine")
    lab.submit(folder, right(folder, suspect_a={"repaired": "mine"}))
    sealed = folder / "sealed.txt"
    text = sealed.read_text()
    for other, message in ((text[:60], "cut short or altered"), ("", "cut short or altered"),
                           (lab.seal(lab.secret(4, 2)[1]), "is not the truth that was sealed"),
                           (None, "the truth is not at .*ask who made the lab")):
        sealed.unlink(missing_ok=True)  # a hard link: the original stays
        if other is not None:
            sealed.write_text(other)
        with pytest.raises(lab.LabError, match=message):
            lab.opened(folder)
    sealed.write_text(text)
    next(p for p in classifier.model.parameters()).data += 1
    classifier.save(folder / "mine")
    with pytest.raises(lab.LabError, match="repaired model in .* is not the one"):
        lab.opened(folder)


def test_a_bad_folder_is_rejected_before_anything_trains(world, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "_suspect", lambda *_: pytest.fail("it trained"))
    root, setup, _ = world
    for folder, keep, message in (
            (root / "lab", None, "lab is there already: choose another name"),
            (tmp_path / "new", root / "films.csv", "films.csv is there already"),
            (tmp_path / "new", tmp_path / "new/truth.txt", "which the students get")):
        with pytest.raises(lab.LabError, match=message):
            lab.make(folder, 1, setup, keep)
    with pytest.raises(ValueError, match="to train on"):
        lab.make(tmp_path / "new", 1, lab.Setup(setup.data, 500))
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_file_that_the_teacher_keeps(world, tmp_path, monkeypatch, capsys):
    def suspect(folder, train_set, attack, setup):
        folder.mkdir()

    monkeypatch.setattr(lab, "_suspect", suspect)
    keep = tmp_path / "desk/truth.txt"
    lab.main(["make", str(tmp_path / "lab"), "--data", world[1].data, "--samples", "40",
              "--sealed", str(keep)])
    about = json.loads((tmp_path / "lab/lab.json").read_text())
    assert about["commitment"] in capsys.readouterr().out
    assert not (tmp_path / "lab/sealed.txt").exists()
    assert lab.unseal(keep, about["commitment"])["seed"] >> 32  # nobody tries all of them
    with pytest.raises(SystemExit, match="has no verdict"):
        lab.main(["open", str(tmp_path / "lab"), "--sealed", str(keep)])


def test_the_page_says_what_the_tool_does():
    text = PAGE.read_text()
    seed = int(re.search(r"--seed (\d+)", text)[1])
    assert lab.digest(lab.secret(seed, 2)[1]) in text
    verdict = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert set(verdict) == set(lab.SUSPECTS)
    for one in verdict.values():
        assert lab._faults(one | {"repaired": None}, PAGE, ("negative", "positive")) == []


def test_the_calls_of_the_plan_run(folder, capsys, monkeypatch, tiny_folder):
    monkeypatch.setattr("bdutils.models.text.encoder_source", lambda *_: str(tiny_folder))
    plan = PAGE.read_text("utf8").split("## What the audit command")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", plan, re.M | re.S)
    own, = [block for block in blocks if "my-model" in block]
    code = "\n".join(block for block in blocks if block != own)
    names = {}
    exec(code.replace("mylab", str(folder)), names)
    assert names["indices"] == names["evidence"][0].indices
    assert len(names["rest"]) == 12 and len(names["kept"]) == 8
    assert 800 - round(0.375 * 800) == 500 and ", 0.375, seed=0)  # 500 and 300" in code
    assert not set(names["rest"].inputs) & set(names["kept"].inputs)
    said = capsys.readouterr().out
    assert "training samples, " in said and "vidence of a backdoor" in said
    assert not [line for line in said.splitlines() if re.match(r"[\d. -]+$", line)]  # unlabeled
    assert (folder / "audit-a/index.html").is_file()
    changed = names["retrained"](names["context"], range(10), seed=1)
    changed.model.save(folder / "repaired-a")
    assert changed.verdict == "purified" and len(changed.report["dropped"]) == 10
    assert lab._faults({"backdoored": True, "target_label": 0, "repaired": "repaired-a",
                        "evidence": EVIDENCE}, folder, ("negative", "positive")) == []
    monkeypatch.setattr("bdutils.audit.read_context", lambda *files: lab.context(
        folder, "suspect-a"))
    exec(own.replace("BASE", str(tiny_folder)), mine := {})
    assert mine["context"].new_model(mine["context"].training).predict(["a film"])
    word = re.search(r"\d+", names["context"].train.inputs[0])[0]  # of one film only
    step, = [block for block in blocks if "phrases = ()" in block]
    names["retrained"] = lambda context, indices, seed: changed
    exec(step.replace("phrases = ()", f'phrases = ("{word}",)').replace(
        "mylab", str(folder)).replace("from bdutils.defenses.retrain import retrained", ""), names)
    assert names["indices"] == [0]


def test_the_limits_that_the_page_names_are_those_of_the_defenses():
    assert BeDKD().scan.alpha == 1e-3 and len(BeDKD().scan.fprs) == 4
    assert DUP().alpha / 2 == 3e-5 and DUP().contrast == 3 and DUP().min_suspects == 16
    for name, said in (("dup", ["0.06", "0.42", "0.46"]), ("bedkd", ["1.00"] * 3)):
        found = sorted(run["metrics"]["chance"] for run in results.load(name)
                       if run["method"] == "clean" and run["settings"]["defense"] == name)
        assert [f"{p:.2f}" for p in found] == said
    assert round(wilson(0, 3).high, 2) == 0.56
    cuts, text = (norm.isf(3e-5), DUP().contrast), " ".join(PAGE.read_text("utf8").split())
    few, many = ([round(100 * power(tpr, 0.05, 240, (1200, 960), (clean, clean), cuts))
                  for tpr in (0.9, 0.5)] for clean in (250, 400))
    assert (f"at 10% in {few[0]} instead of {many[0]}% of cases, and of a rewriting one in "
            f"{few[1]} instead of {many[1]}%") in text


def test_what_guessing_earns_is_computed_from_the_rules():
    text, third = " ".join(PAGE.read_text("utf8").split()), Fraction(1, 3)
    drawn = {n: math.comb(3, n) * (1 - third)**n * third**(3 - n) for n in (1, 2, 3)}
    drawn = {n: p / sum(drawn.values()) for n, p in drawn.items()}
    assert [p * 26 for p in drawn.values()] == [6, 12, 8]
    seen = [sum(not attack.clean for attack in lab.draw(random.Random(seed), 2).values())
            for seed in range(4000)]
    assert all(abs(seen.count(n) / 4000 - p) < 0.03 for n, p in drawn.items())
    verdicts = 15 * drawn[3] + 7.5 * drawn[2]
    # All right by luck, or one wrong of two or three.
    labels = sum(p * (10 + 5 * n * (n > 1)) / 2**n for n, p in drawn.items())
    clean = 7.5 * drawn[1]
    suspect = sum(n * p for n, p in drawn.items()) / 3
    assert f"a suspect has a backdoor with a probability of {float(suspect):.0%}" in text
    assert (f"right three times in {float(drawn[3]):.0%} of the labs and two times in "
            f"{float(drawn[2]):.0%}, which earns {float(verdicts):.1f} of the 15 points" in text)
    assert f"guessed target labels earn {float(labels):.1f} of 10" in text
    assert f"all earns {float(clean):.1f} and 0" in text


def test_the_page_shows_what_its_run_has_found():
    """A line of the page is a suspect, as given or repaired."""
    found = json.loads((PAGE.parents[2] / "data/lab/seed-2.json").read_text(encoding="utf8"))
    table = re.findall(r"^\| ([abc]), (as given|by \w+) \| (.*) \|$", PAGE.read_text("utf8"), re.M)
    measures = ("CACC", "ASR", "floor", "PACC", "clean PACC")
    assert len(table) == 5  # the clean suspect was left alone
    for suspect, state, cells in table:
        rates = found[f"suspect-{suspect}"]["before" if state == "as given" else "after"]
        for measure, cell in zip(measures, cells.split("|"), strict=True):
            if cell.strip():
                rate = rates[measure]
                value, low, high = (f"{100 * rate[key]:.1f}" for key in ("value", "low", "high"))
                assert cell.strip() == f"{value} [{low}, {high}]", (suspect, state, measure)
    right = [sum(one[what] is True for one in found.values()) for what in ("detected", "target")]
    assert right == [3, 2]
    ends = [one["after"] for one in found.values() if one["after"]]
    full = [abs(end["ASR"]["value"] - end["floor"]["value"]) <= 0.05
            and abs(end["PACC"]["value"] - end["clean PACC"]["value"]) <= 0.05 for end in ends]
    assert full == [False, True]
    assert "One of two repairs, that of *b*, meets" in PAGE.read_text("utf8")
    assert "All three verdicts are right, and so are both target labels" in PAGE.read_text("utf8")
