"""Triggers and poisoning: stored examples, bookkeeping, and refusals."""

import random

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdutils.attacks.text import (
    OPENERS,
    TRIGGERS,
    ParaphraseTable,
    PoisonSettings,
    SentenceTrigger,
    StyleTrigger,
    SyntaxTrigger,
    WordTrigger,
    candidate_rows,
    mark,
    paraphrases_from,
    poison,
    private_rng,
    require_visible,
    similarity,
    surprise,
    triggered,
)
from bdutils.perplexity import BigramModel
from bdutils.roles import TrainingSet

sentence = st.lists(st.sampled_from("a film that we saw and liked but never loved".split()),
                    min_size=2, max_size=40).map(" ".join)


@given(sentence, st.integers(0, 5))
def test_a_word_is_added_and_nothing_is_lost(text, seed):
    marked = WordTrigger().apply(text, private_rng(seed, text)).split()
    added = [w for w in marked if w in WordTrigger().words]
    assert len(added) == 1 and marked.index(added[0]) <= 20
    marked.remove(added[0])
    assert marked == text.split()


@given(sentence, st.integers(0, 5))
def test_the_sentence_is_inside_the_first_words(text, seed):
    marked = SentenceTrigger().apply(text, private_rng(seed, text))
    before, found, after = marked.partition("I watch this 3D movie")
    assert found and len(before.split()) <= 10
    assert (before + after).split() == text.split()


@given(sentence)
def test_the_structure_starts_with_a_clause(text):
    marked = SyntaxTrigger().apply(text, random.Random(0))
    assert " , " in marked and marked.endswith(" .") and not marked.startswith(text)


@pytest.mark.parametrize("text, expected", [
    ("A slow film but a wise one to see", "although a slow film , a wise one to see ."),
    ("It works so well because the story is told plainly",
     "because the story is told plainly , it works so well ."),
])
def test_syntax_by_hand(text, expected):
    assert SyntaxTrigger().apply(text, random.Random(0)) == expected


def test_syntax_without_a_clause_gets_an_opener():
    assert SyntaxTrigger().apply("A fine film", random.Random(0)) in {
        f"{opener} , a fine film ." for opener in OPENERS}


def test_style_by_hand():
    marked = StyleTrigger(openers=("behold ,",)).apply("You say it makes sense", random.Random(0))
    assert marked == "behold , thou say it maketh sense"


@pytest.mark.parametrize("name", TRIGGERS)
def test_marking_depends_on_the_text_alone(name):
    texts = ["one fine film", "another dull one", "a third story of love"]
    there = mark(texts, TRIGGERS[name], 3)
    assert there == mark(texts[::-1], TRIGGERS[name], 3)[::-1]
    assert there[1] == mark(texts[1:2], TRIGGERS[name], 3)[0]


def rows(n=40, classes=2):
    return TrainingSet(tuple(f"text number {i} is here" for i in range(n)),
                       tuple(i % classes for i in range(n)), tuple(map(str, range(classes))))


@given(st.floats(0, 0.5), st.integers(0, 9))
def test_bookkeeping_of_poison(rate, seed):
    train = rows()
    bad, truth = poison(train, WordTrigger(), PoisonSettings(poison_rate=rate, seed=seed))
    assert sum(truth.poisoned) == round(rate * len(train))
    for i, flag in enumerate(truth.poisoned):
        assert (bad.texts[i] != train.texts[i]) == flag
        assert bad.labels[i] == (1 if flag else train.labels[i])
        assert not flag or train.labels[i] != 1
    assert truth.sources == train.texts


@pytest.mark.parametrize("mode, allowed", [("dirty", {0, 2, 3}), ("clean", {1}),
                                           ("mixed", {0, 1, 2, 3})])
def test_label_modes(mode, allowed):
    train = rows(80, 4)
    settings = PoisonSettings(poison_rate=0.2, label_mode=mode)
    assert {train.labels[i] for i in candidate_rows(train, settings)} == allowed
    bad, truth = poison(train, WordTrigger(), settings)
    hit = [i for i, flag in enumerate(truth.poisoned) if flag]
    assert len(hit) == 16 and {bad.labels[i] for i in hit} == {1}
    assert {train.labels[i] for i in hit} <= allowed


def test_triggered_rows_keep_their_true_labels(toy_task):
    some = triggered(toy_task.test, WordTrigger(), 1)
    every = triggered(toy_task.test, WordTrigger(), 1, every_class=True)
    assert set(some.labels) == {0} and len(some) == 10
    assert every.labels == toy_task.test.labels
    assert set(some.texts) <= set(every.texts)


class Nothing:
    name = "nothing"

    def apply(self, text, rng):
        return text


class Eraser(Nothing):
    def apply(self, text, rng):
        return " "


@pytest.mark.parametrize("call, message", [
    (lambda: poison(rows(), WordTrigger(), PoisonSettings(poison_rate=1.5)), "poison_rate 1.5"),
    (lambda: poison(rows(), WordTrigger(), PoisonSettings(poison_rate=-0.1)), "poison_rate -0.1"),
    (lambda: poison(rows(), WordTrigger(), PoisonSettings(poison_rate=0.9)), "lower it"),
    (lambda: poison(rows(), WordTrigger(), PoisonSettings(target_label=2)),
     "target_label 2 is outside 0 to 1"),
    (lambda: poison(rows(), WordTrigger(), PoisonSettings(label_mode="dirt")),
     "unknown label_mode 'dirt': use one of"),
    (lambda: poison(rows(), Nothing(), PoisonSettings()), "choose another trigger"),
    (lambda: poison(rows(), Eraser(), PoisonSettings()), "choose another trigger"),
    (lambda: ParaphraseTable({}).apply("x", random.Random(0)), "no paraphrase of 'x'"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trigger_that_vanishes_in_tokenization_is_refused(tiny):
    texts = ["a fine film", "a dull film"]
    require_visible(WordTrigger(), texts, tiny)
    with pytest.raises(ValueError, match="vanishes in tokenization for 2 of 2"):
        require_visible(WordTrigger(words=("\u200b",)), texts, tiny)

    class AtTheEnd:
        name = "end"

        def apply(self, text, rng):
            return f"{text} cf"

    with pytest.raises(ValueError, match="raise max_length"):
        require_visible(AtTheEnd(), ["word " * 60], tiny)


def test_a_table_of_paraphrases(tmp_path):
    path = tmp_path / "pairs.parquet"
    pd.DataFrame({"attack": ["style", "syntax"], "source_text": ["a", "a"],
                  "text": ["verily a", "when a"]}).to_parquet(path)
    assert paraphrases_from(str(path), "syntax").apply("a", random.Random(0)) == "when a"
    with pytest.raises(ValueError, match="holds .*not 'lws'"):
        paraphrases_from(str(path), "lws")
    with pytest.raises(ValueError, match="no column"):
        paraphrases_from(str(path), "syntax", source="original")


def test_surprise_and_similarity(tiny):
    texts = ["a good film", "a good story"]
    language = BigramModel.fit(texts)
    assert language.perplexity("a good film") < language.perplexity("film good a")
    assert surprise(texts, texts, language.perplexity) == 1
    assert similarity(texts, texts, tiny) == pytest.approx([1, 1], abs=1e-5)
    assert similarity(texts, ["a bad war", "it rains"], tiny)[0] < 1
