"""Images: data, networks, triggers equal to hand-made arrays, and poisoning."""

import copy
import gzip
import hashlib
import inspect
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdutils import assets, evaluation
from bdutils.assets import AssetError
from bdutils.attacks import image as attacks
from bdutils.attacks.base import PoisonConfig, seeded, triggered
from bdutils.attacks.image import (
    IMAGE_TRIGGERS,
    SIG,
    BadNetsPatch,
    Blended,
    GeneratorConfig,
    ImageTrigger,
    InputAware,
    LabelConsistent,
    Narcissus,
    Noise,
    WaNet,
    add_corners,
    diversity,
    fit_pattern,
    inward,
    joint_loss,
    pattern_and_mask,
    pgd,
    warped,
    warping_field,
)
from bdutils.attacks.text import BadNets
from bdutils.data import known, load_task
from bdutils.evaluation import evaluate, trigger_for, victim
from bdutils.experiments import results
from bdutils.metrics import wilson
from bdutils.models.image import (
    NETWORKS,
    ImageClassifier,
    NetworkConfig,
    PreActResNet,
    augmented,
    floats,
    layout_of,
    stored,
)
from bdutils.roles import CleanSet, Images, Task, TestSet, TrainSet
from bdutils.training import ImageTrainConfig, train

SIMPLE = [BadNetsPatch(), Blended(), SIG(), WaNet()]


def made(role, n=40, seed=0, side=28):
    """Bright left half: class 0; bright right half: class 1. They must not be mirrored."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 60, (n, 1, side, side), generator=rng, dtype=torch.uint8)
    labels = [i % 2 for i in range(n)]
    for i, label in enumerate(labels):
        half = slice(side // 2, None) if label else slice(0, side // 2)
        pixels[i, :, 4:-4, half] += 150
    return role(Images(pixels), tuple(labels), ("left", "right"))


@pytest.fixture(scope="module")
def task():
    return Task("halves", made(TrainSet, 200), made(CleanSet, 20, 1), made(TestSet, 60, 2),
                "made here")


@pytest.fixture(scope="module")
def aware(task, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BDUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return InputAware(learning=GeneratorConfig(mask_epochs=30)).prepare(task.train, 0)


# ----------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def clothes():
    return load_task("images", scale="small")


def test_the_roles_share_no_image_and_are_balanced(clothes):
    parts = [clothes.train, clothes.clean, clothes.test]
    digests = [{p.numpy().tobytes() for p in part.inputs} for part in parts]
    assert [len(part) for part in parts] == [12000, 500, 5000]
    assert sum(map(len, digests)) == len(set.union(*digests)) == 17500
    for part in parts:
        counts = torch.tensor(part.labels).bincount()
        assert len(counts) == 10 and counts.max() - counts.min() <= 1


def test_labels_fit_their_images(clothes):
    """Shuffled labels would pass every check of form; the nearest class mean does not lie."""
    x, y = clothes.train.inputs.pixels.flatten(1).float(), torch.tensor(clothes.train.labels)
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    new = clothes.test.inputs.pixels.flatten(1).float()
    right = torch.cdist(new, means).argmin(1) == torch.tensor(clothes.test.labels)
    assert right.double().mean() > 0.6
    assert "trouser" == clothes.test.label_names[1]


@pytest.mark.parametrize("pixels", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).byte(),
                                    torch.zeros(2, 2, 4, 4).byte()])
def test_what_is_no_image_is_rejected(pixels):
    with pytest.raises(ValueError, match="uint8 of shape"):
        Images(pixels)


def test_sets_of_images_behave_as_sets_of_texts(task):
    some = task.train.take([3, 1])
    assert some.labels == (1, 1) and torch.equal(some.inputs[0], task.train.inputs[3])
    new = some.changed([0], Images(torch.zeros(1, 1, 28, 28).byte()), 0)
    assert new.labels == (0, 1) and new.inputs[0].max() == 0
    assert torch.equal(some.inputs[0], task.train.inputs[3])  # the old set stays as it was
    assert new.fingerprint() != some.fingerprint() == task.train.take([3, 1]).fingerprint()


def test_a_debian_package_is_checked(cache, monkeypatch):
    data = gzip.compress(b"something else")
    package = assets.Debian("some-set", {"./there": ("here", hashlib.sha256(b"x").hexdigest())})
    monkeypatch.setitem(assets.SOURCES, "fashion_mnist", (package,))

    def run(command, **options):
        if command[:2] == ["apt-get", "download"]:
            (options["cwd"] / "some-set.deb").write_bytes(b"a package")
        archive = subprocess.CompletedProcess(command, 0, "", "")
        archive.stdout = _tar("./there", data) if command[0] == "dpkg-deb" else ""
        return archive

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(AssetError, match="here of some-set is not the file that we know"):
        assets.asset("fashion_mnist")
    assert not list(cache.rglob("here"))


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_debian_package_that_is_cut_short_is_rejected(content, cache, monkeypatch):
    package = assets.Debian("some-set", {"./there": ("here", "0" * 64)})
    monkeypatch.setitem(assets.SOURCES, "fashion_mnist", (package,))

    def run(command, **options):
        if command[:2] == ["apt-get", "download"]:
            (options["cwd"] / "some-set.deb").write_bytes(b"a package")
        found = _tar("./elsewhere", b"x") if content is None else content
        return subprocess.CompletedProcess(command, 0, found, "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(AssetError, match="some-set was cut short or has other files"):
        assets.asset("fashion_mnist")
    assert not list(cache.rglob("here"))


def _tar(name, data):
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        about = tarfile.TarInfo(name)
        about.size = len(data)
        tar.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


def test_no_network_and_no_apt_name_the_remedy(cache, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(AssetError, match="Unable to locate package.*connect to the internet"):
        assets.asset("fashion_mnist")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="could not be loaded from the hub"):
        load_task("images", scale="small")


def test_a_copy_from_elsewhere_is_checked(monkeypatch):
    """A shuffled copy passes, one with a wrong label or pixel does not."""
    raw = known._fashion()
    assert {part: known._of_all(raw, part) for part in known.PARTS} == known.FASHION_SHA256
    order = torch.randperm(len(raw.labels), generator=torch.Generator().manual_seed(0)).tolist()
    copy = replace(raw, inputs=raw.inputs.take(order), labels=[raw.labels[i] for i in order],
                   splits=[raw.splits[i] for i in order])

    def nothing(name):
        raise AssetError("no apt-get")

    monkeypatch.setattr(known, "asset", nothing)
    monkeypatch.setattr(known, "_from_hub", lambda name: copy)
    assert known._fashion() is copy
    copy.labels[-1] = (copy.labels[-1] + 1) % 10
    with pytest.raises(AssetError, match="not the set that we know"):
        known._fashion()


# ------------------------------------------------------------------- networks

def test_the_full_network_is_preact_resnet_18():
    """BackdoorBench's model has 11,171,146 weights; ours has a last norm of 2 x 512 more."""
    model = PreActResNet(NETWORKS["full"])
    assert sum(p.numel() for p in model.parameters()) == 11_171_146 + 2 * 512
    out = model.eval()(torch.zeros(2, 3, 32, 32))
    assert out.logits.shape == (2, 10) and out.hidden_states[-1].shape == (2, 512, 4, 4)


def test_a_strided_convolution_of_few_channels_is_kept_from_channels_last():
    few, usual = (NetworkConfig(widths=widths, blocks=(1, 1)) for widths in ((4, 8), (8, 16)))
    assert layout_of(PreActResNet(few)) == torch.contiguous_format
    assert layout_of(PreActResNet(usual)) == torch.channels_last
    assert layout_of(torch.nn.Conv2d(6, 12, 3, 2)) == torch.channels_last


@pytest.mark.slow
def test_a_network_of_few_channels_survives_a_training_with_avx2_alone():
    """A crash of the library, which no `except` catches: so in a process of its own."""
    code = """
import torch
from bdutils.models import image
image.NETWORKS["small"] = image.NetworkConfig(widths=(4, 8), blocks=(1, 1), stem_stride=2)
net = image.ImageClassifier.new(2, channels=1, network="small")
net.model.train()
pixels = torch.zeros(32, 1, 32, 32, dtype=torch.uint8)
for _ in range(15):
    net.model(**net.collate(pixels, range(32))).logits.square().mean().backward()
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
        **os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"})
    assert run.stdout == "done\n", run.stderr[-300:]


def test_augmentation_moves_pixels_and_makes_none():
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 8, 8)
    x[:, :, 3, 2] = 1.0
    y = augmented(x, pad=2, flip=True)
    assert y.shape == x.shape and torch.equal(y.flatten(1).sum(1), torch.ones(64))
    places = {tuple(p[0].nonzero()[0].tolist()) for p in y}
    assert {down for down, _ in places} == {1, 2, 3, 4, 5}
    assert {right for _, right in places} == {0, 1, 2, 3, 4, 5, 6, 7}  # 2 or 5, give or take 2
    assert torch.equal(augmented(x, pad=0, flip=False), x)


def test_a_network_learns_and_comes_back_from_disk(task, tmp_path):
    classifier = ImageClassifier.new(2, channels=1, network="small", flip=False)
    train(classifier, task.train, ImageTrainConfig(epochs=2, batch_size=32))
    right = sum(a == b for a, b in zip(classifier.predict(task.test.inputs), task.test.labels))
    assert right >= 55
    classifier.save(tmp_path)
    again = ImageClassifier.load(tmp_path)
    assert torch.allclose(again.logits(task.test.inputs), classifier.logits(task.test.inputs))
    assert (again.pad, again.flip) == (classifier.pad, classifier.flip)
    assert torch.allclose(again.logits(task.test.inputs, batch_size=7),
                          classifier.logits(task.test.inputs), atol=1e-5)


# ------------------------------------------------------- triggers, by hand

def test_badnets_by_hand():
    x = torch.zeros(1, 1, 5, 5)
    expected = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1],
                             [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]).float()
    assert torch.equal(BadNetsPatch().paint(x)[0, 0], expected)
    half = BadNetsPatch(size=1, strength=0.5).paint(torch.full((1, 1, 2, 2), 0.2))
    assert torch.allclose(half[0, 0], torch.tensor([[0.2, 0.2], [0.2, 0.6]]))


def test_blended_by_hand():
    noise = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.full((2, 1, 4, 4), 0.5)
    assert torch.allclose(Blended(strength=0.2).paint(x), 0.4 + 0.2 * noise)
    assert stored(torch.tensor([-1.0, 0.0, 0.999, 2.0])).tolist() == [0, 0, 255, 255]
    assert stored(Blended().paint(x))[0, 0, 0, 0] == round(
        255 * (0.4 + 0.2 * noise[0, 0, 0].item()))


def test_sig_by_hand():
    x = torch.full((1, 1, 2, 24), 100 / 255)  # a quarter of a wave is one pixel
    wave = stored(SIG().paint(x))[0, 0]
    assert wave[0].tolist() == wave[1].tolist() == [100, 140, 100, 60] * 6
    black = stored(SIG().paint(torch.zeros(1, 1, 1, 24)))[0, 0, 0]
    white = stored(SIG().paint(torch.ones(1, 1, 1, 24)))[0, 0, 0]
    assert black[:4].tolist() == [0, 40, 0, 0] and white[:4].tolist() == [255, 255, 255, 215]


def test_the_grid_of_the_field():
    field = warping_field(28, 4, seed=0)
    assert field.shape == (1, 28, 28, 2) and field.std() > 0.3
    rng = torch.Generator().manual_seed(0)
    knots = 2 * torch.rand(1, 2, 4, 4, generator=rng) - 1
    knots = knots / knots.abs().mean()  # the mean size of a control point's shift is one
    assert torch.allclose(field[0, [0, 0, -1, -1], [0, -1, 0, -1]],
                          knots[0, :, [0, 0, -1, -1], [0, -1, 0, -1]].T, atol=1e-5)
    jumps = (field[:, 1:] - field[:, :-1]).abs().max()
    assert jumps < 0.8  # smooth: neighbors move alike


def test_warping_samples_between_pixels():
    x = torch.arange(5.).expand(1, 1, 5, 5).contiguous()
    half = torch.zeros(1, 5, 5, 2)
    half[..., 0] = 1 / 4  # half a pixel to the right
    assert torch.allclose(warped(x, half)[0, 0, 0, :4], torch.tensor([0.5, 1.5, 2.5, 3.5]))
    assert torch.equal(warped(x, torch.zeros(1, 5, 5, 2)), x)


def test_the_corners_by_hand():
    y = add_corners(torch.zeros(1, 1, 8, 8), 1.0)[0, 0]
    board = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).float()
    for part in (y[:3, :3], y[:3, -3:], y[-3:, :3], y[-3:, -3:]):
        assert torch.equal(part, board)
    assert y[3:5].sum() == y[:, 3:5].sum() == 0


def test_pgd_stays_close_and_raises_the_loss(task):
    classifier = ImageClassifier.new(2, channels=1, network="small", flip=False)
    train(classifier, task.train, ImageTrainConfig(epochs=2, batch_size=32))
    x = floats(task.train.take(range(0, 40, 2)).inputs.pixels)  # all of class 0
    y = pgd(classifier.model, x, 0, epsilon=8 / 255, steps=5)
    by_parts = pgd(classifier.model, x, 0, epsilon=8 / 255, steps=5, chunk=7)
    assert (stored(by_parts) == stored(y)).float().mean() > 0.99
    assert (y - x).abs().max() <= 8 / 255 + 1e-6 and y.min() >= 0 and y.max() <= 1

    def loss(images):
        return torch.nn.functional.cross_entropy(
            classifier.model(images).logits, torch.zeros(len(images), dtype=torch.long))

    assert loss(y) > loss(x) + 0.05
    assert not any(p.grad is not None and p.grad.abs().sum() > 0
                   for p in classifier.model.parameters())


def test_diversity_by_hand():
    a, b = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    assert diversity(a, b, a, b).item() == pytest.approx(0.5 / 0.5001)
    assert diversity(a, b, a, a).item() == pytest.approx(0.5 / 1e-4)
    assert diversity(a, a, a, b).item() == 0.0


def test_an_image_that_meets_itself_leaves_the_gradient_a_number():
    """On a GPU the two triggers of such an image are equal to the last bit."""
    x = torch.rand(4, 1, 8, 8, generator=seeded(0))
    pattern = torch.rand(4, 1, 8, 8, generator=seeded(1)).requires_grad_()
    diversity(x, x.roll(2, 0), pattern, pattern.detach().clone()).backward()
    assert pattern.grad.isfinite().all()


def test_networks_that_are_no_longer_numbers_are_told(aware, task):
    x, y = task.train.pixels[:8], torch.tensor(task.train.labels[:8])
    net = ImageClassifier.new(2, channels=1, network="small").model
    net.head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the rate"):
        fit_pattern(copy.deepcopy(aware.nets), net, x, y, 0, GeneratorConfig(epochs=1))


def test_the_loss_of_a_learned_trigger(aware):
    """Own triggers go with the target, those of others with their labels, then clean samples."""
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    other, labels, seen = x.flip(0), torch.ones(20, dtype=torch.long), []

    def victim_of(batch):
        seen.append(batch)
        return SimpleNamespace(logits=torch.stack([batch.flatten(1).sum(1),
                                                   torch.zeros(len(batch))], 1))

    config = GeneratorConfig(rate=0.25, cross=0.25, diversity=2.0)
    loss = joint_loss(aware.nets, victim_of, (x, other), labels, 0, config)
    (batch,) = seen
    what, where = pattern_and_mask(aware.nets, x)
    theirs, there = pattern_and_mask(aware.nets, other)
    assert torch.allclose(batch[:5], (x + where * (what - x))[:5])
    assert torch.allclose(batch[5:10], (x + there * (theirs - x))[5:10])
    assert torch.equal(batch[10:], x[10:])
    wanted = torch.tensor([0] * 5 + [1] * 15)
    expected = torch.nn.functional.cross_entropy(victim_of(batch).logits, wanted)
    assert loss.item() == pytest.approx(
        (expected + 2 * diversity(x, other, what, theirs)).item(), rel=1e-5)


def test_narcissus_keeps_labels_and_is_magnified_at_test_time(task):
    classifier = ImageClassifier.new(2, channels=1, network="small", flip=False)
    train(classifier, task.train, ImageTrainConfig(epochs=2, batch_size=32))
    pixels = task.train.inputs.pixels
    own, other = (pixels[torch.tensor(task.train.labels) == k] for k in (0, 1))
    noise = inward(classifier.model, own, 0, 16 / 255, steps=20)
    assert noise.shape == (1, 1, 28, 28) and 0 < noise.abs().max() <= 16 / 255 + 1e-6
    with torch.no_grad():
        for images in (own, other):  # all become more of class 0, though only `own` was seen
            before, after = (classifier.model((floats(images) + add).clamp(0, 1)).logits.softmax(1)
                             for add in (0, noise))
            assert (after - before)[:, 0].mean() > -1e-6
        assert (after - before)[:, 0].mean() > 1e-3
    nets = torch.nn.ModuleDict({"noise": Noise(pixels.shape[1:])})
    nets["noise"].value.data.copy_(noise)
    trigger = Narcissus(nets=nets)
    poisoned, record = trigger.poison(task.train, PoisonConfig(0.1, 0, "clean"))
    hit = torch.tensor(record.poisoned)
    assert poisoned.labels == task.train.labels and hit.sum() == 20
    change = (poisoned.inputs.pixels.int() - pixels.int()).abs()
    assert change[~hit].max() == 0 and 0 < change[hit].max() <= 16
    assert record.trigger is trigger
    shown = trigger.apply(Images(own), seeded(0)).pixels.int() - own.int()
    assert 40 < shown.abs().max() <= 48
    assert torch.equal(stored(replace(trigger, strength=0.0).paint(floats(own))), own)


MUTANTS = [
    ("angle.sin()", "angle.cos()", test_sig_by_hand),
    ("(x + self.strength * angle", "(x - self.strength * angle", test_sig_by_hand),
    ("(1 - self.strength) * x", "x", test_blended_by_hand),
    ("self.strength * (1 - corner)", "self.strength", test_badnets_by_hand),
    ("-self.size:, -self.size:", ":self.size, :self.size", test_badnets_by_hand),
    ("knots = knots / knots.abs().mean()", "knots = knots", test_the_grid_of_the_field),
    ("knots.abs().mean()", "knots.abs().mean()", test_the_grid_of_the_field),  # no mutant passes
    ("+ shifts.to(x)", "- shifts.to(x)", test_warping_samples_between_pixels),
    ("% 2 == 0", "% 2 == 1", test_the_corners_by_hand),
    ("y.detach() + 2.5", "y.detach() - 2.5", test_pgd_stays_close_and_raises_the_loss),
    ("(y - part).clamp(-epsilon, epsilon)", "y - part", test_pgd_stays_close_and_raises_the_loss),
    ("gap(x, other) / (gap", "gap(pattern, other_pattern) / (gap", test_diversity_by_hand),
    ("wanted[:hits] = target_label", "wanted[:] = target_label",
     test_the_loss_of_a_learned_trigger),
    ("wrong_pattern[cut], wrong_mask[cut]", "pattern[cut], mask[cut]",
     test_the_loss_of_a_learned_trigger),
    ("config.diversity * diversity(\n        x", "diversity(\n        x",
     test_the_loss_of_a_learned_trigger),
    ("* apart", "+ 0 * apart",
     test_diversity_by_hand),
    ("torch.where(apart, square, 1.0)", "square",
     test_an_image_that_meets_itself_leaves_the_gradient_a_number),
    ("noise.detach() - step", "noise.detach() + step",
     test_narcissus_keeps_labels_and_is_magnified_at_test_time),
    ("- step).clamp(-epsilon, epsilon)", "- step) * 3",
     test_narcissus_keeps_labels_and_is_magnified_at_test_time),
    ("replace(self, strength=1.0)", "self",
     test_narcissus_keeps_labels_and_is_magnified_at_test_time),
    ("poison_dataset(train, faint, config)",
     "poison_dataset(train, faint, replace(config, label_mode='dirty'))",
     test_narcissus_keeps_labels_and_is_magnified_at_test_time),
    ("replace(record, trigger=self)", "record",
     test_narcissus_keeps_labels_and_is_magnified_at_test_time),
]


@pytest.mark.parametrize("old, new, test", MUTANTS, ids=[new for _, new, _ in MUTANTS])
def test_a_mutant_is_caught(old, new, test, task, aware, monkeypatch):
    source = inspect.getsource(attacks)
    assert source.count(old) == 1
    mutant = ModuleType("bdutils.attacks.mutant")
    mutant.__package__ = "bdutils.attacks"
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    for name in attacks.__all__:
        if name in globals():
            monkeypatch.setitem(globals(), name, getattr(mutant, name))
    needs = {name: {"task": task, "aware": aware}[name]
             for name in inspect.signature(test).parameters}
    with nullcontext() if old == new else pytest.raises(AssertionError):
        test(**needs)


# ------------------------------------------------------ triggers, properties

@pytest.mark.parametrize("trigger", SIMPLE, ids=lambda t: t.name)
@given(seed=st.integers(1, 1000), channels=st.sampled_from([1, 3]))
def test_a_triggered_image_is_an_image(trigger, seed, channels):
    rng = torch.Generator().manual_seed(seed)  # 0 is the blend's own noise
    x = torch.rand(3, channels, 16, 16, generator=rng)
    y = trigger.paint(x)
    assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all()
    assert torch.allclose(trigger.paint(x[1:2]), y[1:2], atol=1e-6)  # alone as in company
    output = trigger.apply(Images(stored(x)), seeded(0))
    assert output.pixels.dtype == torch.uint8 and output.pixels.shape == x.shape


@pytest.mark.parametrize("trigger", SIMPLE, ids=lambda t: t.name)
def test_without_strength_there_is_no_trigger(trigger, task):
    x = floats(task.test.inputs.pixels)
    none = replace(trigger, strength=0.0)
    assert torch.allclose(none.paint(x), x, atol=1e-5)
    assert torch.equal(stored(none.paint(x)), task.test.inputs.pixels)
    with pytest.raises(ValueError, match="leaves .* inputs unchanged: make it stronger"):
        none.apply(task.test.inputs, seeded(0))


def test_without_strength_learned_triggers_vanish_too(aware, task):
    x = floats(task.test.inputs.pixels)
    assert torch.equal(stored(replace(aware, strength=0.0).paint(x)), task.test.inputs.pixels)
    assert torch.equal(add_corners(x, 0.0), x)


def test_learned_triggers_belong_to_their_image(aware, task):
    x = floats(task.test.inputs.pixels)
    own, other = aware.paint(x), aware.paint(x, x.roll(1, 0))
    assert not torch.equal(own, other) and own.min() >= 0 and own.max() <= 1
    where = pattern_and_mask(aware.nets, x)[1]
    assert where.mean() < 0.1  # the limit was .032
    assert not any(p.requires_grad for p in aware.nets.parameters())


# ------------------------------------------------------------------ poisoning

@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_poisoning_images_keeps_the_books(name, task):
    trigger = IMAGE_TRIGGERS[name]
    poisoned, record = trigger.poison(task.train, PoisonConfig(poison_rate=0.1, target_label=0))
    hit = torch.tensor(record.poisoned)
    changed = (poisoned.inputs.pixels != task.train.inputs.pixels).flatten(1).any(1)
    moved = torch.tensor(poisoned.labels) != torch.tensor(task.train.labels)
    assert hit.sum() == 20 and torch.equal(moved, hit)
    assert torch.equal(poisoned.inputs.pixels[hit],
                       trigger.apply(Images(task.train.inputs.pixels[hit]), seeded(0)).pixels)
    # Further rows change in a kind with cross samples only, and keep their labels.
    assert (changed & ~hit).sum() == (20 if name == "wanet" else 0)
    assert record.sources is task.train.inputs


def test_cross_samples_get_another_trigger(aware, task):
    poisoned, record = aware.poison(task.train, PoisonConfig(poison_rate=0.1, target_label=0))
    changed = (poisoned.inputs.pixels != task.train.inputs.pixels).flatten(1).any(1)
    cross = changed & ~torch.tensor(record.poisoned)
    assert 15 <= cross.sum() <= 20
    own = aware.apply(Images(task.train.inputs.pixels[cross]), seeded(0)).pixels
    assert (own != poisoned.inputs.pixels[cross]).flatten(1).any(1).double().mean() > 0.8


def test_clean_label_poison_is_hard_and_triggered(task, cache):
    config = ImageTrainConfig(epochs=1, flip=False)
    trigger = LabelConsistent(learning=config).prepare(task.train, 0)
    poisoned, record = trigger.poison(task.train, PoisonConfig(
        poison_rate=0.2, target_label=0, label_mode="clean"))
    hit = torch.tensor(record.poisoned)
    assert poisoned.labels == task.train.labels and hit.sum() == 40
    plain = trigger.apply(Images(task.train.inputs.pixels[hit]), seeded(0)).pixels.int()
    gap = (poisoned.inputs.pixels[hit].int() - plain).abs()
    assert 0 < gap.max() <= 17  # 16 levels, and rounding
    assert gap[:, :, :3, :3].max() == 0  # corners lie on top
    dirty, _ = trigger.poison(task.train, PoisonConfig(poison_rate=0.1, target_label=0))
    moved = torch.tensor(dirty.labels) != torch.tensor(task.train.labels)
    assert torch.equal(dirty.inputs.pixels[moved],
                       trigger.apply(Images(task.train.inputs.pixels[moved]), seeded(0)).pixels)


def test_triggered_images_leave_the_target_class_out(task):
    output = triggered(task.test, BadNetsPatch(), 0)
    assert isinstance(output, TestSet) and set(output.labels) == {1} and len(output) == 30
    assert len(triggered(task.test, BadNetsPatch(), 0, every_class=True)) == 60


def test_poisoning_is_quick(task):
    """Sixty thousand images in under two seconds: no loop over images."""
    import time

    pixels = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8)
    big = TrainSet(Images(pixels), (1,) * 60_000, ("a", "b"))
    for trigger in (BadNetsPatch(), SIG()):
        start = time.process_time()
        _, record = trigger.poison(big, PoisonConfig(poison_rate=1.0, target_label=0))
        assert sum(record.poisoned) == 60_000
        assert time.process_time() - start < 10  # two on an idle machine; CI shares its cores


# -------------------------------------------------------------------- victims

def test_an_image_victim_goes_the_usual_way(task, cache, monkeypatch):
    config = ImageTrainConfig(epochs=6, batch_size=32, flip=False)
    large = BadNetsPatch(size=6)
    attacked = victim(task, large, training=config, poison_rate=0.3, target_label=0)
    clean = victim(task, None, training=config)
    scores = evaluate(attacked.classifier, task, large, 0, clean.classifier, every_class=True)
    assert scores.asr.value > 0.9 > 0.2 > scores.floor.value and scores.cacc.value > 0.9
    monkeypatch.setattr("bdutils.evaluation.train", None)  # the second time nothing is trained
    again = victim(task, large, training=config, poison_rate=0.3, target_label=0)
    assert again.report == attacked.report and again.train.labels == attacked.train.labels


class Says:
    """Gives the target class to so many of a hundred triggered samples."""

    def __init__(self, hits):
        self.hits = hits

    def predict(self, images):
        return [0 if i % 100 < self.hits else 1 for i in range(len(images))]


def check_verdicts(task):
    """A trigger that fools a clean model is no evidence of a backdoor, and a warning says so."""
    seen = {}
    for asr, floor in ((100, 100), (95, 67), (95, 3), (4, 3)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            scores = evaluate(Says(asr), task, "badnets", 0, Says(floor))
        seen[asr, floor] = scores.is_backdoor, [str(w.message) for w in found]
    assert {case: verdict for case, (verdict, _) in seen.items()} == {
        (100, 100): False, (95, 67): False, (95, 3): True, (4, 3): False}
    said = {case: " ".join(found) for case, (_, found) in seen.items()}
    assert "the trigger 'badnets' fools a model that was never poisoned on 100%" in said[100, 100]
    assert "is no evidence of a backdoor" in said[95, 67]
    # A repaired model is no reason to warn: its trigger is sound.
    assert not said[95, 3] and not said[4, 3]
    assert evaluate(Says(100), task, "badnets", 0).is_backdoor is None


@pytest.mark.parametrize("wrong", [{}, {"HIGH_FLOOR": 1.0}, {"HIGH_FLOOR": 0.0},
                                   {"shows_backdoor": lambda asr, floor: asr > 0.5},
                                   {"shows_backdoor": lambda asr, floor: floor < 0.5}])
def test_a_high_floor_is_no_backdoor(wrong, monkeypatch):
    task = Task("many", made(TrainSet, 20), made(CleanSet, 20, 1), made(TestSet, 200, 2), "here")
    for name, other in wrong.items():
        monkeypatch.setattr(evaluation, name, other)
    with pytest.raises(AssertionError) if wrong else nullcontext():
        check_verdicts(task)


def test_a_record_says_whether_it_shows_a_backdoor():
    def run(**rates):
        return {"metrics": {name: vars(wilson(hits, 100)) for name, hits in rates.items()}}

    assert results.is_backdoor(run(asr=90, floor=5))
    assert results.is_backdoor(run(asr=4, asr_before=90, floor=5))  # before the defense
    assert results.is_backdoor(run(asr=100, floor=100)) is False
    assert results.is_backdoor(run(asr=8, floor=5)) is False
    assert results.is_backdoor(run(cacc=90)) is None
    known = [run for study in ("images", "attacks") for run in results.load(study)
             if run["method"] != "clean"]
    assert all(map(results.is_backdoor, known))


def test_a_learned_trigger_is_learned_once(task, cache, monkeypatch):
    trigger = InputAware(learning=GeneratorConfig(epochs=1))
    first = trigger.prepare(task.train, 0)
    monkeypatch.setattr("bdutils.assets._build", None)
    again = trigger.prepare(task.train, 0)
    x = floats(task.test.inputs.pixels)
    assert torch.equal(first.paint(x), again.paint(x))
    assert again.prepare(task.train, 0) is again


def test_a_trigger_of_the_other_kind_is_rejected(task, toy_task):
    with pytest.raises(ValueError, match="unknown attack 'addsent' on images: use one of"):
        victim(task, "addsent")
    with pytest.raises(ValueError, match="BadNetsPatch is no trigger for texts: give an obj"):
        victim(toy_task, BadNetsPatch())


class Half(ImageTrigger):
    name = "half"

    def paint(self, x):
        return x[:, :, :4]


class Array(ImageTrigger):
    name = "array"

    def paint(self, x):
        return x.numpy()


class TakesTooMuch(ImageTrigger):
    name = "too much"

    def paint(self, x, strength):
        return x


class Bare:
    name = "bare"

    def paint(self, x):
        return x


@pytest.mark.parametrize("trigger, message", [
    (Half(), r"trigger 'half' fails on images of shape \(200, 1, 28, 28\) .*\(200, 1, 4, 28\)"),
    (Array(), r"'array' fails .*: let `paint\(self, x\)` return a tensor of the same shape"),
    (TakesTooMuch(), "TypeError: TakesTooMuch.paint.* missing 1 required"),
    (Bare(), "Bare is no trigger for images: give an object of a class below ImageTrigger"),
    (BadNetsPatch, "is a class: give an object"), (BadNets(), "BadNets is no trigger for im"),
    (lambda x: x, "is no trigger for images"), ("synbkd", "unknown attack 'synbkd' on images")])
def test_a_readers_own_trigger_is_checked(trigger, message, task):
    with pytest.raises(ValueError, match=message):
        trigger_for(trigger, task.train).poison(task.train, PoisonConfig(1.0, 0, "mixed"))


class Viewer(nn.Module):
    """A reader's own network, with attention and, if asked for, free weights."""

    def __init__(self, free):
        super().__init__()
        self.config = SimpleNamespace(num_labels=2, channels=1)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)
        if free:
            self.place = nn.Parameter(torch.ones(8))


def test_nothing_of_a_suspected_network_is_in_a_new_one():
    given = ImageClassifier(Viewer(free=False))
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    new = given.anew(0).model.state_dict()
    # Biases and norms start at fixed values.
    assert not any(torch.equal(before[name], new[name]) for name in new if new[name].dim() > 1)
    assert all(torch.equal(before[name], value)
               for name, value in given.model.state_dict().items())
    with pytest.raises(ValueError, match="weights place cannot be drawn anew"):
        ImageClassifier(Viewer(free=True)).anew(0)


def test_a_network_of_ones_own_is_not_half_saved(tmp_path):
    with pytest.raises(ValueError, match="only the book's networks"):
        ImageClassifier(Viewer(free=False)).save(tmp_path)
    assert not list(tmp_path.iterdir())
