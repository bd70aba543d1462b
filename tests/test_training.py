"""The training loop, the classifier around a model, and victims in the cache."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bdutils import evaluation as victims
from bdutils import training
from bdutils.defenses.base import Context
from bdutils.defenses.bedkd import BeDKD
from bdutils.experiments import variants as runs
from bdutils.models.text import Classifier
from bdutils.roles import Images, TrainSet, stratified_subset
from bdutils.training import TrainConfig, bucketed_batches, train

FAST = TrainConfig(epochs=25, lr=5e-3, batch_size=4, max_length=24)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 16))
def test_batches_hold_each_sample_once(lengths, size):
    batches = bucketed_batches(lengths, size, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size


def test_batches_are_of_similar_length():
    rng = random.Random(1)
    lengths = [rng.randrange(4, 49) for _ in range(1000)]

    def padded(batches):
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    plain = [list(range(i, min(i + 32, 1000))) for i in range(0, 1000, 32)]
    assert padded(bucketed_batches(lengths, 32, rng)) < 0.7 * padded(plain)


def test_training_learns(tiny, toy_task):
    report = train(tiny, toy_task.train, FAST)
    assert report.tokens > 0
    hits = sum(p == y for p, y in zip(tiny.predict(toy_task.test.inputs), toy_task.test.labels))
    assert hits >= 18


def test_training_is_repeatable_and_leaves_the_global_generator_alone(tiny_folder, toy_task):
    weights = []
    for _ in range(2):
        model = Classifier.new(2, source=str(tiny_folder), max_length=24)
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        train(model, toy_task.train, TrainConfig(epochs=1, dropout=0.1, max_length=24))
        assert torch.equal(before, torch.random.get_rng_state())
        weights.append(model.model.classifier.weight.detach().clone())
    assert torch.equal(*weights)


def test_the_seed_makes_the_head_and_nothing_else():
    models = [Classifier.new(2, seed=seed).model for seed in (0, 0, 1)]
    heads = [model.classifier.weight for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(models[0].bert.pooler.dense.weight, models[2].bert.pooler.dense.weight)


def test_own_losses_get_the_indices(tiny, toy_task):
    seen = []

    def loss(outputs, batch):
        assert [toy_task.train.labels[i] for i in batch["indices"]] == batch["labels"].tolist()
        assert batch["place"].tolist() == batch["indices"]
        seen.extend(batch["indices"])
        return training.cross_entropy(outputs, batch)

    train(tiny, toy_task.train, TrainConfig(epochs=1, max_length=24), loss=loss)
    assert sorted(seen) == list(range(20))


def test_a_broken_loss_stops_the_run(tiny, toy_task):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(tiny, toy_task.train, TrainConfig(max_length=24),
              loss=lambda outputs, batch: outputs.logits.sum() * float("nan"))


@pytest.mark.parametrize("most", [2, 1000])
def test_losses_that_are_read_late_are_the_same_and_break_all_the_same(
        tiny_folder, toy_task, monkeypatch, most):
    """On a GPU they are read now and then; on this processor a test must ask for it."""
    config, reports = TrainConfig(epochs=2, batch_size=8, max_length=24), []
    late = training.Losses
    for kind in (late, lambda _: late(most)):
        monkeypatch.setattr(training, "Losses", kind)
        model = Classifier.new(2, source=str(tiny_folder), max_length=24)
        reports.append(train(model, toy_task.train, config).losses)
    assert reports[0] == reports[1]
    steps = []

    def breaks(outputs, batch):
        steps.append(1)
        return training.cross_entropy(outputs, batch) * (float("nan") if len(steps) > 1 else 1)

    with pytest.raises(FloatingPointError, match="no longer a number"):
        train(model, toy_task.train, TrainConfig(epochs=50, max_length=24, batch_size=4),
              loss=breaks)
    assert len(steps) == {2: 2, 1000: 5}[most]  # an epoch is the most that it goes on for


def test_losses_are_asked_for_together(monkeypatch):
    """As many at a time as were wanted, and each counts as often as its batch has samples."""
    asked = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda values: asked.append(len(values)) or stack(values))
    seen = training.Losses(3)
    for number in range(7):
        seen.add(torch.tensor(float(number)), 2)
    assert asked == [3, 3] and seen.total() == 42 and asked == [3, 3, 1]


@pytest.mark.parametrize("change", [{"epochs": 0}, {"lr": 0}, {"batch_size": 0},
                                    {"max_length": 2}])
def test_impossible_settings(change):
    with pytest.raises(ValueError, match="cannot train"):
        TrainConfig(**change)


def test_logits_do_not_depend_on_batch_or_order(tiny, toy_task):
    texts = [*toy_task.test.inputs, "short", "a much longer text " * 5]
    whole = tiny.logits(texts)
    assert torch.allclose(whole, tiny.logits(texts, batch_size=1), atol=1e-5)
    assert torch.allclose(whole, tiny.logits(texts[::-1]).flip(0), atol=1e-5)
    assert not tiny.model.training
    with pytest.raises(ValueError, match="no samples"):
        tiny.logits([])


def test_saved_models_open_in_plain_transformers(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.bin"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        plain = model(**tokenizer("a good film", return_tensors="pt")).logits
    assert torch.allclose(plain, tiny.logits(["a good film"]), atol=1e-5)
    again = Classifier.load(tmp_path / "model")
    assert again.max_length == 24
    assert torch.equal(again.logits(["a good film"]), tiny.logits(["a good film"]))


def test_pickled_weights_are_never_loaded(tiny, tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="can run code and are never loaded"):
        Classifier.load(tmp_path)


def test_a_missing_hub_says_what_to_do():
    with pytest.raises(ConnectionError, match="BDUTILS_SCALE=small, which needs no hub"):
        Classifier.new(2, source="nobody/no-such-model")


@pytest.fixture
def tiny_encoder(tiny_folder, monkeypatch, cache):
    monkeypatch.setattr(victims, "encoder_source", lambda name: str(tiny_folder))


def test_a_victim_is_trained_once_and_backdoored(tiny_encoder, toy_task, monkeypatch):
    made = victims.victim(toy_task, "badnets", training=FAST, poison_rate=0.4)
    assert made.report.losses[-1] < made.report.losses[0]
    monkeypatch.setattr(victims, "train", None)  # a second training would fail
    again = victims.victim(toy_task, "badnets", training=FAST, poison_rate=0.4)
    assert again.report == made.report
    texts = toy_task.test.inputs
    assert torch.equal(again.classifier.logits(texts), made.classifier.logits(texts))
    scores = victims.evaluate(made.classifier, toy_task, "badnets", every_class=True)
    assert scores.asr.n == 10 and scores.pacc.n == 20 and scores.floor is None


def test_every_setting_has_its_own_cache_entry(tiny_encoder, toy_task, monkeypatch, cache):
    monkeypatch.setattr(victims, "train",
                        lambda *a, **k: training.TrainReport((1.0,), 0.0, 0))
    shuffled = TrainSet(toy_task.train.inputs, toy_task.train.labels[::-1],
                           toy_task.train.label_names)
    for task in (toy_task, toy_task.__class__("toy", shuffled, toy_task.clean,
                                              toy_task.test, "")):
        for attack, options in ((None, {}), ("badnets", {"poison_rate": 0.2}),
                                ("badnets", {"poison_rate": 0.3}),
                                ("badnets", {"poison_rate": 0.2, "seed": 1})):
            for config in (FAST, TrainConfig(max_length=24)):
                victims.victim(task, attack, training=config, **options)
    entries = [p for p in (cache / "models").iterdir() if p.is_dir()]
    assert len(entries) == 2 * 4 * 2


def test_bad_attacks_are_rejected(tiny_encoder, toy_task):
    with pytest.raises(ValueError, match="unknown attack 'badnet' on texts: use one of"):
        victims.victim(toy_task, "badnet")
    with pytest.raises(ValueError, match="takes no \\['poison_rate'\\]"):
        victims.victim(toy_task, None, poison_rate=0.1)


def test_retraining_starts_from_a_new_model(tiny_encoder, tiny_folder, toy_task, monkeypatch):
    """The baseline that retrains without suspects must not go on from the victim."""
    made = victims.victim(toy_task, "badnets", training=FAST, poison_rate=0.4)
    monkeypatch.setattr("bdutils.models.text.encoder_source", lambda name=None: str(tiny_folder))
    seen = []
    monkeypatch.setattr("bdutils.defenses.retrain.train",
                        lambda *given: seen.append(given))
    found = SimpleNamespace(indices=(0, 3))
    monkeypatch.setattr(runs, "find_suspects", lambda *given: (None, found))
    new = runs._retrain(made.context(), BeDKD()).model
    kept = [1, 2, *range(4, len(toy_task.train))]
    assert seen == [(new, made.train.take(kept), FAST)]
    texts = toy_task.test.inputs
    untouched = Classifier.new(2, source=str(tiny_folder), dropout=FAST.dropout, seed=FAST.seed,
                               max_length=FAST.max_length)
    assert torch.equal(new.logits(texts), untouched.logits(texts))
    assert not torch.equal(new.logits(texts), made.classifier.logits(texts))


def test_a_network_of_ones_own_needs_no_configuration_to_be_encoded(tiny):
    own = Classifier(torch.nn.Linear(2, 2), tiny.tokenizer, max_length=24)
    assert own.encode(["a fine film"]) == tiny.encode(["a fine film"])


def test_a_training_of_the_other_kind_is_told(toy_task):
    with pytest.raises(ValueError, match="ImageTrainConfig is no training for texts: take"):
        training.untrained(toy_task.train, training.ImageTrainConfig())
    pixels = Images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="TrainConfig is no training for images"):
        training.untrained(TrainSet(pixels, (0, 1), ("a", "b")), FAST)


@pytest.mark.parametrize("kind", [TrainConfig, training.ImageTrainConfig])
def test_a_scale_that_there_is_not_is_told(kind):
    with pytest.raises(ValueError, match="unknown scale 'Full'"):
        kind.at("Full")


def test_no_clean_samples_are_not_all_of_them(tiny, toy_task):
    attacked = victims.Victim(tiny, toy_task, toy_task.train, None, TrainConfig(), None)
    assert len(attacked.context().clean) == len(toy_task.clean)
    with pytest.raises(ValueError):
        attacked.context(clean=0)


def test_all_samples_are_taken_where_there_are_fewer_than_asked_for():
    assert stratified_subset([3, 0, 2], [0, 1, 1, 0], 9, 2) == [3, 0, 2]


@pytest.mark.parametrize("dropped", [(), (0, 3)])
def test_retraining_leaves_out_what_dup_suspects(tiny, toy_task, monkeypatch, dropped):
    seen = []
    monkeypatch.setattr("bdutils.defenses.retrain.train", lambda *given: seen.append(given))
    monkeypatch.setattr(runs, "search", lambda *given: (None, "flags", None))
    monkeypatch.setattr(runs, "suspects_of", lambda *given: [
        SimpleNamespace(indices=dropped)] if dropped else [])
    context = Context(tiny, toy_task.clean, toy_task.train, FAST)
    monkeypatch.setattr(Context, "new_model", lambda self, training: "new")
    found = runs._without_flagged(context, runs.VARIANTS["dup-retraining"])
    assert found.verdict == ("purified" if dropped else "no evidence")
    assert found.report["flags"] == "flags"
    kept = [i for i in range(len(toy_task.train)) if i not in dropped]
    assert seen == ([("new", toy_task.train.take(kept), FAST)] if dropped else [])
