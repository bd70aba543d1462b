"""What every defense is given, and that none can reach for more."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from helpers.pictures import TRAINING
from helpers.pictures import thirds as rows_of

from bdutils.attacks.images import PatchTrigger
from bdutils.attacks.text import PoisonSettings
from bdutils.defenses.base import Case, Outcome, repair
from bdutils.defenses.baselines import MinimaxSettings, TuningSettings
from bdutils.defenses.bedkd import BeDKDSettings
from bdutils.defenses.dup import DUPSettings
from bdutils.defenses.guards import Guard, OnionSettings, StripSettings
from bdutils.defenses.ntml import NTMLSettings
from bdutils.evaluation import evaluate
from bdutils.experiments import variants as runs
from bdutils.experiments.studies import STUDIES
from bdutils.metrics import REFUSED
from bdutils.roles import ReservedSet, Task, TestSet, TrainingSet
from bdutils.training import TrainSettings, train, untrained

KINDS = (TuningSettings, MinimaxSettings, StripSettings, OnionSettings, BeDKDSettings, DUPSettings,
         NTMLSettings)


class Bomb:
    """Whoever looks at it is found out."""

    def __getattribute__(self, name):
        raise AssertionError(f"a defense reached for .{name} of what it must not know")

    def _explode(self, *args):
        raise AssertionError("a defense used what it must not know")

    __len__ = __iter__ = __getitem__ = __bool__ = __eq__ = __hash__ = __repr__ = _explode


@pytest.fixture(scope="module")
def attacked():
    """A victim whose test rows and truth explode on access."""
    task = Task("thirds", rows_of(TrainingSet, 240, 0), rows_of(ReservedSet, 60, 1), Bomb(),
                "made here")
    rows, _ = PatchTrigger().poison(task.train, PoisonSettings(0.2, 0))
    model = untrained(rows, TRAINING)
    train(model, rows, TRAINING)
    return SimpleNamespace(classifier=model, train=rows, truth=Bomb(), settings=TRAINING,
                           task=replace(task, train=rows))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(runs, "FEW", 30)


@pytest.mark.parametrize("settings", [
    TuningSettings(epochs=2), TuningSettings(epochs=2, max_drop=0.1),
    TuningSettings(epochs=2, attention=1.0), TuningSettings(epochs=2, rho=1.0),
    MinimaxSettings(rounds=2),
    StripSettings(copies=2, fpr=0.2), NTMLSettings(),
    BeDKDSettings(lr=3e-4, dmm_epochs=1, cycles=2)], ids=repr)
@pytest.mark.filterwarnings("ignore:the defense took", "ignore:no evidence")
def test_every_defense_for_pictures_does_with_what_the_protocol_allows(attacked, settings, few):
    state = attacked.classifier.model.state_dict
    before = {name: value.clone() for name, value in state().items()}
    found = repair(settings, runs.case_of(attacked, settings))
    assert isinstance(found, Outcome) and found.verdict and found.seconds
    assert len(found.model.predict(attacked.train.texts)) == len(attacked.train)
    assert all(torch.equal(value, before[name])
               for name, value in state().items())


@pytest.mark.parametrize("settings", [BeDKDSettings(dmm_epochs=1, cycles=1), DUPSettings(),
                                      OnionSettings(), TuningSettings(epochs=1),
                                      StripSettings(copies=2)], ids=repr)
def test_every_defense_for_texts_does_with_what_the_protocol_allows(tiny, toy_task, settings):
    rows = [replace(part, texts=tuple(f"{t} {i}" for i in range(10) for t in part.texts),
                    labels=part.labels * 10) for part in (toy_task.train, toy_task.reserved)]
    task = replace(toy_task, train=rows[0], reserved=rows[1], test=Bomb())
    attacked = SimpleNamespace(classifier=tiny, train=task.train, truth=Bomb(), task=task,
                               settings=TrainSettings(epochs=1, max_length=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # a tiny model is no victim
        found = repair(settings, runs.case_of(attacked, settings))
    assert len(found.model.predict(task.train.texts)) == len(task.train)


def test_a_bomb_goes_off():
    for reach in (lambda b: b.labels, len, list, lambda b: b[0], bool):
        with pytest.raises(AssertionError, match="must not know"):
            reach(Bomb())


@pytest.mark.parametrize("kind", KINDS)
def test_only_those_who_need_it_get_the_training_set(attacked, kind, few):
    case = runs.case_of(attacked, kind())
    needs = kind in (BeDKDSettings, DUPSettings, NTMLSettings)
    assert case.view.pool is (attacked.train if needs else None)
    assert len(case.view.reserved) == 30 and type(case.view.reserved) is ReservedSet
    assert len(runs.case_of(attacked, kind(), 12).view.reserved) == 12
    fresh = case.fresh(TRAINING)
    assert fresh.model.config == attacked.classifier.model.config
    assert {field for field in vars(case)} == {"classifier", "view", "training", "watch"}


def test_a_reader_adds_a_defense_in_a_few_lines(attacked, few):
    @dataclass(frozen=True)
    class Nothing:
        seed: int = 0

    case = Case(attacked.classifier, runs.case_of(attacked, TuningSettings()).view, TRAINING)
    with pytest.raises(TypeError, match="no defense belongs to Nothing: write one, and put"):
        repair(Nothing(), case)

    @repair.register
    def _(settings: Nothing, case: Case) -> Outcome:
        return Outcome(case.classifier, "nothing")

    assert repair(Nothing(), case).model is case.classifier


def test_a_refused_row_is_an_error_on_clean_rows_and_a_failed_attack_on_marked_ones(attacked):
    task = replace(attacked.task, test=rows_of(TestSet, 60, 2))

    def dark(texts):
        """Refuse every third row."""
        return texts, [i % 3 == 0 for i in range(len(texts))]

    guard = Guard(attacked.classifier, dark, 0.0, True)
    guesses = guard.predict(task.test.texts)
    assert guesses[::3] == [REFUSED] * 20 and REFUSED not in guesses[1::3]
    scores = evaluate(guard, task, PatchTrigger(), 0)
    plain = evaluate(attacked.classifier, task, PatchTrigger(), 0)
    assert scores.refused_clean.value == pytest.approx(1 / 3) and scores.refused.n == 40
    assert scores.cacc.value <= 2 / 3 and plain.cacc.value > 0.8
    assert scores.refused.value == pytest.approx(14 / 40)  # of the forty rows that count
    assert plain.refused is None and plain.refused_clean is None
    assert scores.asr.value <= plain.asr.value * 26 / 40 + 0.1


def test_every_recorded_defense_is_one_that_the_interface_knows():
    known = {run.defense for runs_ in STUDIES.values() for run in runs_ if run.defense}
    assert known <= set(runs.VARIANTS)
    assert all(repair.dispatch(type(settings)) is not repair.dispatch(object)
               for settings in runs.VARIANTS.values())
