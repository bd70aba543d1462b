"""Whatever model a reader brings: it is made ready, or rejected in one sentence.

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
from helpers.images import TRAINING, thirds
from safetensors.torch import load_file

from bdutils import evaluation
from bdutils.defenses.base import DEFENSES, Context, Outcome, register
from bdutils.defenses.bedkd import BeDKD
from bdutils.defenses.detector import DetectorConfig
from bdutils.defenses.dup import DUP, AdapterConfig, UnlearnConfig
from bdutils.defenses.fineprune import FinePruning
from bdutils.defenses.finetune import FineTuning, TuneConfig
from bdutils.defenses.ft_sam import FTSAM
from bdutils.defenses.ibau import IBAU
from bdutils.defenses.mapping import ModuleConfig, ScanConfig
from bdutils.defenses.nad import NAD
from bdutils.defenses.ntml import NTML, JudgeConfig, PairConfig
from bdutils.defenses.onion import ONION
from bdutils.defenses.strip import STRIP
from bdutils.models import adopt
from bdutils.models.image import ImageClassifier
from bdutils.models.text import Classifier, encoder_source
from bdutils.roles import CleanSet, TrainSet
from bdutils.training import TrainConfig, train, untrained

PAGE = Path(__file__).resolve().parent.parent / "chapters/api/defenses.md"
NAMES = ("negative", "positive")
QUICK = TrainConfig(epochs=1, max_length=16, batch_size=16)
# With these every step of a method runs, even on a model that is no victim.
BRIEF = TuneConfig(epochs=1)
METHODS = {
    "FT": FineTuning(BRIEF), "FT-SAM": FTSAM(BRIEF, rho=1.0), "STRIP": STRIP(copies=1),
    "ONION": ONION(),
    "BeDKD": BeDKD(module=ModuleConfig(epochs=1), scan=ScanConfig(alpha=1.0, threshold=2.0),
                   cycles=2),
    "DUP": DUP(detector=DetectorConfig(fpr=0.5), adapter=AdapterConfig(rank=2),
               unlearning=UnlearnConfig(epochs=1, min_steps=2), monitored=0, min_suspects=1,
               alpha=float("inf")),
    "NT-ML": NTML(PairConfig(head_steps=3), judge=JudgeConfig("global")),
    "FP": FinePruning(BRIEF, max_drop=0.1),
    "NAD": NAD(BRIEF, weight=1.0), "I-BAU": IBAU(rounds=1, ascent_steps=1),
}
# What the errors name.
LAST = {"detector": DetectorConfig(fpr=0.5, pooling="last")}
REMEDIES = {("gpt2", "DUP"): LAST, ("llama", "DUP"): LAST,
            ("xlnet", "DUP"): {"adapter": AdapterConfig(rank=2, modules=("layer_1", "layer_2"))}}
WORDS = "film story long warm quiet odd bright slow plain cold".split()


def samples(role, n, start):
    """Short texts with a word that says the class."""
    return role(tuple(" ".join(["the", *(WORDS[(i * k) % 10] for k in range(1, 4 + i % 3)),
                                NAMES[i % 2], str(start + i)]) for i in range(n)),
                tuple(i % 2 for i in range(n)), NAMES)


CLEAN, TRAIN = samples(CleanSet, 40, 100), samples(TrainSet, 32, 200)
TEXTS = TRAIN.inputs


def context(classifier):
    return Context(classifier, CLEAN, TRAIN, QUICK)


def image_context(classifier, training=TRAINING):
    return Context(classifier, thirds(CleanSet, 60, 1), thirds(TrainSet, 60, 0), training)


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
            return ImageClassifier.new(3, channels=1, network="small", pad=1, flip=False)
        return replace(Classifier.load(folders(name)), max_length=16, source=str(folders(name)))

    return load


def one_sentence(error):
    """Return what an error says, which must be one short sentence without a library's voice."""
    said = str(error)
    assert "\n" not in said and len(said) < 200 and said.strip() == said, said
    return said


def outcome(name, defense, classifier):
    """Run a defense on a tiny model; return None, or the sentence with which it refuses."""
    given = (image_context(classifier, replace(TRAINING, epochs=1)) if name == "images"
             else context(classifier))
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    try:
        found = defense(given)
    except ValueError as error:
        return one_sentence(error)
    finally:
        after = classifier.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    answers = found.model.predict(given.train.inputs)
    assert len(answers) == len(given.train)
    assert {*answers} <= {-1, *range(given.train.num_labels)}
    assert found.verdict != "no evidence"
    return None


@pytest.fixture(scope="session")
def found():
    """Collect what each cell of the table says."""
    return {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ar.NAMES[1:]), "images"])
@pytest.mark.filterwarnings("ignore:the defense took", "ignore:the unlearning")
def test_every_defense_runs_on_every_architecture_or_says_why_not(model, found, name, method):
    defense = METHODS[method]
    if name == "images" and method == "BeDKD":
        defense = replace(defense, lr=3e-4)
    why = outcome(name, defense, model(name))
    remedy = REMEDIES.get((name, method))
    assert remedy is None or why  # a remedy is for what was rejected
    if remedy:
        assert outcome(name, replace(defense, **remedy), model(name)) is None
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
        cells_shown = []
        for method in METHODS:
            why, helped = cells[name, method]
            number = f"({reasons.index(why) + 1})" if why else ""
            cells_shown.append("runs" if not why else
                               f"runs {number}" if helped else f"no {number}")
        lines.append(f"| {title} | {' | '.join(cells_shown)} |")
    return "\n".join([*lines, "", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))])


@pytest.mark.slow
def test_the_page_says_what_was_found(found):
    if len(found) < len(METHODS) * (len(ar.NAMES) + 1):
        pytest.skip("only with the whole table")
    assert table(found) in PAGE.read_text(encoding="utf8")


def test_nobody_trains_anew_from_an_encoder_that_is_not_known(model):
    unknown = context(replace(model("distilbert"), source=None))
    with pytest.raises(ValueError, match="a new DistilBert is trained from its pretrained") as no:
        METHODS["NT-ML"](unknown)
    one_sentence(no.value)
    made = context(model("distilbert")).new_model(QUICK)
    assert type(made.model) is type(model("distilbert").model)


@pytest.mark.parametrize("name", ar.NAMES)
def test_a_model_is_made_ready(model, folders, tmp_path, name):
    classifier = model(name)
    assert classifier.tokenizer.pad_token_id == classifier.model.config.pad_token_id is not None
    together, alone = (classifier.logits(TEXTS[:9], batch_size=size) for size in (9, 1))
    assert torch.allclose(together, alone, atol=1e-5)
    plain = Classifier.new(3, source=str(folders(name)), max_length=16, dropout=0.3)
    rates = {part.p for part in plain.model.modules() if isinstance(part, torch.nn.Dropout)}
    config = plain.model.config.to_dict()
    rates |= {value for field, value in config.items()
              if isinstance(value, float) and ("dropout" in field or field.endswith("pdrop"))}
    assert rates == {0.3} and plain.logits(TEXTS[:2]).shape == (2, 3)
    classifier.save(tmp_path)
    again = Classifier.load(tmp_path)
    assert again.max_length == 16 and torch.equal(again.logits(TEXTS), classifier.logits(TEXTS))


@pytest.mark.parametrize("name", ["bert", "distilbert", "bart", "gpt2", "modernbert"])
def test_the_head_is_new_even_where_the_source_has_one(folders, name):
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
        losses.append(train(classifier, TRAIN, QUICK).losses[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_half_precision_is_never_trained(model):
    classifier = model("bert")
    classifier.model.half()
    with pytest.raises(ValueError, match="weights of Bert are float16") as no:
        train(classifier, TRAIN, QUICK)
    one_sentence(no.value)
    with pytest.raises(ValueError, match="float16"):
        METHODS["BeDKD"](context(classifier))
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
def test_an_unknown_encoder_is_rejected(toy_task, wrong):
    for use in (encoder_source, lambda name: Classifier.new(2, source=name),
                lambda name: evaluation.victim(toy_task, encoder=name)):
        with pytest.raises(ValueError, match="small, full, mpnet, causal, a folder") as no:
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


@pytest.mark.slow
def test_a_victim_on_an_own_encoder(folders, tmp_path, toy_task, cache):
    folder = shutil.copytree(folders("mpnet"), tmp_path / "mine")
    made = evaluation.victim(toy_task, None, encoder=str(folder), training=QUICK)
    assert made.classifier.model.config.model_type == "mpnet"
    assert made.classifier.source == str(folder)
    ar.save_tiny("electra", folder)  # the same place, another encoder
    other = evaluation.victim(toy_task, None, encoder=str(folder), training=QUICK)
    assert other.classifier.model.config.model_type == "electra"


def test_images_have_no_encoder(toy_task):
    task = replace(toy_task, train=thirds(TrainSet, 6, 0))
    with pytest.raises(ValueError, match="have no encoder"):
        evaluation.victim(task, None, encoder="small")


def test_classes_in_another_order_are_rejected_or_reordered(folders, tmp_path, toy_task):
    folder = shutil.copytree(folders("bart"), tmp_path / "m")
    plain = Classifier.load(folder)
    changed(folder, id2label={"0": "Positive", "1": "NEGATIVE"},
            label2id={"Positive": 0, "NEGATIVE": 1})
    turned = Classifier.load(folder)
    for use in (lambda m: METHODS["FT"](context(m)),
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
    for use in (lambda m: METHODS["FT"](context(m)),
                lambda m: train(m, TRAIN, QUICK)):
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


@register("own")
@dataclass(frozen=True)
class Own:
    """A reader's defense."""

    give: object = None

    def __call__(self, context):
        return self.give(context.classifier) if callable(self.give) else self.give


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
        Own(give)(context(model("bert")))
    one_sentence(no.value)


def test_a_readers_defense_is_registered_or_told_how(model):
    given = context(model("bert"))
    assert Own(Outcome)(given).model is given.classifier and DEFENSES["own"] is Own
    for wrong in (lambda context: Outcome(context.classifier), object):
        with pytest.raises(TypeError, match="is no defense: write a dataclass with") as no:
            register("other")(wrong)
        one_sentence(no.value)
    with pytest.raises(TypeError, match="called with a Context, not a Classifier"):
        Own(Outcome)(given.classifier)


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
    def tried(network, method):
        return METHODS[method](image_context(ImageClassifier(network)))

    good = Network(lambda x: t.utils.ModelOutput(logits=x))
    for method in ("FT", "STRIP", "NT-ML"):
        with warnings.catch_warnings(action="ignore"):
            assert tried(good, method).model.predict(thirds(TrainSet, 60, 0).inputs)
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
        METHODS["FT"](image_context(good))
    one_sentence(no.value)


def test_a_folder_of_a_network_for_images(tmp_path):
    made = untrained(thirds(TrainSet, 6, 0), TRAINING)
    with pytest.raises(FileNotFoundError, match="holds no network.json"):
        ImageClassifier.load(tmp_path)
    for spoil in (lambda: cut(tmp_path / "model.safetensors"),
                  lambda: (tmp_path / "network.json").write_text("[]"),
                  lambda: (tmp_path / "network.json").write_text('{"network": {"widths": [4]}}')):
        made.save(tmp_path)
        assert ImageClassifier.load(tmp_path).pad == 1
        spoil()
        with pytest.raises(ValueError, match="does not open as a network") as no:
            ImageClassifier.load(tmp_path)
        one_sentence(str(no.value).replace(str(tmp_path), "m"))
