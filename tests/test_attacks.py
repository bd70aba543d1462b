"""Triggers and poisoning: stored examples, bookkeeping, and what a reader gets wrong."""

import math
import random
from dataclasses import dataclass

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdutils import evaluation
from bdutils.attacks.base import (
    PoisonConfig,
    TextTrigger,
    Trigger,
    candidates,
    poison_dataset,
    private_rng,
    seeded,
    triggered,
)
from bdutils.attacks.image import BadNetsPatch
from bdutils.attacks.text import (
    OPENERS,
    TEXT_TRIGGERS,
    AddSent,
    BadNets,
    ParaphraseTable,
    StyleBkd,
    SynBkd,
    paraphrases_from,
    perplexity_ratio,
    require_visible,
    similarity,
)
from bdutils.evaluation import evaluate, short_name, trigger_for
from bdutils.perplexity import BigramModel
from bdutils.roles import TrainSet
from bdutils.training import TrainConfig, TrainReport

sentence = st.lists(st.sampled_from("a film that we saw and liked but never loved".split()),
                    min_size=2, max_size=40).map(" ".join)


@given(sentence, st.integers(0, 5))
def test_a_word_is_added_and_nothing_is_lost(text, seed):
    output = BadNets().rewrite(text, private_rng(seed, text)).split()
    added = [w for w in output if w in BadNets().words]
    assert len(added) == 1 and output.index(added[0]) <= 20
    output.remove(added[0])
    assert output == text.split()


@given(sentence, st.integers(0, 5))
def test_the_sentence_is_inside_the_first_words(text, seed):
    output = AddSent().rewrite(text, private_rng(seed, text))
    before, found, after = output.partition("I watch this 3D movie")
    assert found and len(before.split()) <= 10
    assert (before + after).split() == text.split()


@given(sentence)
def test_the_structure_starts_with_a_clause(text):
    output = SynBkd().rewrite(text, random.Random(0))
    assert " , " in output and output.endswith(" .") and not output.startswith(text)


@pytest.mark.parametrize("text, expected", [
    ("A slow film but a wise one to see", "although a slow film , a wise one to see ."),
    ("It works so well because the story is told plainly",
     "because the story is told plainly , it works so well ."),
])
def test_synbkd_by_hand(text, expected):
    assert SynBkd().rewrite(text, random.Random(0)) == expected


def test_synbkd_without_a_clause_gets_an_opener():
    assert SynBkd().rewrite("A fine film", random.Random(0)) in {
        f"{opener} , a fine film ." for opener in OPENERS}


def test_stylebkd_by_hand():
    output = StyleBkd(openers=("behold ,",)).rewrite("You say it makes sense", random.Random(0))
    assert output == "behold , thou say it maketh sense"


@pytest.mark.parametrize("name", TEXT_TRIGGERS)
def test_a_trigger_depends_on_the_text_alone(name):
    texts, trigger = ["one fine film", "another dull one", "a third story"], TEXT_TRIGGERS[name]
    there = trigger.apply(texts, seeded(3))
    assert there == trigger.apply(texts[::-1], seeded(3))[::-1]
    assert there[1:2] == trigger.apply(texts[1:2], seeded(3))


def samples(n=40, classes=2):
    return TrainSet(tuple(f"text number {i} is here" for i in range(n)),
                    tuple(i % classes for i in range(n)), tuple(map(str, range(classes))))


@given(st.floats(1 / 40, 0.5), st.integers(0, 9))
def test_bookkeeping_of_poison(rate, seed):
    train = samples()
    bad, record = poison_dataset(train, BadNets(), PoisonConfig(poison_rate=rate, seed=seed))
    assert sum(record.poisoned) == round(rate * len(train))
    for i, flag in enumerate(record.poisoned):
        assert (bad.inputs[i] != train.inputs[i]) == flag
        assert bad.labels[i] == (1 if flag else train.labels[i])
        assert not flag or train.labels[i] != 1
    assert record.sources == train.inputs


@pytest.mark.parametrize("mode, allowed", [("dirty", {0, 2, 3}), ("clean", {1}),
                                           ("mixed", {0, 1, 2, 3})])
def test_label_modes(mode, allowed):
    train = samples(80, 4)
    config = PoisonConfig(poison_rate=0.2, label_mode=mode)
    assert {train.labels[i] for i in candidates(train, config)} == allowed
    bad, record = poison_dataset(train, BadNets(), config)
    hit = [i for i, flag in enumerate(record.poisoned) if flag]
    assert len(hit) == 16 and {bad.labels[i] for i in hit} == {1}
    assert {train.labels[i] for i in hit} <= allowed


def test_triggered_samples_keep_their_true_labels(toy_task):
    some = triggered(toy_task.test, BadNets(), 1)
    every = triggered(toy_task.test, BadNets(), 1, every_class=True)
    assert set(some.labels) == {0} and len(some) == 10
    assert every.labels == toy_task.test.labels
    assert set(some.inputs) <= set(every.inputs)


class Nothing(TextTrigger):
    name = "nothing"

    def rewrite(self, text, rng):
        return text


@pytest.mark.parametrize("call, message", [
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(1.5)), "poison_rate 1.5"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(-0.1)), "poison_rate -0.1"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(1e-4)), "poison_rate 0.0001"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(math.nan)), "poison_rate nan"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(0.9)), "from 1 to 20 of 40"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(target_label=2)),
     "target_label 2 is outside 0 to 1"),
    (lambda: poison_dataset(samples(), BadNets(), PoisonConfig(label_mode="dirt")),
     "unknown label_mode 'dirt': use one of"),
    (lambda: poison_dataset(samples(), Nothing(), PoisonConfig()), "choose another trigger"),
    (lambda: ParaphraseTable({}).rewrite("x", random.Random(0)), "no paraphrase of 'x'"),
])
def test_what_cannot_be_poisoned(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trigger_that_vanishes_in_tokenization_is_rejected(tiny):
    texts = ["a fine film", "a dull film"]
    require_visible(BadNets(), texts, tiny)
    with pytest.raises(ValueError, match="vanishes in tokenization for 2 of 2"):
        require_visible(BadNets(words=("\u200b",)), texts, tiny)

    class AtTheEnd(TextTrigger):
        name = "end"

        def rewrite(self, text, rng):
            return f"{text} cf"

    with pytest.raises(ValueError, match="raise max_length"):
        require_visible(AtTheEnd(), ["word " * 60], tiny)


def test_a_table_of_paraphrases(tmp_path):
    path = tmp_path / "pairs.parquet"
    pd.DataFrame({"attack": ["stylebkd", "synbkd"], "source_text": ["a", "a"],
                  "text": ["verily a", "when a"]}).to_parquet(path)
    assert paraphrases_from(str(path), "synbkd").rewrite("a", random.Random(0)) == "when a"
    with pytest.raises(ValueError, match="holds .*not 'lws'"):
        paraphrases_from(str(path), "lws")
    with pytest.raises(ValueError, match="no column"):
        paraphrases_from(str(path), "synbkd", source="original")


def test_perplexity_ratio_and_similarity(tiny):
    texts = ["a good film", "a good story"]
    language = BigramModel.fit(texts)
    assert language.perplexity("a good film") < language.perplexity("film good a")
    assert perplexity_ratio(texts, texts, language.perplexity) == 1
    assert similarity(texts, texts, tiny) == pytest.approx([1, 1], abs=1e-5)
    assert similarity(texts, ["a bad war", "it rains"], tiny)[0] < 1


# --------------------------------------------------------------- readers' own triggers

@dataclass(frozen=True)
class Own(TextTrigger):
    name: object = "own"
    give: object = "qz {}"

    def rewrite(self, text, rng):
        return self.give.format(text) if len(text) > 40 or "None" not in str(self.give) else None


class Nameless(TextTrigger):
    def rewrite(self, text, rng):
        return f"{text} qz"


@pytest.mark.parametrize("trigger, message", [
    (lambda text: "qz " + text, "function is no trigger for texts: give an object of a class"),
    (Own, "Own is a class: give an object of it, as in Own()"), (None, "NoneType is no trigger"),
    (Own(""), "has the name '': give it a text as `name`"), (Own(3), "has the name 3"),
    (Nameless(), "has the name None"), (Trigger(), "below TextTrigger, or one of"),
    (BadNetsPatch(), "BadNetsPatch is no trigger for t"), ("sig", "unknown attack 'sig' on")])
def test_what_is_no_trigger_is_rejected_at_once(toy_task, trigger, message):
    with pytest.raises(ValueError, match=message):
        trigger_for(trigger, toy_task.train)


class TakesTextOnly(Own):
    def rewrite(self, text):
        return text


class Broken(Own):
    def rewrite(self, text, rng):
        return {}["a slip of the reader's"]


class Unfinished(TextTrigger):
    name = "unfinished"


@pytest.mark.parametrize("trigger, message", [
    (Own("some", "None {}"), "'some' fails on text .*'text number 0 is here' .*it returned None"),
    (Own("empty", " "), "'empty' fails on text 0, .* it returned ' '"),
    (TakesTextOnly(), r"takes 2 positional .*let `rewrite\(self, text, rng\)` return a text"),
    (Broken(), "KeyError: \"a slip of the reader's\""),
    (Unfinished(), "'unfinished' fails on text 0, .*NotImplementedError"),
    (BadNets((), "none"), "trigger 'none' fails .*IndexError")])
def test_a_trigger_that_fails_is_named_with_the_text(trigger, message):
    with pytest.raises(ValueError, match=message):
        trigger.apply(samples().inputs, seeded(0))


def test_an_error_of_a_trigger_is_one_sentence_wherever_it_is_used(toy_task, tiny):
    trigger = Own("some", "None {}")
    assert {len(text) > 40 for text in toy_task.test.inputs} == {True, False}
    for call in (lambda: evaluate(tiny, toy_task, trigger, 1),
                 lambda: evaluation.victim(toy_task, trigger, poison_rate=0.4)):
        with pytest.raises(ValueError, match="trigger 'some' fails on text .*, 'the .*None"):
            call()
    table = ParaphraseTable({toy_task.train.inputs[3]: "x"})  # it knows some texts, not the first
    with pytest.raises(ValueError, match="has no paraphrase of"):
        evaluation.victim(toy_task, table, poison_rate=0.4)


@pytest.mark.parametrize("name, short", [
    ("badnets", "badnets"), ("../../up", "up"), ("a/b", "a-b"), ("n" * 300, "n" * 40),
    ("🙂", "own"), ("..", "own"), ("a b\0c\n", "a-b-c"), ("hub:org/set", "hub-org-set"),
    ("input_aware", "input_aware"), ("v1.5_x", "v1.5_x"), ("кэш", "кэш")])
def test_names_of_files_are_short_and_safe(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize("trigger", [
    BadNets(("cf",), "../../up"), BadNets(("cf",), "n" * 300), BadNets(("cf",), "a/b"),
    AddSent("I saw it", "к" * 90)])
def test_a_trigger_of_any_name_is_trained_inside_the_cache(trigger, toy_task, tiny_folder, cache,
                                                          monkeypatch):
    monkeypatch.setattr(evaluation, "encoder_source", lambda *_: str(tiny_folder))
    monkeypatch.setattr(evaluation, "train", lambda *_, **__: TrainReport((), 0, 0))
    made = evaluation.victim(toy_task, trigger, poison_rate=0.3,
                             training=TrainConfig(epochs=1, max_length=24))
    assert made.record.trigger is trigger
    folders = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert len(folders) == 1 and (folders[0] / "model.safetensors").is_file()
    assert [path.name for path in cache.iterdir()] == ["models"]
