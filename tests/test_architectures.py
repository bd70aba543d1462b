"""Whatever model a reader brings: it is made ready, or refused in one sentence.

The table in chapters/api/defenses.md is what is found here.
"""

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from helpers import architectures as ar
from helpers.pictures import TRAINING, thirds
from safetensors.torch import load_file

from bdutils import evaluation
from bdutils.defenses.base import Case, Outcome, repair
from bdutils.defenses.baselines import MinimaxSettings, TuningSettings
from bdutils.defenses.bedkd import BeDKDSettings
from bdutils.defenses.dup import DUPSettings
from bdutils.defenses.guards import OnionSettings, StripSettings
from bdutils.defenses.ntml import NTMLSettings
from bdutils.models import adopt
from bdutils.models.image import PictureClassifier
from bdutils.models.text import Classifier, encoder_source
from bdutils.roles import DefenderView, ReservedSet, TrainingSet
from bdutils.training import TrainSettings, train, untrained

PAGE = Path(__file__).resolve().parent.parent / "chapters/api/defenses.md"
NAMES = ("negative", "positive")
QUICK = TrainSettings(epochs=1, max_length=16, batch_size=16)
# Settings with which every step of a method runs, even on a model that is no victim.
METHODS = {
    "FT": TuningSettings(epochs=1), "FT-SAM": TuningSettings(epochs=1, rho=1.0),
    "STRIP": StripSettings(copies=1), "ONION": OnionSettings(),
    "BeDKD": BeDKDSettings(dmm_epochs=1, cycles=2, alpha=1.0, threshold=2.0),
    "DUP": DUPSettings(alpha=float("inf"), least=1, passes=1, steps=2, rank=2, watched=0,
                       fpr=0.5),
    "NT-ML": NTMLSettings(head_steps=3), "FP": TuningSettings(epochs=1, max_drop=0.1),
    "NAD": TuningSettings(epochs=1, attention=1.0),
    "I-BAU": MinimaxSettings(rounds=1, climbs=1),
}
# What the refusals name.
REMEDIES = {("gpt2", "DUP"): {"pooling": "last"}, ("llama", "DUP"): {"pooling": "last"},
            ("xlnet", "DUP"): {"modules": ("layer_1", "layer_2")}}
WORDS = "film story long warm quiet odd bright slow plain cold".split()


def rows(role, n, start):
    """Short texts with a word that says the class."""
    return role(tuple(" ".join(["the", *(WORDS[(i * k) % 10] for k in range(1, 4 + i % 3)),
                                NAMES[i % 2], str(start + i)]) for i in range(n)),
                tuple(i % 2 for i in range(n)), NAMES)


VIEW = DefenderView(rows(ReservedSet, 40, 100), rows(TrainingSet, 32, 200))
TEXTS = VIEW.pool.texts


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a function that gives the folder of a tiny finished model."""
    made, root = {}, tmp_path_factory.mktemp("models")

    def folder(name):
        if name not in made:
            made[name] = ar.save_tiny(name, root / name)
        return made[name]

    return folder


@pytest.fixture
def model(folders):
    """Return a function that gives a tiny finished model."""
    def load(name):
        if name == "images":
            return PictureClassifier.new(3, channels=1, network="small", pad=1, flip=False)
        return replace(Classifier.load(folders(name)), max_length=16, source=str(folders(name)))

    return load


def one_sentence(error):
    """Return what an error says, which must be one short sentence without a library's voice."""
    said = str(error)
    assert "\n" not in said and len(said) < 200 and said.strip() == said, said
    return said


def outcome(name, settings, classifier):
    """Run a defense on a tiny model; return None, or the sentence with which it refuses."""
    view, training = VIEW, QUICK
    if name == "images":
        view = DefenderView(thirds(ReservedSet, 60, 1), thirds(TrainingSet, 60, 0))
        training = replace(TRAINING, epochs=1)
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    try:
        found = repair(settings, Case(classifier, view, training))
    except ValueError as error:
        return one_sentence(error)
    finally:
        after = classifier.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    answers = found.model.predict(view.pool.texts)
    assert len(answers) == len(view.pool) and {*answers} <= {-1, *range(view.pool.num_labels)}
    assert found.verdict != "no evidence"
    return None


@pytest.fixture(scope="session")
def found():
    """Collect what each cell of the table says."""
    return {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*ar.NAMES, "images"])
@pytest.mark.filterwarnings("ignore:the defense took", "ignore:the push has not settled")
def test_every_defense_runs_on_every_architecture_or_says_why_not(model, found, name, method):
    settings = METHODS[method]
    if name == "images" and method == "BeDKD":
        settings = replace(settings, lr=3e-4)
    why = outcome(name, settings, model(name))
    remedy = REMEDIES.get((name, method))
    assert remedy is None or why  # a remedy is for what was refused
    if remedy:
        assert outcome(name, replace(settings, **remedy), model(name)) is None
    found[name, method] = why, bool(remedy)


def table(cells):
    """Return the table of the page, and the sentences that its numbers stand for."""
    titles = {"bert": "BERT", "roberta": "RoBERTa", "distilbert": "DistilBERT",
              "deberta": "DeBERTa", "electra": "ELECTRA", "albert": "ALBERT", "mpnet": "MPNet",
              "modernbert": "ModernBERT", "bart": "BART", "t5": "T5", "xlnet": "XLNet",
              "gpt2": "GPT-2", "llama": "LLaMA", "images": "PreAct-ResNet (images)"}
    reasons = list(dict.fromkeys(why for why, _ in cells.values() if why))
    lines = [f"| Model | {' | '.join(METHODS)} |", "|" + " --- |" * (len(METHODS) + 1)]
    for name, title in titles.items():
        row = []
        for method in METHODS:
            why, helped = cells[name, method]
            number = f"({reasons.index(why) + 1})" if why else ""
            row.append("runs" if not why else f"runs {number}" if helped else f"no {number}")
        lines.append(f"| {title} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))])


def test_the_page_says_what_was_found(found):
    if len(found) < len(METHODS) * (len(ar.NAMES) + 1):
        pytest.skip("only with the whole table")
    assert table(found) in PAGE.read_text(encoding="utf8")


def test_nobody_trains_anew_from_an_encoder_that_is_not_known(model):
    case = Case(replace(model("distilbert"), source=None), VIEW, QUICK)
    with pytest.raises(ValueError, match="a new DistilBert is trained from its pretrained") as no:
        repair(METHODS["NT-ML"], case)
    one_sentence(no.value)
    fresh = Case(model("distilbert"), VIEW, QUICK).fresh(QUICK)
    assert type(fresh.model) is type(model("distilbert").model)


@pytest.mark.parametrize("name", ar.NAMES)
def test_a_model_is_made_ready(model, folders, tmp_path, name):
    classifier = model(name)
    assert classifier.tokenizer.pad_token_id == classifier.model.config.pad_token_id is not None
    together, alone = (classifier.logits(TEXTS[:9], batch_size=size) for size in (9, 1))
    assert torch.allclose(together, alone, atol=1e-5)
    fresh = Classifier.new(3, source=str(folders(name)), max_length=16, dropout=0.3)
    rates = {part.p for part in fresh.model.modules() if isinstance(part, torch.nn.Dropout)}
    config = fresh.model.config.to_dict()
    rates |= {value for field, value in config.items()
              if isinstance(value, float) and ("dropout" in field or field.endswith("pdrop"))}
    assert rates == {0.3} and fresh.logits(TEXTS[:2]).shape == (2, 3)
    classifier.save(tmp_path)
    again = Classifier.load(tmp_path)
    assert again.max_length == 16 and torch.equal(again.logits(TEXTS), classifier.logits(TEXTS))


@pytest.mark.parametrize("name", ["bert", "distilbert", "bart", "gpt2", "modernbert"])
def test_the_head_is_fresh_even_where_the_source_has_one(folders, name):
    kept = load_file(folders(name) / "model.safetensors")
    parts = [{key: value for key, value in Classifier.new(
        2, source=str(folders(name)), seed=seed, max_length=16).model.state_dict().items()
        if value.dim() == 2} for seed in (0, 0, 1)]
    head = adopt.head_modules(Classifier.load(folders(name)).model)
    for key, value in parts[0].items():
        assert torch.equal(value, parts[1][key])
        changes = key.split(".")[0] in head
        assert torch.equal(value, parts[2][key]) != changes
        assert torch.equal(value, kept[key]) != changes if key in kept else True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_and_trained_as_float32(tmp_path, dtype):
    losses = []
    for stored in (torch.float32, dtype):
        folder = ar.save_tiny("bert", tmp_path / str(stored), headless=True, dtype=stored)
        classifier = Classifier.new(2, source=str(folder), max_length=16)
        assert {weight.dtype for weight in classifier.model.parameters()} == {torch.float32}
        losses.append(train(classifier, VIEW.pool, QUICK).losses[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_half_precision_is_never_trained(model):
    classifier = model("bert")
    classifier.model.half()
    with pytest.raises(ValueError, match="weights of Bert are float16") as no:
        train(classifier, VIEW.pool, QUICK)
    one_sentence(no.value)
    with pytest.raises(ValueError, match="float16"):
        repair(METHODS["BeDKD"], Case(classifier, VIEW, QUICK))
    direct = Classifier(model("bert").model.bfloat16(), classifier.tokenizer, 16)
    assert direct.model.dtype == torch.float32


@pytest.mark.parametrize("name, most", [("bert", 40), ("roberta", 39), ("mpnet", 38),
                                        ("distilbert", 40), ("gpt2", 40), ("bart", 40),
                                        ("llama", 40), ("t5", None), ("xlnet", None)])
def test_positions_cap_the_length(folders, name, most):
    long = " ".join(WORDS * 12)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = Classifier.new(2, source=str(folders(name)), max_length=60)
        again = replace(made, model=made.model)
    told = [one_sentence(w.message) for w in told if "positions" in str(w.message)]
    assert made.max_length == again.max_length == (most or 60) and len(told) == bool(most)
    assert made.logits([long]).isfinite().all() and len(made.encode([long])[0]) == (most or 60)


def test_a_tokenizer_without_a_maximum(folders, tmp_path):
    for name, most in (("llama", 40), ("t5", 512)):
        folder = shutil.copytree(folders(name), tmp_path / name)
        tokenizer = t.AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = int(1e30)
        tokenizer.save_pretrained(folder)
        assert Classifier.load(folder).max_length == most


def test_a_text_that_holds_the_last_token_of_a_text(model):
    for name in ("bart", "t5"):
        assert model(name).logits(["a [SEP] good film", "a good film"]).shape == (2, 2)


def changed(folder, **changes):
    """Change the configuration of a folder."""
    path = folder / "config.json"
    about = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "never loaded here"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("*token*")], "no tokenizer"),
    "cut short": (lambda f: cut(f / "model.safetensors"), "damaged or cut short"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "does not open"),
    "no type": (lambda f: changed(f, model_type=None), "does not open"),
    "unknown type": (lambda f: changed(f, model_type="nothing"), "does not open"),
    "images": (lambda f: changed(f, model_type="vit"), "is a ViT, which"),
    "own code": (lambda f: changed(f, model_type="own", auto_map={
        "AutoConfig": "x.Y", "AutoModelForSequenceClassification": "x.Z"}), "code of its own"),
    "adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "an adapter"),
    "a run of Trainer": (lambda f: [(f / "checkpoint-9").mkdir(), (f / "config.json").rename(
        f / "checkpoint-9/config.json")], "perhaps .*checkpoint-9"),
    "no words": (lambda f: t.BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2,
                 "[SEP]": 3, "[MASK]": 4}).save_pretrained(f), "knows no words"),
    "small vocabulary": (lambda f: ar.save_tiny("bert", f, vocab_size=900), "only 900"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_folder_is_told_in_a_sentence(folders, tmp_path, kind, finished):
    folder = shutil.copytree(folders("bert"), tmp_path / "m")
    damage, match = DAMAGES[kind]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as no:
        if finished:
            Classifier.load(folder)
        else:
            Classifier.new(2, source=str(folder))
    one_sentence(str(no.value).replace(str(folder), "m"))


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForMaskedLM",
                                  "AutoModelForTokenClassification"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_without_a_head_is_no_finished_model(tmp_path, name, kind, named):
    if (name, kind) == ("llama", "AutoModelForMaskedLM"):
        kind = "AutoModelForCausalLM"
    folder = ar.save_tiny(name, tmp_path / "m")
    config = t.AutoConfig.from_pretrained(folder)
    getattr(t, kind).from_config(config).save_pretrained(folder)
    if not named:  # of a token classifier of this kind only the configuration tells
        if (name, kind) == ("llama", "AutoModelForTokenClassification"):
            return
        changed(folder, architectures=None)
    with pytest.raises(ValueError, match="is no finished classifier") as no:
        Classifier.load(folder)
    one_sentence(str(no.value).replace(str(folder), "m"))
    assert Classifier.new(2, source=str(folder), max_length=9).predict(TEXTS[:2])


def test_a_regression_is_no_classifier(tmp_path):
    folder = ar.save_tiny("bert", tmp_path, num_labels=1)
    with pytest.raises(ValueError, match="one number and no classes"):
        Classifier.load(folder)


@pytest.mark.parametrize("wrong", ["smal", "casual", "roberta", "/no/such/folder", "./mine",
                                   "a/b/c", "~/nowhere-at-all"])
def test_an_unknown_encoder_is_refused(toy_task, wrong):
    for use in (encoder_source, lambda name: Classifier.new(2, source=name),
                lambda name: evaluation.victim(toy_task, encoder=name)):
        with pytest.raises(ValueError, match="small, full, causal, a folder") as no:
            use(wrong)
        one_sentence(no.value)


def test_encoders_that_are_known(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders("bert").parent))
    assert encoder_source("~/bert") == encoder_source(folders("bert")) == str(folders("bert"))
    assert encoder_source("ORG/some-model.v2") == "ORG/some-model.v2"
    assert encoder_source("full") == encoder_source("bert-base-uncased") == "bert-base-uncased"
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        Classifier.load("nowhere")


@pytest.mark.parametrize("scale, remedy", [("small", "give no encoder: that of BDUTILS_SCALE"),
                                           ("full", "or stay at BDUTILS_SCALE=small")])
def test_the_remedy_for_a_missing_hub_is_one_that_helps(monkeypatch, scale, remedy):
    monkeypatch.setenv("BDUTILS_SCALE", scale)
    with pytest.raises(ConnectionError, match=remedy):
        Classifier.load("nobody/no-such-model")


def test_a_victim_on_an_own_encoder(folders, tmp_path, toy_task, cache):
    folder = shutil.copytree(folders("mpnet"), tmp_path / "mine")
    made = evaluation.victim(toy_task, None, encoder=str(folder), settings=QUICK)
    assert made.classifier.model.config.model_type == "mpnet"
    assert made.classifier.source == str(folder)
    ar.save_tiny("electra", folder)  # the same place, another encoder
    other = evaluation.victim(toy_task, None, encoder=str(folder), settings=QUICK)
    assert other.classifier.model.config.model_type == "electra"


def test_images_have_no_encoder(toy_task):
    task = replace(toy_task, train=thirds(TrainingSet, 6, 0))
    with pytest.raises(ValueError, match="have no encoder"):
        evaluation.victim(task, None, encoder="small")


def test_classes_in_another_order_are_refused_or_reordered(folders, tmp_path, toy_task):
    folder = shutil.copytree(folders("bart"), tmp_path / "m")
    plain = Classifier.load(folder)
    changed(folder, id2label={"0": "Positive", "1": "NEGATIVE"},
            label2id={"Positive": 0, "NEGATIVE": 1})
    turned = Classifier.load(folder)
    for use in (lambda m: repair(METHODS["FT"], Case(m, VIEW, QUICK)),
                lambda m: evaluation.evaluate(m, toy_task, "badnets")):
        with pytest.raises(ValueError, match="label_names=") as no:
            use(turned)
        one_sentence(str(no.value))
    right = Classifier.load(folder, label_names=NAMES)
    assert torch.equal(right.logits(TEXTS), plain.logits(TEXTS).flip(1))
    evaluation.evaluate(right, toy_task, "badnets")
    with pytest.raises(ValueError, match="leave label_names out"):
        Classifier.load(folder, label_names=("good", "bad"))
    three = Classifier.new(3, source=str(folder), max_length=9)
    for use in (lambda m: repair(METHODS["FT"], Case(m, VIEW, QUICK)),
                lambda m: train(m, VIEW.pool, QUICK)):
        with pytest.raises(ValueError, match="gives 3 classes and the data has 2") as no:
            use(three)
        one_sentence(no.value)


def test_maps_for_lora(model):
    bert = model("bert").model
    assert adopt.lora_targets(bert, ("value",)) == ["value"]
    assert adopt.lora_targets(bert, None) == ["query", "key", "value"]
    with pytest.raises(ValueError, match="no maps named .'q_proj'.") as no:
        adopt.lora_targets(bert, ("q_proj",), ("query", "key", "value"))
    one_sentence(no.value)
    assert adopt.lora_targets(model("t5").model, ("query", "key", "value"),
                              ("query", "key", "value")) == ["q", "k", "v"]


@dataclass(frozen=True)
class Own:
    """Settings of a reader's defense."""

    give: object = None


@repair.register
def _(settings: Own, case: Case) -> Outcome:
    return settings.give(case.classifier) if callable(settings.give) else settings.give


@pytest.mark.parametrize("give, kind, match", [
    (None, TypeError, "gave a NoneType and no outcome"),
    (lambda model: model, TypeError, "gave a Classifier and no outcome: end it with"),
    (lambda model: Outcome(model.model), TypeError, "has no method `predict`"),
    (lambda model: Outcome(None), TypeError, "a NoneType, has no method `predict`"),
    (lambda model: Outcome(SimpleNamespace(predict=lambda x: [0])), ValueError, "4 samples"),
    (lambda model: Outcome(SimpleNamespace(predict=lambda x: [7] * 4)), ValueError, "4 samples"),
    (lambda model: Outcome(SimpleNamespace(predict=lambda: 0)), ValueError, "does not predict"),
    (lambda model: Outcome(SimpleNamespace(predict=lambda x: None)), ValueError,
     "does not predict")])
def test_what_a_readers_defense_gives_is_checked_at_the_door(model, give, kind, match):
    with pytest.raises(kind, match=match) as no:
        repair(Own(give), Case(model("bert"), VIEW, QUICK))
    one_sentence(no.value)


def test_a_readers_defense_is_registered_or_told_how(model):
    case = Case(model("bert"), VIEW, QUICK)
    assert repair(Own(Outcome), case).model is case.classifier
    with pytest.raises(TypeError, match="annotate its first parameter") as no:
        @repair.register
        def own(settings, case):
            return Outcome(case.classifier)
    one_sentence(no.value)
    with pytest.raises(TypeError, match="Own is a class"):
        repair(Own, case)


class Network(torch.nn.Module):
    """A reader's own network for images."""

    def __init__(self, give):
        super().__init__()
        self.body, self.give = torch.nn.Linear(144, 3), give
        self.config = SimpleNamespace(num_labels=3)

    @property
    def device(self):
        return self.body.weight.device

    def forward(self, pixel_values, output_hidden_states=False):
        return self.give(self.body(pixel_values.flatten(1)))


def test_a_readers_network_is_called_once_before_the_work():
    view = DefenderView(thirds(ReservedSet, 60, 1), thirds(TrainingSet, 60, 0))

    def tried(network, method):
        return repair(METHODS[method], Case(PictureClassifier(network), view, TRAINING))

    good = Network(lambda x: t.utils.ModelOutput(logits=x))
    for method in ("FT", "STRIP", "NT-ML"):
        with warnings.catch_warnings(action="ignore"):
            assert tried(good, method).model.predict(view.pool.texts)
    for network, method, match in (
            (good, "BeDKD", "no hidden states"), (good, "NAD", "no hidden states"),
            (good, "FP", "does not have as `norm`"),
            (Network(lambda x: x), "FT", "cannot be called .*must take pixel_values"),
            (Network(lambda x: t.utils.ModelOutput(logits=x[:, :2])), "FT", "of 3 classes"),
            (torch.nn.Linear(2, 2), "FT", "needs `device` and `config.num_labels`")):
        with pytest.raises((ValueError, TypeError), match=match) as no:
            tried(network, method)
        one_sentence(no.value)
    with pytest.raises(TypeError, match="works on a `Classifier`") as no:
        repair(METHODS["FT"], Case(good, view, TRAINING))
    one_sentence(no.value)


def test_a_folder_of_a_network_for_images(tmp_path):
    made = untrained(thirds(TrainingSet, 6, 0), TRAINING)
    with pytest.raises(FileNotFoundError, match="holds no network.json"):
        PictureClassifier.load(tmp_path)
    for spoil in (lambda: cut(tmp_path / "model.safetensors"),
                  lambda: (tmp_path / "network.json").write_text("[]"),
                  lambda: (tmp_path / "network.json").write_text('{"network": {"widths": [4]}}')):
        made.save(tmp_path)
        assert PictureClassifier.load(tmp_path).pad == 1
        spoil()
        with pytest.raises(ValueError, match="does not open as a network") as no:
            PictureClassifier.load(tmp_path)
        one_sentence(str(no.value).replace(str(tmp_path), "m"))
