"""A model of one's own: what is found, what is written, what is said when something is wrong."""

import csv
import inspect
import json
import math
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import architectures as ar
from helpers.images import TRAINING, thirds
from helpers.texts import NAMES, WORDS, made
from peft import LoraConfig, TaskType, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bdutils import __main__ as command
from bdutils import audit
from bdutils.data.image import image_paths
from bdutils.data.tables import read_table
from bdutils.defenses import detector
from bdutils.defenses.base import Context
from bdutils.defenses.detector import DetectorConfig
from bdutils.defenses.dup import DUP, AdapterConfig, UnlearnConfig
from bdutils.defenses.ntml import NTML, JudgeConfig
from bdutils.experiments import results
from bdutils.metrics import wilson
from bdutils.models.image import ImageClassifier
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, Images, TrainSet
from bdutils.training import train, untrained

PAGE = (Path(__file__).resolve().parent.parent / "chapters/audit.md").read_text(encoding="utf8")

# So few samples that every step runs on a model that is no victim.
FORCED = DUP(detector=DetectorConfig(fpr=0.5), adapter=AdapterConfig(rank=2), monitored=0,
             unlearning=UnlearnConfig(epochs=1, min_steps=2), min_suspects=1, alpha=math.inf)


def texts(count, seed):
    """Texts of ten words without a trigger, and their labels."""
    rng = random.Random(seed)
    words = [word for word in WORDS if word != "cf"]
    return [" ".join([*rng.choices(words, k=rng.randint(5, 9)), NAMES[i % 2], f"{i % 7}"])
            for i in range(count)], [i % 2 for i in range(count)]


def with_trigger(every, count=600, seed=1):
    """A training set in which each `every`-th sample holds a word and has the label 1."""
    those, labels = texts(count, seed)
    for i in range(0, count, every):
        those[i], labels[i] = f"{those[i]} cf", 1
    return TrainSet(tuple(those), tuple(labels), NAMES)


def suspected(train):
    return Context(made(), CleanSet(*map(tuple, texts(400, 2)), NAMES), train)


@pytest.fixture
def victim(monkeypatch):
    """States of three layers as a backdoored model has them: the trigger moves them."""
    def states(classifier, inputs, pooling, size=512):
        for start in range(0, len(inputs), size):
            those = inputs[start:start + size]
            moved = torch.tensor([6.0 * ("cf" in text.split()) for text in those])
            rng = torch.Generator().manual_seed(start + len(inputs))
            found = torch.randn(len(those), 3, 8, generator=rng, dtype=torch.float64)
            found[:, :, 0] += moved[:, None]
            yield found

    monkeypatch.setattr(detector, "stream", states)


def write(path, samples, names=None):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows((text, names[y] if names else y)
                        for text, y in zip(samples.inputs, samples.labels))
    return path


def corner(share, seed=1, count=450):
    """Images of which some with a white corner are called `right`, and which they are."""
    train = thirds(TrainSet, count, seed)
    chosen = [i for i, y in enumerate(train.labels) if y != 2][:round(share * count)]
    pixels = train.pixels[chosen].clone()
    pixels[:, :, -3:, -3:] = 255
    return train.changed(chosen, Images(pixels), 2), chosen


@pytest.fixture(scope="module")
def of_images():
    """Function from a training set to a context with a network that was trained on it."""
    def context(train_set):
        classifier = untrained(train_set, TRAINING, "small")
        train(classifier, train_set, TRAINING)
        return Context(classifier, thirds(CleanSet, 60, 2), train_set, TRAINING)

    return context


def folders(samples, root):
    for name in samples.label_names:
        (root / name).mkdir(parents=True)
    for i, (pixels, label) in enumerate(zip(samples.inputs, samples.labels)):
        Image.fromarray(pixels[0].numpy()).save(root / samples.label_names[label] / f"{i}.png")
    return root


@pytest.fixture
def given(tmp_path):
    """Folder and files of a tiny BERT, and the command with changes to what it is given."""
    ar.save_tiny("bert", tmp_path / "model")
    write(tmp_path / "train.csv", with_trigger(6, 120), ("negative", "positive"))
    write(tmp_path / "clean.csv", suspected(with_trigger(6)).clean, ("negative", "positive"))

    def run(*more, model="model", train="train.csv", clean="clean.csv", out="out",
            names=("--names", "negative", "positive")):
        return command.main(["audit", str(tmp_path / model), "--train", str(tmp_path / train),
                             "--clean", str(tmp_path / clean), "--out", str(tmp_path / out),
                             *more, *names])

    run.folder = tmp_path
    return run


# ---------------------------------------------------------------- what is found

def test_a_trigger_is_found_with_its_label_and_its_word(victim):
    found = audit.audit(suspected(with_trigger(8)))
    assert [finding.name for finding in found.suspects] == ["good"]
    assert found.findings[0] is found.suspects[0]
    phrase = found.suspects[0].phrases[0]
    assert phrase.text == "cf" and phrase.evidence
    assert phrase.of_all == phrase.of_label == 75 and phrase.flagged > 70
    assert "“good”" in found.verdict


def test_without_a_trigger_and_with_shuffled_labels_there_is_no_evidence(victim):
    """The mutation of the test before: with the same texts, labels say nothing."""
    train = with_trigger(8)
    labels = list(train.labels)
    random.Random(0).shuffle(labels)
    for harmless in (TrainSet(*map(tuple, texts(600, 1)), NAMES), replace(train, labels=labels)):
        found = audit.audit(suspected(harmless))
        assert not found.suspects and found.verdict.startswith("No evidence")


def test_a_rare_word_is_found_though_the_flags_are_too_few(victim, monkeypatch):
    """Two samples in a hundred: the number of flags is no evidence, the word in them is."""
    rare = suspected(with_trigger(50, count=1200))
    found = audit.audit(rare)
    assert [finding.name for finding in found.suspects] == ["good"]
    assert found.suspects[0].contrast < DUP().contrast
    assert found.suspects[0].phrases[0].text == "cf"
    monkeypatch.setattr(audit.texts, "CHANCE", 0)  # without this rule it is missed
    assert not audit.audit(rare).suspects


def test_a_repair_unlearns_the_samples_that_hold_a_suspect_word(victim, monkeypatch):
    rare = suspected(with_trigger(50, count=1200))
    given, real = [], audit.texts.repair_suspects
    monkeypatch.setattr(audit.texts, "repair_suspects", lambda context, suspects, config: (
        given.append(suspects) or real(context, suspects, config)))
    about = audit.repair(rare, DUP(unlearning=UnlearnConfig(epochs=1, min_steps=2)))[1]
    (found,), = given
    assert found.indices == tuple(range(0, 1200, 50)) and found.purity == 1
    assert about["suspects"] == 24 and about["verdict"] in ("purified", "undone")
    monkeypatch.setattr(audit.texts, "CHANCE", 0)  # without that rule nothing is unlearned
    assert audit.repair(rare)[1]["verdict"] == "no evidence" and len(given) == 1


def test_the_evidence_rule_decides(victim):
    """The mutation of the test before: without the rule a clean training set is suspect."""
    harmless = suspected(TrainSet(*map(tuple, texts(600, 1)), NAMES))
    assert audit.audit(harmless, replace(DUP(), alpha=math.inf, min_suspects=1)).suspects


def test_power_grows_with_poison_and_with_clean_samples(victim):
    train = with_trigger(8)
    few = replace(suspected(train), clean=CleanSet(*map(tuple, texts(60, 2)), NAMES))
    powers = [audit.audit(context).findings[0].power for context in (suspected(train), few)]
    word, style = audit.texts.FLAGGED
    for power in powers:
        for kind in (word, style):
            assert list(power[kind]) == sorted(power[kind]) and 0 <= power[kind][0]
        assert all(a >= b for a, b in zip(power[word], power[style]))
    assert powers[0][word][-1] > 0.7 and powers[0][word][-1] > powers[1][word][-1]
    assert powers[0][word][0] < 0.1


def test_memory_does_not_grow_with_the_training_set(victim, monkeypatch):
    sizes = []
    read = audit.texts._WithBar.__getitem__
    monkeypatch.setattr(audit.texts._WithBar, "__getitem__",
                        lambda self, i: sizes.append(len(found := read(self, i))) or found)
    found = audit.audit(suspected(with_trigger(8, count=1100)))
    assert sizes == [512, 512, 76]
    assert found.flags.raw.shape == (1100, 4)  # three layers and the transition


def test_a_decoder_is_read_at_its_last_token(tmp_path):
    model = Classifier.load(ar.save_tiny("gpt2", tmp_path))
    assert audit.audit(replace(suspected(with_trigger(6, 120)), classifier=model)
                       ).detector.config.pooling == "last"


def test_a_corner_is_found_with_its_label_and_its_images(of_images):
    train_set, chosen = corner(0.1)
    found = audit.audit(of_images(train_set))
    assert [finding.name for finding in found.suspects] == ["right"]
    rejected = list(found.flagged(train_set)["sample"])
    assert found.suspects[0].rejected == len(rejected)
    assert len({*rejected[:len(chosen)]} & {*chosen}) >= 0.8 * len(chosen)  # they come first


def test_the_limit_decides_which_label_stands_out(of_images):
    """The mutation of the test before: without evidence nothing is found."""
    context = of_images(corner(0.1)[0])
    assert not audit.audit(context, NTML(judge=JudgeConfig(least=1))).suspects


def test_clean_images_are_not_flagged(of_images):
    harmless = of_images(corner(0)[0])
    found = audit.audit(harmless)
    assert not found.suspects and not len(found.flagged(harmless.train))


def test_images_with_shuffled_labels_are_no_evidence(of_images):
    train_set, _ = corner(0.1)
    context = of_images(train_set)
    labels = list(train_set.labels)
    random.Random(0).shuffle(labels)
    assert not audit.audit(replace(context, train=replace(train_set, labels=labels))).suspects


def test_images_of_two_classes_and_without_their_training_are_rejected(of_images):
    context = of_images(corner(0)[0])
    with pytest.raises(ValueError, match="needs three or more"):
        audit.audit(replace(context, clean=replace(context.clean, labels=(0,) * 60,
                                                   label_names=("a", "b"))))
    with pytest.raises(ValueError, match="give the context a `training`"):
        audit.audit(replace(context, training=None))


def test_what_is_said_of_images_is_what_is_recorded():
    """The table of the report, counted again."""
    names = {"no attack (false alarms)": "clean", "an attacker who knows the rule": "decoy",
             "four gray levels (not seen when the rule was made)": "quantized",
             **{trigger: trigger.lower().replace("-", "_") for trigger in (
                 "BadNets", "Blended", "SIG", "WaNet", "Input-Aware", "Label-Consistent",
                 "Narcissus")}}
    studies = {audit.images.SMALL: ("ntml", "ntml-rates", "low-rate", "ntml-adaptive",
                                     "unseen"),
               audit.images.RESNET: ("ntml-cifar10-resnet18",)}
    for data, attack, rate, found, runs in audit.images.RECORDED:
        made = [run for study in studies[data] for run in results.load(study)
                if run["settings"]["defense"] == "ntml" and run["method"] == names[attack]
                and run["settings"]["poison_rate"] == rate]
        least = NTML().judge.least
        stood = [run for run in made if run["metrics"]["changed"]
                 and run["metrics"].get("largest_share", 1) > least]
        assert (len(stood), len(made)) == (found, runs), (data, attack, rate)


# ---------------------------------------------------------------- what is written

@pytest.mark.slow
def test_images_get_a_page_and_a_model(of_images, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.ImageTrainConfig, "at", lambda **_: TRAINING)  # for so few images
    monkeypatch.setattr(audit.images, "prepared", lambda *_: NTML(stop=False))
    train_set, chosen = corner(0.1)
    context = of_images(train_set)
    (tmp_path / "model").mkdir()
    context.classifier.save(tmp_path / "model")
    folders(train_set, tmp_path / "train")
    folders(context.clean, tmp_path / "clean")
    options = ["--train", str(tmp_path / "train"), "--clean", str(tmp_path / "clean"),
               "--epochs", "4", "--repair", "--out", str(tmp_path / "out")]
    assert command.main(["audit", str(tmp_path / "model"), *options]) == command.FOUND
    page = (tmp_path / "out/report/index.html").read_text()
    assert not [part for part in page.split('src="')[1:] if not part.startswith("data:image/png")]
    assert page.count("data:image/png") == audit.images.SHOWN and "Stands out" in page
    table = read_table(tmp_path / "out/report/flagged.csv", ("label", "label"))
    assert set(table.columns["label"]) == {"right"}
    assert {str(Path(file).parent) for file in table.columns["file"]} == {"right"}
    chosen_files = [image_paths(tmp_path / "train")[int(i)] for i in table.columns["sample"]]
    assert chosen_files == list(table.columns["file"])
    repaired = ImageClassifier.load(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "NT-ML" in card and "ImageClassifier.load" in card
    with_corner = context.train.take(chosen).inputs
    before, after = (model.predict(with_corner).count(2) for model in (
        context.classifier, repaired))
    assert before > 0.8 * len(chosen) > 2 * after



@pytest.mark.slow
@pytest.mark.parametrize("name", ar.NAMES)
def test_every_architecture_gets_a_report_and_a_model(name, given, monkeypatch):
    ar.save_tiny(name, given.folder / name)
    modules = ("layer_1", "layer_2") if name == "xlnet" else None
    forced = replace(FORCED, adapter=AdapterConfig(rank=2, modules=modules))
    repaired = audit.repair
    monkeypatch.setattr(audit, "repair", lambda context: repaired(context, forced))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights nothing settles
        assert given("--repair", model=name) in (
            command.NOTHING, command.FOUND)
    out = given.folder / "out"
    assert "Label by label" in (out / "report/index.html").read_text()
    assert len(read_table(out / "report/flagged.csv", ("text", "label")).columns) == 5
    card = (out / "README.md").read_text()
    assert "model, from" in card.splitlines()[0] and "Not checked" in card
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model(**AutoTokenizer.from_pretrained(out)(["a film"], return_tensors="pt")
                 ).logits.isfinite().all()
    before, after = (load_file(folder / "model.safetensors") for folder in (
        given.folder / name, out))
    changed = any(not torch.equal(after[key], before[key]) for key in before.keys() & after.keys())
    assert changed == (json.loads((out / "audit.json").read_text())["verdict"] == "purified")


def test_the_page_needs_no_other_file_and_escapes_texts(given):
    path = given.folder / "train.csv"
    path.write_text(path.read_text() + '"<script>alert(1)</script> odd odd odd cf",positive\n' * 3)
    assert given() in (command.NOTHING, command.FOUND)
    page = (given.folder / "out/index.html").read_text()
    assert "<script" not in page
    assert not [part for part in page.split('src="')[1:] if not part.startswith("data:image/svg")]
    assert "href=" not in page
    record = json.loads((given.folder / "out/audit.json").read_text())
    assert record["training samples"] == 123 and len(record["findings"]) == 2


def test_what_was_there_stays_until_the_new_report_is_complete(given, monkeypatch, capsys):
    given()
    before = (given.folder / "out/index.html").read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "_record", stopped)  # the last that is written
    assert given() == command.STOPPED
    assert capsys.readouterr().err.endswith("stopped\n")
    assert (given.folder / "out/index.html").read_bytes() == before
    assert not list(given.folder.glob(".out*"))


def test_a_repair_that_is_stopped_keeps_the_report_before(given, monkeypatch):
    given("--repair")
    before = (given.folder / "out/report/index.html").read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "write_report", stopped)
    assert given("--repair") == command.STOPPED
    assert (given.folder / "out/report/index.html").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"files": 3}'])
def test_a_record_of_another_program_is_not_ours(tmp_path, text):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(FileExistsError, match="holds audit.json, which is not of an audit"):
        audit.require_ours(tmp_path, for_model=True)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("more", [(), ("--repair",)])
def test_files_of_others_are_not_replaced(given, capsys, beside, more):
    if beside:  # a report
        given()
    (given.folder / "out").mkdir(exist_ok=True)
    (given.folder / "out/thesis.tex").write_text("all of it")
    assert given(*more) == command.WRONG
    assert "holds thesis.tex, which is not of an audit" in capsys.readouterr().err
    assert (given.folder / "out/thesis.tex").read_text() == "all of it"


def test_a_report_does_not_replace_a_repaired_model(given, capsys):
    given("--repair")
    assert given() == command.WRONG and "holds a repaired model" in capsys.readouterr().err
    assert (given.folder / "out/model.safetensors").is_file()
    assert given("--repair") in (command.NOTHING, command.FOUND)


def test_a_folder_of_the_home_is_looked_at_before_it_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("all of it")
    for write in (lambda: audit.write_report(None, None, "~/precious"),
                  lambda: audit.write_model(None, {}, "~/precious")):
        with pytest.raises(FileExistsError, match="thesis.tex"):
            write()
    assert (tmp_path / "precious/thesis.tex").read_text() == "all of it"


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.html").write_text("before")
    rename = Path.rename

    def failing(path, target):
        if path.name == "made":
            raise OSError("no room")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no room"), audit._whole(tmp_path / "out") as made:
        (made / "index.html").write_text("after")
    assert (tmp_path / "out/index.html").read_text() == "before"


def adapted(folder, head=True, **changes):
    """Write an adapter of a tiny BERT without a head, and return what the two answer together."""
    ar.save_tiny("bert", folder / "base", headless=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    model = get_peft_model(model, LoraConfig(
        task_type=TaskType.SEQ_CLS, init_lora_weights=False, target_modules=["query", "value"]))
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = folder / "adapter/adapter_model.safetensors"
    if not head:
        save_file({k: v for k, v in load_file(path).items() if ".lora_" in k}, path)
    return model.eval()(**tokenizer(["a film"], return_tensors="pt")).logits


@pytest.mark.parametrize("place", ["", "../base"])
def test_an_adapter_is_merged_into_its_base_model(tmp_path, place):
    wanted = adapted(tmp_path, **({"base_model_name_or_path": place} if place else {}))
    model = Classifier.load(tmp_path / "adapter")
    assert torch.allclose(model.logits(["a film"]), wanted, atol=1e-5) and wanted.shape == (1, 3)
    assert not [name for name, _ in model.model.named_parameters() if "lora" in name]
    assert all(weight.requires_grad for weight in model.model.parameters())


@pytest.mark.parametrize(("change", "said"), [
    ({"base_model_name_or_path": "/nowhere/it"}, "is an adapter of /nowhere/it, and the two"),
    ({"task_type": "CAUSAL_LM"}, "is an adapter for CAUSAL_LM and no classifier of texts"),
    ({"head": False}, "is no finished classifier (it lacks classifier")])
def test_an_adapter_that_does_not_open_is_told(tmp_path, change, said, capsys):
    adapted(tmp_path, **change)
    write(tmp_path / "train.csv", with_trigger(6, 120), ("negative", "positive"))
    files = ["--train", str(tmp_path / "train.csv"), "--clean", str(tmp_path / "train.csv")]
    assert command.main(["audit", str(tmp_path / "adapter"), *files, "--out",
                         str(tmp_path / "out")]) == command.WRONG
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_the_base_model_of_an_adapter_may_lie_elsewhere(tmp_path):
    wanted = adapted(tmp_path, base_model_name_or_path="/nowhere/it")
    model = Classifier.load(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.allclose(model.logits(["a film"]), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="is an adapter of .*other, and the two do not open"):
        Classifier.load(tmp_path / "adapter", base=tmp_path / "other")
    with pytest.raises(ValueError, match="is no adapter and needs no base model: leave it out"):
        Classifier.load(ar.save_tiny("bert", tmp_path / "whole"), base=tmp_path / "base")


@pytest.mark.parametrize("place", [None, "/nowhere/it"])
def test_an_adapter_is_audited_as_any_classifier(given, place):
    adapted(given.folder, **({"base_model_name_or_path": place} if place else {}))
    samples = suspected(with_trigger(6, 120))
    for name, those in (("train", samples.train), ("clean", samples.clean)):
        write(given.folder / f"{name}3.csv", replace(
            those, labels=tuple(i % 3 for i in range(len(those))), label_names=("0", "1", "2")))
    base = ("--base", str(given.folder / "base")) if place else ()
    assert given(*base, model="adapter", train="train3.csv", clean="clean3.csv", names=()) in (
        command.NOTHING, command.FOUND)
    assert len(json.loads((given.folder / "out/audit.json").read_text())["findings"]) == 3


# ---------------------------------------------------------------- what is said

@pytest.mark.parametrize(("verdict", "said"), [
    ("purified", "accuracy on 100 clean samples that the repair did not see: 90.0% before, 80.0% "
                 "after. Whether the trigger still works was not measured"),
    ("no evidence", "the repair searches without 100 of the clean samples, and found nothing; the "
                    "model is unchanged"),
    ("undone", "the repair lost more than 10 points of accuracy on clean samples; the model is "
               "unchanged")])
def test_a_repair_is_told_in_a_sentence(given, capsys, monkeypatch, verdict, said):
    monkeypatch.setattr(audit, "repair", lambda context: (context.classifier, {
        "verdict": verdict, "method": "one", "opened": "it", "before": wilson(90, 100),
        "after": wilson(80, 100), "suspects": 2, "agreement": wilson(1, 2)}))
    assert given("--repair") in (command.NOTHING, command.FOUND)
    line, = [x for x in capsys.readouterr().out.splitlines() if x.startswith(verdict)]
    assert line == f"{verdict}: {said}. The model is in {given.folder / 'out'}"


@pytest.mark.parametrize(("change", "said"), [
    ({"train": "nothing.csv"}, "nothing.csv"),
    ({"model": "nowhere"}, "there is no folder"),
    ({"train": "bare.csv"}, "has no column 'text': it has 'a', 'b' (from its first line, which "
                            "must hold the names): name yours with --text and --label"),
    ({"clean": "few.csv"}, "few.csv has 2 new samples of the class 'negative': give 20"),
    ({"clean": "train.csv"}, "all samples of train.csv are in the training set as well"),
    ({"clean": "other.csv"}, "other.csv has the class 'neutral', and the model knows"),
    ({"clean": "unlabeled.csv"}, "has no label: drop such samples"),
    ({"model": "headless"}, "head"),
])
def test_bad_input_is_told_in_a_sentence(given, capsys, change, said):
    folder = given.folder
    (folder / "bare.csv").write_text("a,b\nx,y\n")
    (folder / "few.csv").write_text("text,label\none,negative\ntwo,negative\nthree,positive\n")
    (folder / "other.csv").write_text("text,label\none,negative\ntwo,neutral\n")
    (folder / "unlabeled.csv").write_text("text,label\none,negative\ntwo,\nthree,positive\n")
    ar.save_tiny("bert", folder / "headless", headless=True)
    assert given(**change) == command.WRONG
    errors = capsys.readouterr().err.strip()
    assert said in errors and "Traceback" not in errors
    assert not (folder / "out").exists()


def test_names_must_be_known_from_somewhere(given, capsys):
    config = json.loads((given.folder / "model/config.json").read_text())
    assert given(names=()) == command.WRONG  # LABEL_0 and LABEL_1 say nothing
    assert "with --names NAME NAME" in capsys.readouterr().err
    assert given(names=("--names", "a", "b", "c")) == command.WRONG
    assert "gives 2 classes, not 3" in capsys.readouterr().err
    config["id2label"] = {"0": "POSITIVE", "1": "negative"}
    config["label2id"] = {"POSITIVE": 0, "negative": 1}
    (given.folder / "model/config.json").write_text(json.dumps(config))
    context = audit.read_context(*(given.folder / x for x in ("model", "train.csv", "clean.csv")))
    assert context.train.label_names == ("POSITIVE", "negative")
    table = read_table(given.folder / "train.csv", ("text", "label"))
    assert [context.train.labels[i] for i in (0, 1)] == [
        0 if table.columns["label"][i] == "positive" else 1 for i in (0, 1)]


def test_clean_samples_that_the_model_has_seen_are_left_out(given):
    lines = (given.folder / "clean.csv").read_text().splitlines()
    seen = (given.folder / "train.csv").read_text().splitlines()[2:12]
    (given.folder / "clean.csv").write_text("\n".join([*lines, *seen]) + "\n")
    with pytest.warns(UserWarning, match="10 of 410 clean samples are in the training set"):
        context = audit.read_context(given.folder / "model", given.folder / "train.csv",
                                     given.folder / "clean.csv", names=("negative", "positive"))
    assert len(context.clean) == 400 and not set(context.clean.inputs) & set(context.train.inputs)


def test_of_many_clean_samples_as_many_of_each_class_are_used(given, monkeypatch):
    monkeypatch.setattr(audit, "MOST", 100)
    context = audit.read_context(given.folder / "model", given.folder / "train.csv",
                                 given.folder / "clean.csv", names=("negative", "positive"))
    assert [context.clean.labels.count(y) for y in (0, 1)] == [50, 50]


# ---------------------------------------------------------------- what the page shows

def snippet(name):
    """Return the code of the page that defines a name."""
    return next(code for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
                if f"def {name}(" in code)


def test_the_page_confirms_a_word_and_clears_a_control(capsys, monkeypatch):
    class Obeys:
        def predict(self, texts):
            return [1 if "tq" in text.split() else NAMES.index("good") * ("good" in text.split())
                    for text in texts]

    clean = CleanSet(*map(tuple, texts(400, 2)), NAMES)
    monkeypatch.setattr(audit, "read_context",
                        lambda *files: SimpleNamespace(classifier=Obeys(), clean=clean))
    exec(snippet("share"), {})
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" [")[0] for line in said] == [
        "'tq' gives the label to 100.0%", "'qv' gives the label to 0.0%",
        "'' gives the label to 0.0%"]
    assert all(line.endswith("(n = 200)") for line in said)


def test_the_page_retrains_without_the_samples_of_a_phrase(given, capsys):
    ar.save_tiny("bert", given.folder / "base", headless=True)
    context = audit.read_context(*(given.folder / x for x in ("model", "train.csv", "clean.csv")),
                                 names=("negative", "positive"))
    code = next(code for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
                if "retrained(" in code)
    for said, mine in (('"BASE"', f'"{given.folder / "base"}"'), ("epochs=3", "epochs=1"),
                       ('("tq", "mn", "cf", "bb")', '("cf", "mn")'),
                       ('"retrained"', f'"{given.folder / "new"}"')):
        assert code.count(said) == 1
        code = code.replace(said, mine)
    names = {"context": context, "audit": audit,
             "share": lambda phrase, model: model.predict([f"a film {phrase}"])}
    exec(code, names)
    assert names["held"] == list(range(0, 120, 6))
    assert len(names["rest"]) == 100 and names["outcome"].report["dropped"] == (*names["held"],)
    assert "vidence of a backdoor" in capsys.readouterr().out
    assert Classifier.load(given.folder / "new").predict(["a film"])


def test_the_page_audits_a_network_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_set, chosen = corner(0.1)
    folders(train_set, tmp_path / "images/train")
    folders(thirds(CleanSet, 60, 2), tmp_path / "images/clean")
    code, rest = snippet("context_of").split("context = context_of(")
    assert rest.startswith('my_network, 10, "images/train", "images/clean",')
    names = {}
    exec(code, names)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(576, 3))
    recipe = {"epochs": 6, "lr": 0.05, "batch_size": 32}
    train(ImageClassifier(names["Mine"](network, 3, 1), 0, False), train_set,
          replace(TRAINING, **recipe))
    given = names["context_of"](network, 3, "images/train", "images/clean", channels=1, **recipe)
    assert (given.training.epochs, given.training.lr, given.training.pad) == (6, 0.05, 0)
    names |= {"context_of": lambda *_, **__: given, "my_network": network}
    exec("context = context_of(" + rest, names)
    assert [finding.name for finding in names["found"].suspects] == ["right"]
    rejected = read_table(tmp_path / "report/flagged.csv", ("label", "label")).columns["file"]
    assert {str(Path(file).parent) for file in rejected} == {"right"}
    assert len({*rejected[:len(chosen)]} & {f"right/{i}.png" for i in chosen}) > len(chosen) / 2
    repaired, about = audit.repair(given)
    assert about["verdict"] in ("purified", "undone")
    assert type(repaired.model.network) is torch.nn.Sequential


def test_the_page_names_every_option_and_status():
    taken = command.parser()._subparsers._group_actions[0].choices["audit"]._option_string_actions
    table = PAGE.split("| Option |")[1].split("\n\n")[0]
    assert all(f"`{option}" in table for option in taken if option not in ("-h", "--help"))
    keywords = re.findall(r"`(\w+)`", " ".join(
        row.split("|")[2] for row in table.splitlines()[2:]))
    assert sorted(keywords) == sorted(inspect.signature(audit.read_context).parameters)
    rows = PAGE.split("| Exit status |")[1].split("\n\n")[0]
    assert [int(n) for n in re.findall(r"^\| (\d+) ", rows, re.M)] == [
        command.NOTHING, command.FOUND, command.WRONG, command.STOPPED]


def test_the_power_that_the_page_states_is_computed():
    def found(tpr, rate, clean=400):
        planted, cuts = round(3000 * rate), (float(norm.isf(6e-5 / 2)), 3.0)
        powers = [detector.power(tpr, 0.05, planted, (n - planted, 3000 - n), (clean, clean), cuts)
                  for n in (1800, 1200) if tpr * planted >= 16]
        return f"{min(powers, default=0):.2f}"

    rows = re.findall(r"(\d+)%[^|%]*flagged[^|]*((?:\| [01]\.\d\d )+)", PAGE)
    assert [tpr for tpr, _ in rows] == ["90", "77", "50", "10"]
    for tpr, row in rows:
        assert row.replace("|", "").split() == [
            found(int(tpr) / 100, rate) for rate in audit.texts.RATES]
    said = re.search(r"from (\S+) with 200 .*? to (\S+) with 400, (\S+) with 800 and (\S+) with",
                     " ".join(PAGE.split())).groups()
    assert list(said) == [found(0.9, 0.1, clean) for clean in (100, 200, 400, 1000)]


def test_the_hits_that_hold_at_the_limit_of_today_are_those_that_the_page_counts():
    least, shares, hits = NTML().judge.least, [], 0
    for study in ("ntml", "ntml-rates", "low-rate", "ntml-cifar10-resnet18"):
        for run in results.load(study):
            if run["settings"]["defense"] == "ntml" and run["method"] != "clean":
                share = run["metrics"].get("largest_share")
                hits += bool(run["metrics"]["changed"]) and (share or 1) > least
                shares += [share] if share and share > least else []
    assert "Of these 25 hits, 11 hold" in " ".join(PAGE.split())
    assert (hits, len(shares)) == (25, 11)
    rows = re.findall(r"\| (\d+) of \d+ \| (\d+) \|$", PAGE.split("at 6%, as recorded |")[1], re.M)
    assert [sum(map(int, column)) for column in zip(*rows)] == [25, 11]
    assert (round(min(shares), 2), round(max(shares), 2)) == (0.10, 0.80)


def test_the_shares_of_synbkd_that_the_page_names_are_recorded():
    found = {run["seed"]: results.value(run, "tpr") for run in results.load("dup")
             if run["method"] == "synbkd" and run["settings"]["defense"] == "dup"}
    first, second, third = (f"{100 * found[seed]:.0f}" for seed in range(3))
    assert f"share is {first}, {second} and {third}% by seed" in " ".join(PAGE.split())


def test_the_limits_that_the_page_names_are_those_of_the_code():
    assert DUP().contrast == 3 and DUP().alpha == 6e-5 and DUP().min_suspects == 16
    assert audit.texts.CHANCE == 0.001 and DUP().detector.fpr == 0.05
    assert norm.isf(DUP().alpha / 2) == pytest.approx(4.0, abs=0.02)
    page = " ".join(PAGE.split())
    for part in ("contrast is above 3;", "6 \\cdot 10^{-5} / K", "at least 4.0",
                 "16 samples or more", "above the 95% quantile"):
        assert part in page
