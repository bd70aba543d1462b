"""A training that was interrupted ends with the weights of one that was not."""

import multiprocessing
import os
import signal

import pytest
import torch

from bdutils import evaluation as victims
from bdutils import training
from bdutils.models.image import PictureClassifier
from bdutils.models.text import Classifier
from bdutils.roles import Pictures, TrainingSet
from bdutils.training import PictureSettings, TrainSettings, cross_entropy, train

TEXT = TrainSettings(epochs=3, lr=5e-3, batch_size=8, max_length=24, dropout=0.1)
PICTURE = PictureSettings(epochs=3, batch_size=8)


@pytest.fixture(params=["text", "pictures"])
def case(request, tiny_folder, toy_task):
    """A way to make a fresh model, its rows and settings: AdamW and dropout, SGD and shifts."""
    if request.param == "text":
        return (lambda: Classifier.new(2, source=str(tiny_folder), max_length=24, dropout=0.1),
                toy_task.train, TEXT)
    pixels = torch.randint(0, 256, (21, 1, 28, 28), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    rows = TrainingSet(Pictures(pixels), tuple(i % 2 for i in range(21)), ("even", "odd"))
    return lambda: PictureClassifier.new(2, channels=1, network="small"), rows, PICTURE


def stopping(steps, stop):
    """The usual loss, until so many steps are over."""
    left = iter(range(steps))

    def loss(outputs, batch):
        if next(left, None) is None:
            stop()
        return cross_entropy(outputs, batch)

    return loss


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def same(one, other):
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


def test_a_killed_training_goes_on_and_ends_the_same(case, tmp_path):
    fresh, rows, settings = case
    path = tmp_path / "some" / "run.safetensors"
    whole = fresh()
    expected = train(whole, rows, settings)

    def first_part():  # three steps an epoch: killed in the second epoch
        train(fresh(), rows, settings, loss=stopping(4, kill), checkpoint=path)

    process = multiprocessing.get_context("fork").Process(target=first_part)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and path.is_file()
    torch.manual_seed(99)  # what the second process has drawn before must not matter
    resumed = fresh()
    # Of nine steps, three were kept.
    found = train(resumed, rows, settings, loss=stopping(6, interrupt), checkpoint=path)
    assert same(whole, resumed)
    assert (found.losses, found.tokens) == (expected.losses, expected.tokens)
    assert not list(tmp_path.rglob("*.part"))


def test_a_finished_training_is_not_repeated(case, tmp_path):
    fresh, rows, settings = case
    whole, again = fresh(), fresh()
    train(whole, rows, settings, checkpoint=tmp_path / "run")
    report = train(again, rows, settings, checkpoint=tmp_path / "run",
                   loss=stopping(0, interrupt))
    assert same(whole, again) and len(report.losses) == 3


def test_a_checkpoint_is_for_one_training(case, tmp_path, capsys):
    fresh, rows, settings = case
    train(fresh(), rows, settings, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="run is of another training: delete it"):
        train(fresh(), rows, type(settings)(epochs=4, batch_size=8), checkpoint=tmp_path / "run")
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:500])
    damaged, whole = fresh(), fresh()
    train(damaged, rows, settings, checkpoint=tmp_path / "run")
    train(whole, rows, settings)
    assert same(damaged, whole)
    assert "is damaged: the training starts anew" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["small", "full"])
def test_a_victim_keeps_its_epochs_at_full_scale_only(scale, tiny_folder, toy_task, cache,
                                                      monkeypatch):
    monkeypatch.setenv("BDUTILS_SCALE", scale)
    monkeypatch.setattr(victims, "encoder_source", lambda name: str(tiny_folder))

    def interrupted(*given, **options):
        return training.train(*given, **options, loss=stopping(4, interrupt))

    monkeypatch.setattr(victims, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        victims.victim(toy_task, None, settings=TEXT)
    assert len(list(cache.glob("unfinished/*"))) == (scale == "full")
    monkeypatch.setattr(victims, "train", training.train)
    found = victims.victim(toy_task, None, settings=TEXT).classifier
    assert not list(cache.glob("unfinished/*"))
    monkeypatch.setenv("BDUTILS_CACHE", str(cache / "other"))
    assert same(found, victims.victim(toy_task, None, settings=TEXT).classifier)
