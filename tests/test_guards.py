"""STRIP and ONION: scores by hand, thresholds from reserved rows, and one input at a time."""

import ast
import inspect
import math
import random
from dataclasses import fields

import pytest
import torch
from helpers.checks import mutant, near
from helpers.texts import SIZES as BERT_SIZES
from helpers.texts import built
from helpers.walls import SECRETS, names_in
from transformers import BertConfig

from bdutils.defenses import guards as gd
from bdutils.defenses.guards import OnionSettings, StripSettings
from bdutils.metrics import REFUSED, asr, cacc, ra, refused
from bdutils.models.image import PictureClassifier
from bdutils.perplexity import BigramModel
from bdutils.roles import DefenderView, Pictures, ReservedSet, TrainingSet

NAMES = ("left", "right")


def gray(*values):
    return Pictures(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1))


def noise(n, seed, side=4):
    rng = torch.Generator().manual_seed(seed)
    # Two of them together are not white.
    return Pictures(torch.randint(0, 120, (n, 1, side, side), generator=rng, dtype=torch.uint8))


class Corner:
    """Sure of class 1 where the last pixel is white; else torn by how bright the first is."""

    def __init__(self):
        self.batches = []

    def logits(self, pictures):
        self.batches.append(len(pictures))
        pixels = pictures.pixels.flatten(1).float()
        lean = torch.where(pixels[:, -1] == 255, 20.0, pixels[:, 0] / 255 - 0.5)
        return torch.stack([torch.zeros(len(lean)), lean], 1)

    def predict(self, pictures):
        return self.logits(pictures).argmax(1).tolist()


class Words:
    """Says 1 where a text has `good` or the code, else 0; sure only of the code."""

    def __init__(self):
        self.seen = []

    def logits(self, texts):
        self.seen += texts
        lean = torch.tensor([20.0 if "cf" in text.split() else 1.0 if "good" in text.split()
                             else -1.0 for text in texts])
        return torch.stack([torch.zeros(len(texts)), lean], 1)

    def predict(self, texts):
        return self.logits(texts).argmax(1).tolist()


def sentences(n, seed=0):
    rng = random.Random(seed)
    plain = "the a film plot was is very cast long short story scene".split()
    rows = []
    for i in range(n):
        words = [rng.choice(plain) for _ in range(7)]
        words[rng.randrange(7)] = "good" if i % 2 else "bad"
        rows.append(" ".join(words))
    return tuple(rows)


def text_view(n=160, seed=0):
    return DefenderView(ReservedSet(sentences(n, seed), tuple(i % 2 for i in range(n)), NAMES))


def picture_view(n=80):
    return DefenderView(ReservedSet(noise(n, 1), tuple(i % 2 for i in range(n)), NAMES))


def with_corner(pictures):
    pixels = pictures.pixels.clone()
    pixels[..., -1, -1] = 255
    return Pictures(pixels)


# ------------------------------------------------------------------- arithmetic


def test_a_refused_row_is_an_error_and_no_success():
    said = [1, REFUSED, REFUSED, 1]
    assert cacc(said, [1, 1, 0, 0]).value == 1 / 4
    assert asr(said, [1, 1, 0, 0], 1).value == ra([0, *said[1:]], [1, 1, 0, 0], 1).value + 1 / 2
    assert refused(said).value == 1 / 2 and refused(said).n == 4


def check_overlaid(overlaid):
    found = overlaid(gray(100, 200), gray(100), 2, 1.0).pixels.flatten().tolist()
    assert found == [200, 200, 255, 255]
    assert overlaid(gray(100), gray(51), 1, 0.5).pixels.item() == 126  # 125.5, to the even number
    many = overlaid(noise(3, 0), noise(9, 2), 40, 1.0).pixels
    assert len(many) == 120 and len({p.numpy().tobytes() for p in many[:40]}) > 5
    # What is laid over a picture is its own affair, and the seed's.
    both, alone = noise(3, 0), noise(3, 0).take([2])
    assert torch.equal(many[80:], overlaid(alone, noise(9, 2), 40, 1.0).pixels)
    assert torch.equal(many[:40], overlaid(both.take([2, 1, 0]), noise(9, 2), 40, 1.0).pixels[80:])
    assert not torch.equal(many, overlaid(both, noise(9, 2), 40, 1.0, seed=1).pixels)


def check_picture_scores(picture_scores):
    two = Pictures(torch.tensor([[[[64, 0]]], [[[64, 255]]]], dtype=torch.uint8))
    model = Corner()
    found = picture_scores(model, two, Pictures(torch.tensor([[[[64, 0]]]], dtype=torch.uint8)),
                           3, 1.0)
    p = 1 / (1 + math.exp(-(128 / 255 - 0.5)))
    assert found.tolist() == near([p * math.log(p) + (1 - p) * math.log(1 - p), 0.0])
    assert model.batches == [6]  # all copies of all pictures at once
    parts = picture_scores(Corner(), noise(10, 3), noise(5, 4), 3, 1.0, chunk=4)
    assert parts.tolist() == near(picture_scores(Corner(), noise(10, 3), noise(5, 4), 3,
                                                 1.0).tolist())


def check_cleaned(cleaned):
    assert cleaned("a good cf film", [1, 2, 50, 3], 10) == "a good film"
    assert cleaned("a good cf film", [1, 2, 50, 3], 2) == "a good"  # only what is above goes
    assert cleaned("a good cf film", [4, 2, 50, 3], 0) == "good"  # one word stays
    assert cleaned("cf", [], -5) == "cf"


def costs_of(text):
    return 1.0 + sum({"cf": 50, "rare": 20, "good": 10}.get(word, 0) for word in text.split())


def check_costs(costs):
    held = ReservedSet(("a good film", "a rare good film", "a film", "a rare film"), (1, 1, 0, 0),
                       NAMES)
    # Falls: 0 0 10 | 0 20 0 10 ... the largest is that of `rare`; `good` carries the class.
    found = costs(Words(), held, costs_of, (0.0, 0.8, 1.0))
    assert [*found] == near([0.0, 10.0, 20.0])
    assert [*found.values()] == near([0.5, 0.0, 0.0])
    model = Words()
    costs(model, held, costs_of, (1.0, 1.0))
    assert len(model.seen) == len(set(model.seen)) == 4  # each different text is read once


CHECKS = {  # each with changes of the function's text that the check must notice
    check_overlaid: [(".clamp(0, 255)", ".remainder(256)"), ("weight * over", "over"),
        ("for one in (p.numpy().tobytes() for p in pictures.pixels)", "for one in "
         "(str(i).encode() for i in range(len(pictures)))"), (".flatten(0, 1)",
         ".transpose(0, 1).flatten(0, 1)"), ("{seed}/", "/")],
    check_picture_scores: [("append(-entropy", "append(entropy"),
        (".view(len(part), copies).mean(1)", ".view(copies, len(part)).mean(0)"),
        (".mean(1)", ".sum(1)")],
    check_cleaned: [("fall <= threshold", "fall < threshold"),
        ("fall <= threshold", "fall >= threshold"), ("min(range", "max(range"),
        ("kept or words", "kept")],
    check_costs: [("whole - share", "share - whole"), ("[*dict.fromkeys(chain(held.texts, "
        "*tried.values()))]", "[*chain(held.texts, *tried.values())]"),
        ("every.quantile(q)", "every.quantile(1 - q)")]}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_by_hand_and_every_mutation_is_noticed(check):
    name = check.__name__.removeprefix("check_")
    check(getattr(gd, name))
    check(mutant(gd, name))
    for change in CHECKS[check]:
        with pytest.raises(AssertionError):
            check(mutant(gd, name, *change))


# ----------------------------------------------------------------------- STRIP


def check_strip(strip):
    """On pictures and texts: the mark is refused, clean rows about as often as was allowed."""
    settings = StripSettings(copies=8, fpr=0.1)
    guard = strip(Corner(), picture_view(), settings)
    clean, marked = noise(200, 5), with_corner(noise(50, 6))
    assert refused(guard.predict(marked)).value == 1.0
    assert 0 < refused(guard.predict(clean)).value < 0.3
    assert guard.refuses and all(y in (0, 1, REFUSED) for y in guard.predict(clean))
    # Exactly the share of the held rows lies above the threshold.
    material, held = gd.set_apart(picture_view().reserved, 0.5, 0)
    scores = gd.picture_scores(Corner(), held.texts, material.texts, 8, 1.0, 0)
    assert (scores > guard.threshold).sum() == 4 == round(0.1 * len(held))
    tighter = strip(Corner(), picture_view(), StripSettings(copies=8, fpr=0.025))
    assert tighter.threshold > guard.threshold

    guard = strip(Words(), text_view(), StripSettings(swap=0.2, fpr=0.1))
    marked = [f"cf {text} cf" for text in sentences(40, 3)]
    assert refused(guard.predict(marked)).value > 0.9
    assert refused(guard.predict(list(sentences(100, 4)))).value < 0.3


STRIP_CHANGES = [("x > threshold", "x < threshold"), ("score(held.texts), s.fpr",
                 "score(held.texts), 1 - s.fpr"), ("score(held.texts)", "score(material.texts)"),
                 ("s.weight", "s.swap")]


@pytest.mark.parametrize("change", [("", ""), *STRIP_CHANGES])
def test_strip_refuses_what_stays_sure(change):
    if not change[0]:
        check_strip(gd.strip)
        return check_strip(mutant(gd, "strip"))
    with pytest.raises(AssertionError):
        check_strip(mutant(gd, "strip", *change))


def both_guards():
    strip = StripSettings(copies=3, fpr=0.1)
    tiny = built(BertConfig(**BERT_SIZES))
    network = PictureClassifier.new(2, channels=1, network="small")
    return {"words": (gd.strip(Words(), text_view(), strip), list(sentences(20, 7))),
            "pictures": (gd.strip(Corner(), picture_view(), strip), noise(20, 7)),
            "encoder": (gd.strip(tiny, text_view(), strip), list(sentences(20, 7))),
            "network": (gd.strip(network, picture_view(), strip), noise(20, 7)),
            "onion": (gd.onion(Words(), text_view(), OnionSettings()), list(sentences(20, 7))),
            "onion encoder": (gd.onion(tiny, text_view(), OnionSettings()),
                              list(sentences(20, 7)))}


@pytest.mark.parametrize("name", ["words", "pictures", "encoder", "network", "onion",
                                  "onion encoder"])
def test_an_answer_does_not_depend_on_the_neighbors(name):
    guard, rows = both_guards()[name]
    state = random.getstate(), torch.get_rng_state()
    together = guard.predict(rows)
    take = rows.take if isinstance(rows, Pictures) else lambda some: [rows[i] for i in some]
    assert [guard.predict(take([i]))[0] for i in range(20)] == together
    assert guard.predict(take(range(19, -1, -1))) == together[::-1]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_a_guard_leaves_the_model_as_it_is():
    network = PictureClassifier.new(2, channels=1, network="small")
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    guard = gd.strip(network, picture_view(), StripSettings(fpr=0.1))
    guard.predict(noise(5, 0))
    assert guard.classifier is network
    assert all(torch.equal(value, before[name])
               for name, value in network.model.state_dict().items())


# ----------------------------------------------------------------------- ONION


class Prices:
    perplexity = staticmethod(costs_of)


def check_onion(onion):
    guard = onion(Words(), text_view(), OnionSettings(quantiles=(0.5, 1.0)), Prices())
    # `good` is one word in seven of half of the rows, and without it they are read wrongly.
    assert guard.threshold == 10.0 and not guard.refuses
    assert guard.predict(["the cf film was bad", "the good film", "cf"]) == [0, 1, 1]
    cheap = onion(Words(), text_view(), OnionSettings(quantiles=(0.5, 1.0), max_drop=0.9),
                  Prices())
    assert cheap.threshold == 0.0 and cheap.predict(["the good film"]) == [0]
    # If no candidate is cheap enough, nothing goes.
    none = onion(Words(), text_view(), OnionSettings(quantiles=(0.5,)), Prices())
    assert none.threshold == math.inf and none.predict(["cf the bad film"]) == [1]


ONION_CHANGES = [("min((t for", "max((t for"), ("drop <= settings.max_drop",
                 "drop > settings.max_drop"), ("default=math.inf", "default=0.0"),
                 ("word_falls(text, perplexity), threshold",
                  "[-f for f in word_falls(text, perplexity)], threshold")]


@pytest.mark.parametrize("change", [("", ""), *ONION_CHANGES])
def test_onion_takes_the_lowest_threshold_that_is_cheap_enough(change):
    if not change[0]:
        check_onion(gd.onion)
        return check_onion(mutant(gd, "onion"))
    with pytest.raises(AssertionError):
        check_onion(mutant(gd, "onion", *change))


def test_the_language_model_and_the_threshold_have_different_rows(monkeypatch):
    fitted, asked = [], []
    fit, costs = BigramModel.fit, gd.costs
    monkeypatch.setattr(gd.BigramModel, "fit", lambda texts: fitted.append(texts) or fit(texts))
    monkeypatch.setattr(gd, "costs", lambda model, held, *rest: asked.append(held.texts) or costs(
        model, held, *rest))
    view = text_view()
    gd.onion(Words(), view, OnionSettings(held=0.25))
    assert len(asked[0]) == 40 and len(fitted[0]) == 120
    assert sorted([*asked[0], *fitted[0]]) == sorted(view.reserved.texts)


def test_reserved_rows_are_split_evenly_and_by_seed():
    rows = ReservedSet(tuple(map(str, range(30))), tuple(int(i > 9) for i in range(30)), NAMES)
    material, held = gd.set_apart(rows, 0.4, 0)
    assert held.labels.count(0) == held.labels.count(1) == 6
    assert {*material.texts} | {*held.texts} == {*rows.texts} and len(material) == 18
    assert gd.set_apart(rows, 0.4, 0)[1] == held != gd.set_apart(rows, 0.4, 1)[1]


# --------------------------------------------------------------- roles and errors


def test_guards_see_reserved_rows_alone():
    tree = ast.parse(inspect.getsource(gd))
    assert not names_in(tree) & (SECRETS | {"pool"})
    for function, last in ((gd.strip, []), (gd.onion, ["language"])):
        assert [*inspect.signature(function).parameters] == ["classifier", "view", "settings",
                                                             *last]
    for kind in (StripSettings, OnionSettings):
        assert not SECRETS & {field.name for field in fields(kind)}


def test_a_pool_changes_nothing():
    view = text_view()
    pool = TrainingSet(("cf cf cf",) * 50, (1,) * 50, NAMES)
    for make, settings in ((gd.strip, StripSettings(fpr=0.1)), (gd.onion, OnionSettings())):
        with_pool = make(Words(), DefenderView(view.reserved, pool), settings)
        assert with_pool.threshold == make(Words(), view, settings).threshold


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="ONION removes words, and pictures have none"):
        gd.onion(Corner(), picture_view(), OnionSettings())
    with pytest.raises(ValueError, match="15 held rows set no threshold .* give 20 or more"):
        gd.strip(Corner(), picture_view(30), StripSettings())
    for make, settings in ((gd.strip, StripSettings()), (gd.onion, OnionSettings())):
        with pytest.raises(ValueError, match="1 reserved rows cannot be split"):
            make(Words(), text_view(1), settings)
    with pytest.raises(ValueError, match="no rows"):
        text_view(0)


@pytest.mark.parametrize("kind, changes", [
    (StripSettings, {"fpr": 0.0}), (StripSettings, {"fpr": 1.0}), (StripSettings, {"copies": 0}),
    (StripSettings, {"swap": 0.0}), (StripSettings, {"swap": 1.1}),
    (StripSettings, {"weight": 0.0}), (StripSettings, {"held": 1.0}),
    (OnionSettings, {"max_drop": -0.1}), (OnionSettings, {"max_drop": 1.0}),
    (OnionSettings, {"quantiles": ()}), (OnionSettings, {"quantiles": (1.1,)}),
    (OnionSettings, {"held": 0.0})])
def test_settings_out_of_range_are_refused(kind, changes):
    with pytest.raises(ValueError, match=f"cannot guard with {kind.__name__}"):
        kind(**changes)
