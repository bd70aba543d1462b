"""STRIP and ONION: scores by hand, thresholds from clean samples, and one input at a time."""

import inspect
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers.checks import near
from helpers.texts import SIZES, built
from helpers.walls import SECRETS
from transformers import BertConfig, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from bdutils.defenses import filters, onion, strip
from bdutils.defenses.base import Context, hold_out
from bdutils.defenses.onion import (
    ONION,
    CausalModel,
    cleaned,
    costs,
    onion_scores,
    read_ahead,
    surprise,
    variants,
    with_start,
    word_falls,
)
from bdutils.defenses.strip import STRIP, image_scores, overlaid, strip_scores
from bdutils.metrics import REJECTED, asr, cacc, ra, rejected
from bdutils.models.image import ImageClassifier
from bdutils.perplexity import BigramModel
from bdutils.roles import CleanSet, Images, TrainSet

NAMES = ("left", "right")


def gray(*values):
    return Images(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1))


def noise(n, seed, side=4):
    rng = torch.Generator().manual_seed(seed)
    # Two of them together are not white.
    return Images(torch.randint(0, 120, (n, 1, side, side), generator=rng, dtype=torch.uint8))


class Corner:
    """Certain of class 1 where the last pixel is white; else torn by how bright the first is."""

    def __init__(self):
        self.batches = []

    def logits(self, images):
        self.batches.append(len(images))
        pixels = images.pixels.flatten(1).float()
        lean = torch.where(pixels[:, -1] == 255, 20.0, pixels[:, 0] / 255 - 0.5)
        return torch.stack([torch.zeros(len(lean)), lean], 1)

    def predict(self, images):
        return self.logits(images).argmax(1).tolist()


class Words:
    """Says 1 where a text has `good` or the code, else 0; certain only of the code."""

    def __init__(self, certain=20.0):
        self.certain, self.seen = certain, []

    def logits(self, texts):
        self.seen += texts
        lean = torch.tensor([self.certain if "cf" in text.split() else 1.0
                             if "good" in text.split() else -1.0 for text in texts])
        return torch.stack([torch.zeros(len(texts)), lean], 1)

    def predict(self, texts):
        return self.logits(texts).argmax(1).tolist()


def sentences(n, seed=0):
    rng = random.Random(seed)
    plain = "the a film plot was is very cast long short story scene".split()
    made = []
    for i in range(n):
        words = [rng.choice(plain) for _ in range(7)]
        words[rng.randrange(7)] = "good" if i % 2 else "bad"
        made.append(" ".join(words))
    return tuple(made)


def texts(n=160, seed=0):
    return CleanSet(sentences(n, seed), tuple(i % 2 for i in range(n)), NAMES)


def images(n=80):
    return CleanSet(noise(n, 1), tuple(i % 2 for i in range(n)), NAMES)


def with_corner(given):
    pixels = given.pixels.clone()
    pixels[..., -1, -1] = 255
    return Images(pixels)


def applied(defense, classifier, clean):
    """Return the filter of a defense before a stand-in that no context would take."""
    context = SimpleNamespace(classifier=classifier, clean=clean)
    outcome = type(defense).__call__.__wrapped__(defense, context)
    assert outcome.verdict == "filtered" and [*outcome.seconds] == ["fit"]
    return outcome.model


# ------------------------------------------------------------- by plain arithmetic
# Each check takes the function, so that it can also be given functions that are wrong.


def test_a_rejected_sample_is_an_error_and_no_success():
    said = [1, REJECTED, REJECTED, 1]
    assert cacc(said, [1, 1, 0, 0]).value == 1 / 4
    assert asr(said, [1, 1, 0, 0], 1).value == ra([0, *said[1:]], [1, 1, 0, 0], 1).value + 1 / 2
    assert rejected(said).value == 1 / 2 and rejected(said).n == 4


def check_overlaid(overlaid):
    found = overlaid(gray(100, 200), gray(100), 2, 1.0).pixels.flatten().tolist()
    assert found == [200, 200, 255, 255]
    assert overlaid(gray(100), gray(51), 1, 0.5).pixels.item() == 126  # 125.5, to the even number
    many = overlaid(noise(3, 0), noise(9, 2), 40, 1.0).pixels
    assert len(many) == 120 and len({p.numpy().tobytes() for p in many[:40]}) > 5
    # What is laid over an image is its own affair, and the seed's.
    both, alone = noise(3, 0), noise(3, 0).take([2])
    assert torch.equal(many[80:], overlaid(alone, noise(9, 2), 40, 1.0).pixels)
    assert torch.equal(many[:40], overlaid(both.take([2, 1, 0]), noise(9, 2), 40, 1.0).pixels[80:])
    assert not torch.equal(many, overlaid(both, noise(9, 2), 40, 1.0, seed=1).pixels)


def overlaid_by_place(given, others, copies, weight, seed=0):
    """Draw by where an image stands, and not by what it shows."""
    found = [overlaid(Images(others.pixels[:1]), others, copies, weight, seed + i).pixels
             - weight * others.pixels[:1] + weight * given.pixels[i] for i in range(len(given))]
    return Images(torch.cat(found).clamp(0, 255).byte())


def overlaid_in_turns(given, others, copies, weight, seed=0):
    pixels = overlaid(given, others, copies, weight, seed).pixels
    return Images(pixels.unflatten(0, (-1, copies)).transpose(0, 1).flatten(0, 1))


def overlaid_round(given, others, copies, weight, seed=0):
    """Let what is brighter than white be dark again."""
    pixels = overlaid(given, others, copies, weight, seed).pixels
    return Images(torch.where(pixels == 255, 44, pixels).byte())


def check_image_scores(image_scores):
    two = Images(torch.tensor([[[[64, 0]]], [[[64, 255]]]], dtype=torch.uint8))
    model = Corner()
    found = image_scores(model, two, Images(torch.tensor([[[[64, 0]]]], dtype=torch.uint8)),
                         3, 1.0)
    p = 1 / (1 + math.exp(-(128 / 255 - 0.5)))
    assert found.tolist() == near([p * math.log(p) + (1 - p) * math.log(1 - p), 0.0])
    assert model.batches == [6]  # all copies of all images at once
    whole, parts = (image_scores(Corner(), noise(10, 3), noise(5, 4), 3, 1.0, chunk=chunk)
                    for chunk in (256, 4))
    assert parts.tolist() == near(whole.tolist())
    # Each image alone has the score that it has among others.
    alone = image_scores(Corner(), noise(10, 3).take([7]), noise(5, 4), 3, 1.0)
    assert whole[7].item() == near(alone.item())


def scores_of_neighbors(classifier, given, others, copies=5, weight=1.0, **options):
    """Fold the copies as if they lay copy after copy."""
    single = image_scores(classifier, given, others, copies, weight, **options)
    return single.roll(1)


def check_strip_scores(strip_scores):
    torn = 1 / (1 + math.e)  # of a text without the code and without `good`
    low, firm = (p * math.log(p) + (1 - p) * math.log(1 - p) for p in (torn, 0.9))
    model = Words(certain=math.log(9))
    kept = strip_scores(model, ["a b", "cf b c", "d"], ["x y"], copies=4, swap=0.0)
    assert kept.tolist() == near([low, firm, low])
    gone = strip_scores(model, ["a b", "cf b c"], ["x y"], copies=4, swap=1.0)
    assert gone.tolist() == near([low] * 2)
    new = strip_scores(model, ["a b", "c"], ["cf cf"], copies=4, swap=1.0)
    assert new.tolist() == near([firm] * 2)
    # Half of the words go: the trigger stays in some of the copies, and the mean is over them.
    model.seen.clear()
    both = strip_scores(model, ["cf b c d", "a b c d"], ["x y", "z"], copies=40)
    assert [sum(word in "xyz" for word in text.split()) for text in model.seen] == [2] * 80
    stays = sum("cf" in text.split() for text in model.seen[:40])
    assert 8 < stays < 32 and {len({*t.split()} & {*"xy"}) for t in model.seen} == {0, 1, 2}
    assert both.tolist() == near([(stays * firm + (40 - stays) * low) / 40, low])


def test_a_strip_score_is_the_texts_own_and_repeatable():
    given, others = ["cf b c d", "a cf", "a b c d e cf g h"], ["x y", "z", "u v w"]
    state = random.getstate()
    found = strip_scores(Words(), given, others)
    alone = [strip_scores(Words(), [text], others).item() for text in given]
    assert found.tolist() == alone and random.getstate() == state


def costs_of(text):
    return 1.0 + sum({"cf": 50, "rare": 20, "good": 10}.get(word, 0) for word in text.split())


def check_word_falls(word_falls):
    assert word_falls("a good cf film", costs_of) == [0.0, 10.0, 50.0, 0.0]
    assert word_falls("cf", costs_of) == []  # a single word cannot go


def check_onion_scores(onion_scores):
    assert onion_scores(["a good cf film", "film good", "cf"], costs_of).tolist() == [50, 10, 0]
    # Where every word helps, the least harm is the score.
    harm = onion_scores(["good rare"], lambda text: 100 - costs_of(text))
    assert harm.tolist() == [-10.0]


def check_cleaned(cleaned):
    assert cleaned("a good cf film", [1, 2, 50, 3], 10) == "a good film"
    assert cleaned("a good cf film", [1, 2, 50, 3], 2) == "a good"  # only what is above goes
    assert cleaned("a good cf film", [4, 2, 50, 3], 0) == "good"  # one word stays
    assert cleaned("cf", [], -5) == "cf"


def check_costs(costs):
    held = CleanSet(("a good film", "a rare good film", "a film", "a rare film"), (1, 1, 0, 0),
                    NAMES)
    # Falls: 0 0 10 | 0 20 0 10 ... the largest is that of `rare`; `good` carries the class.
    found = costs(Words(), held, costs_of, (0.0, 0.8, 1.0))
    assert [*found] == near([0.0, 10.0, 20.0])
    assert [*found.values()] == near([0.5, 0.0, 0.0])
    model = Words()
    costs(model, held, costs_of, (1.0, 1.0))
    assert len(model.seen) == len(set(model.seen)) == 4  # each different text is classified once


def costs_of_all(classifier, held, perplexity, quantiles):
    classifier.predict(held.inputs)
    return costs(classifier, held, perplexity, quantiles)


WRONG = {
    check_overlaid: [
        overlaid_round, overlaid_by_place, overlaid_in_turns,
        lambda given, others, copies, weight, seed=0: overlaid(given, others, copies, 1.0, seed),
        lambda given, others, copies, weight, seed=0: overlaid(given, others, copies, weight)],
    check_image_scores: [
        lambda *args, **options: -image_scores(*args, **options), scores_of_neighbors,
        lambda *args, **options: args[3] * image_scores(*args, **options)],
    check_strip_scores: [
        lambda *args, **options: -strip_scores(*args, **options),
        lambda *args, **options: strip_scores(*args, **options) / 2,
        lambda *args, **options: strip_scores(*args, **options).roll(1),
        lambda model, given, others, **options: strip_scores(model, given, given, **options),
        lambda model, given, others, copies, **options: strip_scores(
            model, given, others, 1, **options)],
    check_word_falls: [
        lambda text, perplexity: [-fall for fall in word_falls(text, perplexity)],
        lambda text, perplexity: word_falls(text, perplexity)[::-1][1:],
        lambda text, perplexity: word_falls(text, perplexity) or [perplexity(text)]],
    check_onion_scores: [
        lambda given, perplexity: torch.tensor([min(word_falls(text, perplexity) or [0.0])
                                                for text in given]),
        lambda given, perplexity: onion_scores([f"{text} a" for text in given], perplexity),
        lambda given, perplexity: onion_scores(given, perplexity).clamp(min=1)],
    check_cleaned: [
        lambda text, falls, threshold: cleaned(text, [fall + 1e-9 for fall in falls], threshold),
        lambda text, falls, threshold: cleaned(text, [-fall for fall in falls], -threshold),
        lambda text, falls, threshold: " ".join(
            word for word, fall in zip(text.split(), falls) if fall <= threshold)],
    check_costs: [
        lambda *args: {t: -cost for t, cost in costs(*args).items()}, costs_of_all,
        lambda model, held, perplexity, quantiles: costs(model, held, perplexity,
                                                         [1 - q for q in quantiles])],
}
RIGHT = {check_overlaid: overlaid, check_image_scores: image_scores,
         check_strip_scores: strip_scores, check_word_falls: word_falls,
         check_onion_scores: onion_scores, check_cleaned: cleaned, check_costs: costs}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_functions_are_what_plain_arithmetic_says(check):
    check(RIGHT[check])


@pytest.mark.parametrize("check, wrong", [(check, wrong) for check in WRONG
                                          for wrong in WRONG[check]])
def test_what_is_wrong_is_noticed(check, wrong):
    with pytest.raises(AssertionError):
        check(wrong)


# ----------------------------------------------------------------------- STRIP


def check_strip(kind):
    """On images and texts: the trigger is rejected, clean inputs about as often as allowed."""
    one = applied(kind(copies=8, fpr=0.1), Corner(), images())
    clean, attack = noise(200, 5), with_corner(noise(50, 6))
    assert rejected(one.predict(attack)).value == 1.0
    assert 0 < rejected(one.predict(clean)).value < 0.3
    assert one.rejects and all(y in (0, 1, REJECTED) for y in one.predict(clean))
    # Exactly the share of the held samples lies above the threshold.
    material, held = hold_out(images(), 0.5, 0)
    scores = image_scores(Corner(), held.inputs, material.inputs, 8, 1.0, 0)
    assert (scores > one.threshold).sum() == 4 == round(0.1 * len(held))
    assert applied(kind(copies=8, fpr=0.025), Corner(), images()).threshold > one.threshold

    one = applied(kind(swap=0.2, fpr=0.1), Words(), texts())
    attack = [f"cf {text} cf" for text in sentences(40, 3)]
    assert rejected(one.predict(attack)).value > 0.9
    assert rejected(one.predict(list(sentences(100, 4)))).value < 0.3


@dataclass(frozen=True)
class Reversed(STRIP):
    """Rejects what is least suspicious."""

    def scores(self, classifier, others, inputs):
        return [-score for score in super().scores(classifier, others, inputs)]


@dataclass(frozen=True)
class Swapped(STRIP):
    """Lays an image over another as strongly as words of a text are replaced."""

    def scores(self, classifier, others, inputs):
        return STRIP.scores(replace(self, weight=self.swap), classifier, others, inputs)


@dataclass(frozen=True)
class OwnMaterial(STRIP):
    """Takes the threshold from other samples than those that were held back."""

    def scores(self, classifier, others, inputs):
        held = len(inputs) == len(others) and not hasattr(self, "seen")
        object.__setattr__(self, "seen", True)
        return super().scores(classifier, others, others if held else inputs)


@dataclass(frozen=True)
class Generous(STRIP):
    """Rejects as many as it should let through."""

    def __post_init__(self):
        object.__setattr__(self, "fpr", 1 - self.fpr)


@pytest.mark.parametrize("kind", [Reversed, Swapped, OwnMaterial, Generous])
def test_strip_rejects_what_stays_certain(kind):
    check_strip(STRIP)
    with pytest.raises(AssertionError):
        check_strip(kind)


def all_filters():
    tiny = built(BertConfig(**SIZES))
    network = ImageClassifier.new(2, channels=1, network="small")
    mixing = STRIP(copies=3, fpr=0.1)
    return {"words": (applied(mixing, Words(), texts()), list(sentences(20, 7))),
            "images": (applied(mixing, Corner(), images()), noise(20, 7)),
            "encoder": (mixing(Context(tiny, texts())).model, list(sentences(20, 7))),
            "network": (mixing(Context(network, images())).model, noise(20, 7)),
            "onion": (applied(ONION(), Words(), texts()), list(sentences(20, 7))),
            "onion encoder": (ONION()(Context(tiny, texts())).model, list(sentences(20, 7))),
            "onion causal": (applied(Reads(), Words(), texts(80)), list(sentences(20, 7)))}


@pytest.mark.parametrize("name", ["words", "images", "encoder", "network", "onion",
                                  "onion encoder", "onion causal"])
def test_an_answer_does_not_depend_on_the_neighbors(name):
    one, inputs = all_filters()[name]
    state = random.getstate(), torch.get_rng_state()
    together = one.predict(inputs)
    take = inputs.take if isinstance(inputs, Images) else lambda some: [inputs[i] for i in some]
    assert [one.predict(take([i]))[0] for i in range(20)] == together
    assert one.predict(take(range(19, -1, -1))) == together[::-1]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_a_filter_leaves_the_model_as_it_is():
    network = ImageClassifier.new(2, channels=1, network="small")
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    one = STRIP(fpr=0.1)(Context(network, images())).model
    one.predict(noise(5, 0))
    assert one.classifier is network
    assert all(torch.equal(value, before[name])
               for name, value in network.model.state_dict().items())


# ----------------------------------------------------------------------- ONION


@dataclass(frozen=True)
class Priced(ONION):
    """ONION whose language model knows a price for each word."""

    perplexity = staticmethod(costs_of)

    def language_model(self, texts):
        return self


def check_onion(kind):
    one = applied(kind(quantiles=(0.5, 1.0)), Words(), texts())
    # `good` is one word in seven of half of the texts, and without it they are misclassified.
    assert one.threshold == 10.0 and not one.rejects
    assert one.predict(["the cf film was bad", "the good film", "cf"]) == [0, 1, 1]
    cheap = applied(kind(quantiles=(0.5, 1.0), max_drop=0.9), Words(), texts())
    assert cheap.threshold == 0.0 and cheap.predict(["the good film"]) == [0]
    # If no candidate is cheap enough, nothing goes.
    none = applied(kind(quantiles=(0.5,)), Words(), texts())
    assert none.threshold == math.inf and none.predict(["cf the bad film"]) == [1]


@pytest.mark.parametrize("wrong", [
    # Costs that are turned round, all too high, or all nothing; falls with another sign.
    {"costs": lambda *args: {t: 1 - cost for t, cost in costs(*args).items()}},
    {"costs": lambda *args: dict.fromkeys(costs(*args), 1.0)},
    {"costs": lambda *args: dict.fromkeys(costs(*args), 0.0)},
    {"word_falls": lambda *args: [-fall for fall in word_falls(*args)]}])
def test_onion_takes_the_lowest_threshold_that_is_cheap_enough(monkeypatch, wrong):
    check_onion(Priced)
    for name, other in wrong.items():
        monkeypatch.setattr(onion, name, other)
    with pytest.raises(AssertionError):
        check_onion(Priced)


def test_the_language_model_and_the_threshold_have_different_samples(monkeypatch):
    fitted, asked = [], []
    fit, kept = BigramModel.fit, onion.costs
    monkeypatch.setattr(BigramModel, "fit", lambda texts: fitted.append(texts) or fit(texts))
    monkeypatch.setattr(onion, "costs", lambda model, held, *rest: (
        asked.append(held.inputs) or kept(model, held, *rest)))
    clean = texts()
    applied(ONION(held=0.25), Words(), clean)
    assert len(asked[0]) == 40 and len(fitted[0]) == 120
    assert sorted([*asked[0], *fitted[0]]) == sorted(clean.inputs)


# ------------------------------------------------------------- a language model


class Counting(LlamaForCausalLM):
    """Counts the batches that it is given."""

    batches = 0

    def forward(self, **inputs):
        self.batches += 1
        return super().forward(**inputs)


def causal(kind=CausalModel, **options):
    """Return a language model of random weights and the words of the sentences."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(
        " ".join([*sentences(30), "cf"]).split())]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Counting(LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5)).eval()
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)},
                                  bos_token="[CLS]")
    return kind(model, tokenizer, **options)


@dataclass(frozen=True)
class Reads(ONION):
    """ONION with that one."""

    def language_model(self, texts):
        return causal(batch_size=7)


UNEVEN = ["a film", "the good film was very long", "cf", "the cast is bad", "a film plot cf was",
          "scene"]


@torch.no_grad()
def check_perplexity(kind):
    """What a text says alone, token by token: without padding, other texts and their order."""
    one = causal(kind, batch_size=4)
    one.read(UNEVEN)
    assert one.model.batches == 2
    for text in UNEVEN:
        ids = [2, *one.tokenizer.convert_tokens_to_ids(text.split())]
        logs = [one.model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].log_softmax(0)[ids[i]]
                for i in range(1, len(ids))]
        assert one.perplexity(text) == near(math.exp(-sum(logs) / len(logs)), rel=1e-4)
    asked = one.model.batches
    one.read(reversed(UNEVEN))
    assert one.model.batches == asked  # each text is read once


class Forgets(CausalModel):
    def read(self, texts):
        self.known.clear()
        super().read(texts)


def counts_padding(model, encoded):
    longest = max(map(len, encoded))
    return surprise(model, [ids + [0] * (longest - len(ids)) for ids in encoded])


@pytest.mark.parametrize("wrong", [
    {}, {"CausalModel": Forgets}, {"surprise": counts_padding},
    {"surprise": lambda *args: surprise(*args).flip(0)},
    {"with_start": lambda *args: [ids[1:] + ids[:1] for ids in with_start(*args)]}],
    ids=["right", "forgets", "counts padding", "shuffled", "no start"])
def test_a_language_model_reads_each_text_as_if_alone(wrong, monkeypatch):
    for name, other in wrong.items():
        monkeypatch.setattr(onion, name, other)
    with pytest.raises(AssertionError) if wrong else nullcontext():
        check_perplexity(onion.CausalModel)


def test_all_variants_of_all_texts_are_read_in_a_few_batches():
    assert variants("a good film") == ["a good film", "good film", "a film", "a good"]
    one, some = causal(), sentences(8)
    read_ahead(one, some)
    asked = one.model.batches
    assert asked == -(-len({v for text in some for v in variants(text)}) // one.batch_size)
    assert all(len(word_falls(text, one.perplexity)) == 7 for text in some)
    assert one.model.batches == asked
    read_ahead(BigramModel.fit(some), some)  # which has nothing to read ahead


def test_the_published_language_model_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(CausalModel, "load", causal)
    assert isinstance(ONION(lm="smollm2").language_model(()), CausalModel)
    assert isinstance(ONION().language_model(sentences(9)), BigramModel)


# --------------------------------------------------------------- roles and errors


def test_filters_see_clean_samples_alone():
    for module in (filters, strip, onion):
        assert "context.train" not in inspect.getsource(module)
    for kind in (STRIP, ONION):
        assert not SECRETS & {field.name for field in fields(kind)}


def test_a_training_set_changes_nothing():
    tiny = built(BertConfig(**SIZES))
    train = TrainSet(("cf cf cf",) * 50, (1,) * 50, NAMES)
    for defense in (STRIP(fpr=0.1), ONION()):
        alone, beside = (defense(Context(tiny, texts(), given)).model for given in (None, train))
        assert beside.threshold == alone.threshold


def test_what_cannot_work_is_rejected():
    with pytest.raises(ValueError, match="ONION removes words, and images have none"):
        applied(ONION(), Corner(), images())
    with pytest.raises(ValueError, match="15 held samples set no threshold .* give 20 or more"):
        applied(STRIP(), Corner(), images(30))
    for defense in (STRIP(), ONION()):
        with pytest.raises(ValueError, match="1 clean samples cannot be split"):
            applied(defense, Words(), texts(1))


@pytest.mark.parametrize("kind, changes", [
    (STRIP, {"fpr": 0.0}), (STRIP, {"fpr": 1.0}), (STRIP, {"copies": 0}),
    (STRIP, {"swap": 0.0}), (STRIP, {"swap": 1.1}),
    (STRIP, {"weight": 0.0}), (STRIP, {"held": 1.0}),
    (ONION, {"max_drop": -0.1}), (ONION, {"max_drop": 1.0}),
    (ONION, {"quantiles": ()}), (ONION, {"quantiles": (1.1,)}),
    (ONION, {"held": 0.0}), (ONION, {"lm": "gpt2"})])
def test_what_cannot_be_meant_is_rejected(kind, changes):
    with pytest.raises(ValueError, match=rf"cannot go on with {kind.__name__}\("):
        kind(**changes)
