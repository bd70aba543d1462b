"""A training that was interrupted ends with the weights of one that was not."""

import multiprocessing
import os
import signal

import pytest
import torch

from bdutils import evaluation as victims
from bdutils import training
from bdutils.models.image import ImageClassifier
from bdutils.models.text import Classifier
from bdutils.roles import Images, TrainSet
from bdutils.training import ImageTrainConfig, TrainConfig, cross_entropy, train

TEXT = TrainConfig(epochs=3, lr=5e-3, batch_size=8, max_length=24, dropout=0.1)
IMAGE = ImageTrainConfig(epochs=3, batch_size=8)


@pytest.fixture(params=["text", "images"])
def case(request, tiny_folder, toy_task):
    """A new model, its samples and training: AdamW and dropout, SGD and shifts."""
    if request.param == "text":
        return (lambda: Classifier.new(2, source=str(tiny_folder), max_length=24, dropout=0.1),
                toy_task.train, TEXT)
    pixels = torch.randint(0, 256, (21, 1, 28, 28), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    samples = TrainSet(Images(pixels), tuple(i % 2 for i in range(21)), ("even", "odd"))
    return lambda: ImageClassifier.new(2, channels=1, network="small"), samples, IMAGE


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
    return all(name == clone and torch.equal(a, b) for (name, a), (clone, b) in pairs)


@pytest.fixture
def one_thread():
    """A forked process hangs if it needs its parent's other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_training_goes_on_and_ends_the_same(case, tmp_path, one_thread):
    new_model, samples, config = case
    path = tmp_path / "some" / "run.safetensors"
    whole = new_model()
    expected = train(whole, samples, config)

    def first_part():  # three steps an epoch: killed in the second epoch
        train(new_model(), samples, config, loss=stopping(4, kill), checkpoint=path)

    process = multiprocessing.get_context("fork").Process(target=first_part)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and path.is_file()
    torch.manual_seed(99)  # what the second process has drawn before must not matter
    resumed = new_model()
    # Of nine steps, three were kept.
    found = train(resumed, samples, config, loss=stopping(6, interrupt), checkpoint=path)
    assert same(whole, resumed)
    assert (found.losses, found.tokens) == (expected.losses, expected.tokens)
    assert not list(tmp_path.rglob("*.part"))


def test_a_finished_training_is_not_repeated(case, tmp_path):
    new_model, samples, config = case
    whole, again = new_model(), new_model()
    train(whole, samples, config, checkpoint=tmp_path / "run")
    report = train(again, samples, config, checkpoint=tmp_path / "run",
                   loss=stopping(0, interrupt))
    assert same(whole, again) and len(report.losses) == 3


def test_a_checkpoint_is_for_one_training(case, tmp_path, capsys):
    new_model, samples, config = case
    train(new_model(), samples, config, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="run is of another training: delete it"):
        train(new_model(), samples, type(config)(epochs=4, batch_size=8),
              checkpoint=tmp_path / "run")
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:500])
    damaged, whole = new_model(), new_model()
    train(damaged, samples, config, checkpoint=tmp_path / "run")
    train(whole, samples, config)
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
        victims.victim(toy_task, None, training=TEXT)
    assert len(list(cache.glob("unfinished/*"))) == (scale == "full")
    monkeypatch.setattr(victims, "train", training.train)
    found = victims.victim(toy_task, None, training=TEXT).classifier
    assert not list(cache.glob("unfinished/*"))
    monkeypatch.setenv("BDUTILS_CACHE", str(cache / "other"))
    assert same(found, victims.victim(toy_task, None, training=TEXT).classifier)
