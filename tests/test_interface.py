"""What every defense is given and gives, and that none can reach for more."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers.images import TRAINING, thirds

from bdutils.attacks.base import PoisonConfig
from bdutils.attacks.image import BadNetsPatch
from bdutils.defenses.abl import ABL
from bdutils.defenses.ac import ActivationClustering
from bdutils.defenses.base import DEFENSES, Context, Outcome, register
from bdutils.defenses.bedkd import BeDKD
from bdutils.defenses.clp import CLP
from bdutils.defenses.cube import CUBE
from bdutils.defenses.dup import DUP
from bdutils.defenses.filters import InputFilter
from bdutils.defenses.fineprune import FinePruning
from bdutils.defenses.finetune import FineTuning, FineTuningSweep, TuneConfig
from bdutils.defenses.ft_sam import FTSAM
from bdutils.defenses.ibau import IBAU
from bdutils.defenses.mapping import ModuleConfig
from bdutils.defenses.nad import NAD
from bdutils.defenses.ntml import NTML
from bdutils.defenses.onion import ONION
from bdutils.defenses.spectral import SpectralSignatures
from bdutils.defenses.strip import STRIP
from bdutils.evaluation import Victim, evaluate
from bdutils.experiments import variants
from bdutils.experiments.studies import STUDIES
from bdutils.metrics import REJECTED
from bdutils.roles import CleanSet, Task, TestSet, TrainSet
from bdutils.training import TrainConfig, train, untrained

SHORT = TuneConfig(epochs=2)


class Bomb:
    """Whoever evaluates it is found out."""

    def __getattribute__(self, name):
        raise AssertionError(f"a defense reached for .{name} of what it must not know")

    def _explode(self, *args):
        raise AssertionError("a defense used what it must not know")

    __len__ = __iter__ = __getitem__ = __bool__ = __eq__ = __hash__ = __repr__ = _explode


@pytest.fixture(scope="module")
def attacked():
    """A victim whose test set and poison record explode on access."""
    task = Task("thirds", thirds(TrainSet, 240, 0), thirds(CleanSet, 60, 1), Bomb(), "made here")
    poisoned, _ = BadNetsPatch().poison(task.train, PoisonConfig(0.2, 0))
    model = untrained(poisoned, TRAINING)
    report = train(model, poisoned, TRAINING)
    return Victim(model, replace(task, train=poisoned), poisoned, Bomb(), TRAINING, report)


@pytest.fixture
def few_clean(monkeypatch):
    monkeypatch.setattr(variants, "CLEAN_IMAGES", 30)


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("defense", [
    FineTuning(SHORT), FinePruning(SHORT, max_drop=0.1), NAD(SHORT, weight=1.0),
    FTSAM(SHORT, rho=1.0), IBAU(rounds=2), STRIP(copies=2, fpr=0.2), NTML(), CLP(),
    FineTuningSweep(SHORT, folds=2), SpectralSignatures(), ActivationClustering(max_share=0.5),
    ABL(epochs=1),
    BeDKD(lr=3e-4, module=ModuleConfig(epochs=1), cycles=2)], ids=repr)
@pytest.mark.filterwarnings("ignore:the defense took", "ignore:no evidence")
def test_every_defense_for_images_does_with_what_the_protocol_allows(attacked, defense,
                                                                     few_clean):
    state = attacked.classifier.model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    outcome = defense(variants.context_for(attacked, defense))
    assert isinstance(outcome, Outcome) and outcome.verdict and outcome.seconds
    assert len(outcome.model.predict(attacked.train.inputs)) == len(attacked.train)
    assert unchanged(attacked.classifier.model, before)


@pytest.mark.parametrize("defense", [
    BeDKD(module=ModuleConfig(epochs=1), cycles=1), DUP(), ONION(),
    FineTuning(TuneConfig(epochs=1)), STRIP(copies=2), SpectralSignatures(),
    ActivationClustering(), CUBE(neighbors=5), ABL(epochs=1)], ids=repr)
def test_every_defense_for_texts_does_with_what_the_protocol_allows(tiny, toy_task, defense):
    longer = [replace(part, inputs=tuple(f"{t} {i}" for i in range(10) for t in part.inputs),
                      labels=part.labels * 10) for part in (toy_task.train, toy_task.clean)]
    task = replace(toy_task, train=longer[0], clean=longer[1], test=Bomb())
    attacked = Victim(tiny, task, task.train, Bomb(), TrainConfig(epochs=1, max_length=24), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # a tiny model is no victim
        outcome = defense(variants.context_for(attacked, defense))
    assert len(outcome.model.predict(task.train.inputs)) == len(task.train)


def test_a_bomb_goes_off():
    for reach in (lambda b: b.labels, len, list, lambda b: b[0], bool):
        with pytest.raises(AssertionError, match="must not know"):
            reach(Bomb())


@pytest.mark.parametrize("kind", DEFENSES.values(), ids=DEFENSES)
def test_only_those_who_need_it_get_the_training_set(attacked, kind, few_clean):
    with_train = (BeDKD, DUP, NTML, SpectralSignatures, ActivationClustering, CUBE, ABL)
    context = variants.context_for(attacked, kind())
    assert context.train is (attacked.train if kind in with_train else None)
    assert len(context.clean) == 30 and type(context.clean) is CleanSet
    assert len(variants.context_for(attacked, kind(), 12).clean) == 12
    assert context.new_model(TRAINING).model.config == attacked.classifier.model.config
    assert {field.name for field in fields(context)} == {
        "classifier", "clean", "train", "training", "callback"}


def test_a_set_of_another_role_is_rejected(attacked):
    test = thirds(TestSet, 60, 2)
    with pytest.raises(TypeError, match="clean samples must be a CleanSet, not a TestSet"):
        Context(attacked.classifier, test)
    with pytest.raises(TypeError, match="training set must be a TrainSet, not a TestSet"):
        Context(attacked.classifier, attacked.task.clean, test)


def test_all_methods_are_registered():
    known = {name: kind for name, kind in DEFENSES.items()
             if kind.__module__.startswith("bdutils")}
    assert set(known) == {"ft", "fp", "nad", "ft_sam", "ibau", "strip", "onion", "bedkd", "dup",
                          "ntml", "ft_sweep", "clp", "spectral", "ac", "cube", "abl"}
    assert all("seed" in {field.name for field in fields(kind)} for kind in known.values())


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("bdutils.defenses.base.DEFENSES", dict(DEFENSES))


def test_a_reader_adds_a_defense_in_a_few_lines(attacked, registry):
    @register("nothing")
    @dataclass(frozen=True)
    class Nothing:
        seed: int = 0

        def __call__(self, context):
            return Outcome(context.classifier, "nothing")

    outcome = Nothing()(attacked.context(clean=30))
    assert outcome.model is attacked.classifier and set(outcome.seconds) == {"purify"}
    with pytest.raises(TypeError, match="called with a Context, not a Victim"):
        Nothing()(attacked)


def test_what_is_no_defense_is_told_when_it_is_written(registry):
    with pytest.raises(TypeError, match="Plain is no defense: write a dataclass with"):
        @register("plain")
        class Plain:
            def __call__(self, context):
                return None

    with pytest.raises(TypeError, match="Mute is no defense"):
        @register("mute")
        @dataclass(frozen=True)
        class Mute:
            seed: int = 0

    with pytest.raises(ValueError, match="'dup' is DUP already: choose another name"):
        @register("dup")
        @dataclass(frozen=True)
        class Mine:
            def __call__(self, context):
                return None


@pytest.mark.parametrize(("given", "error", "message"), [
    (None, TypeError, "gave a NoneType and no outcome: end it with `return Outcome"),
    (Outcome(7), TypeError, "a int, has no method `predict`"),
    (Outcome(SimpleNamespace(predict=lambda x: [5.5])), ValueError, r"gave answers \[5\] for 4"),
    (Outcome(SimpleNamespace(predict=lambda x: 1 / 0)), ValueError, "does not predict .ZeroDiv")])
def test_what_nobody_could_measure_is_rejected(attacked, registry, given, error, message):
    @register("odd")
    @dataclass(frozen=True)
    class Odd:
        def __call__(self, context):
            return given

    with pytest.raises(error, match=message):
        Odd()(attacked.context(clean=30))


def test_a_missing_training_set_is_told(attacked):
    for defense in (BeDKD(), NTML()):
        with pytest.raises(ValueError, match="needs the training set: give the context a `train`"):
            defense(attacked.context(train=False, clean=30))
    with pytest.raises(ValueError, match="give the context a `training`"):
        FineTuning()(Context(attacked.classifier, attacked.task.clean))


def test_a_rejected_sample_is_an_error_and_a_failed_attack(attacked):
    task = replace(attacked.task, test=thirds(TestSet, 60, 2))

    def dark(inputs):
        """Reject every third sample."""
        return inputs, [i % 3 == 0 for i in range(len(inputs))]

    filtered = InputFilter(attacked.classifier, dark, 0.0, True)
    predicted = filtered.predict(task.test.inputs)
    assert predicted[::3] == [REJECTED] * 20 and REJECTED not in predicted[1::3]
    scores = evaluate(filtered, task, BadNetsPatch(), 0)
    plain = evaluate(attacked.classifier, task, BadNetsPatch(), 0)
    assert scores.rejected_clean.value == pytest.approx(1 / 3) and scores.rejected.n == 40
    assert scores.cacc.value <= 2 / 3 and plain.cacc.value > 0.8
    assert scores.rejected.value == pytest.approx(14 / 40)  # of the forty samples that count
    assert plain.rejected is None and plain.rejected_clean is None
    assert scores.asr.value <= plain.asr.value * 26 / 40 + 0.1


def test_every_recorded_defense_is_a_registered_one():
    known = {run.defense for runs in STUDIES.values() for run in runs if run.defense}
    assert known <= set(variants.VARIANTS)
    assert {type(defense) for defense in variants.VARIANTS.values()} <= set(DEFENSES.values())


def test_a_variant_changes_what_it_says_and_nothing_else():
    changed = variants.changed(DUP(), unlearning__lr=1.0, alpha=0.5)
    assert changed == replace(DUP(), alpha=0.5, unlearning=replace(DUP().unlearning, lr=1.0))
    with pytest.raises(TypeError):
        variants.changed(DUP(), unlearning__rate=1.0)
