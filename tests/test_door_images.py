"""Whatever images people bring: folders, depths, palettes, sizes."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bdutils.data import hub, load_task, make_task
from bdutils.data.image import opened, stacked
from bdutils.data.known import known_texts
from bdutils.roles import Images
from bdutils.samples import DataError

SIZES = {"train": 40, "clean": 20, "test": 20}


def image(seed, size=(6, 5), colors=True):
    """Of width and height `size`."""
    shape = (*size[::-1], 3) if colors else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def folders(root, parts=("",), names=("cat", "dog"), count=40, suffix=".png", **kind):
    seeds = iter(range(10**6))
    for part in parts:
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image(next(seeds), **kind).save(root / part / name / f"{i}{suffix}")
    return root


def whole(task):
    report = task.report
    assert report.total(report.read) == report.total(report.kept) + report.total(report.dropped)
    return report


def test_a_folder_for_each_class(tmp_path):
    root = folders(tmp_path / "pets")
    task = load_task(str(root), sizes=SIZES)
    assert task.name == "pets" and task.train.label_names == ("cat", "dog")
    assert task.train.inputs.pixels.shape == (40, 3, 5, 6)
    assert task.train.labels.count(0) == 20 and whole(task).total(task.report.kept) == 80
    same = [load_task(root, sizes=SIZES), load_task(f"hub:{root}", sizes=SIZES),
            load_task("pets", folder=str(root), sizes=SIZES)]
    assert {other.fingerprint() for other in same} == {task.fingerprint()}
    pixels, label = task.test.inputs[0], task.test.labels[0]
    files = (root / task.test.label_names[label]).iterdir()
    assert any(np.array_equal(np.asarray(Image.open(f)), pixels.permute(1, 2, 0)) for f in files)


def test_folders_of_splits_are_honored(tmp_path):
    root = folders(tmp_path, ("Train", "valid", "test"), count=20, suffix=".PNG")
    task = load_task(root, sizes=dict.fromkeys(SIZES))
    assert [len(role) for role in (task.train, task.clean, task.test)] == [40, 40, 40]
    folders(tmp_path, ("extra",), count=1)
    with pytest.raises(DataError, match="beside folders called extra: put each class below"):
        load_task(root)
    task = load_task(root, sizes=dict.fromkeys(SIZES), splits={"extra": "drop"})
    assert sum(whole(task).dropped["split left out"].values()) == 2


def test_numbers_in_names_of_folders_are_sorted_as_numbers(tmp_path):
    names = [f"sign {k}" for k in (1, 2, 10, 11)]
    task = load_task(folders(tmp_path, names=names, count=20), sizes=SIZES)
    assert list(task.train.label_names) == names


def test_what_is_no_image(tmp_path):
    root = folders(tmp_path / "a")
    (root / "cat" / "notes.txt").write_text("mine")
    (root / "cat" / ".DS_Store").write_text("x")
    (root / "cat" / "deeper").mkdir()
    image(999, size=(9, 9)).save(root / "cat/deeper/last.bmp")
    image(0).save(root / "loose.png")
    task = load_task(root, sizes=SIZES)
    notes = " ".join(task.report.notes)
    assert "1 files are no images" in notes and "notes.txt" in notes
    assert "1 images lie in no folder of a class" in notes
    assert "1 images were brought to 5 x 6 pixels" in notes and task.report.read[""]["cat"] == 41
    (root / "dog/cut.jpg").write_bytes((root / "dog/0.png").read_bytes()[:80])
    with pytest.raises(DataError, match="dog/cut.jpg is no image that can be read"):
        load_task(root)
    (root / "dog/cut.jpg").write_text("no image")
    with pytest.raises(DataError, match="dog/cut.jpg is no image .* of no form that is known"):
        load_task(root)
    (root / "dog/cut.jpg").unlink()
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no image of the class empty"):
        load_task(root)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="holds no folders of images: make a folder for each"):
        load_task(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no file .*cifar10_train.parquet: for images of"):
        load_task("cifar10", folder=str(root))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_task("pets", folder=tmp_path / "nowhere")


def test_sizes(tmp_path):
    root = folders(tmp_path, size=(7, 13))
    assert load_task(root, sizes=SIZES).test.inputs.pixels.shape[1:] == (3, 13, 7)
    assert load_task(root, sizes=SIZES, size=9).test.inputs.pixels.shape[1:] == (3, 9, 9)
    assert load_task(root, sizes=SIZES, size=(4, 8)).test.inputs.pixels.shape[1:] == (3, 4, 8)
    for size in (0, -3, (4,), "big", (1.5, 2), True):
        with pytest.raises(DataError, match="is no size: use one number"):
            load_task(root, size=size)


GRAY = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
RGB = np.dstack([GRAY, GRAY[::-1], 255 - GRAY])


def saved(made, form):
    file = io.BytesIO()
    made.save(file, form)
    return opened(file.getvalue(), "it")


@pytest.mark.parametrize(("make", "form"), [
    (lambda a: Image.fromarray(a), "png"), (lambda a: Image.fromarray(a), "bmp"),
    (lambda a: Image.fromarray(a.astype(np.uint16) * 257), "png"),
    (lambda a: Image.fromarray(a.astype(np.uint16) * 257), "tiff"),
    (lambda a: Image.fromarray(a.astype(np.int32) * 257), "tiff"),
    (lambda a: Image.merge("LA", (Image.fromarray(a), Image.new("L", a.shape[::-1], 255))), "png"),
    (lambda a: Image.fromarray(a).convert("P"), "png")])
def test_gray_images_of_any_depth(make, form):
    assert np.array_equal(np.asarray(saved(make(GRAY), form).convert("L")), GRAY)


def test_depth_and_transparency():
    clear = Image.fromarray(np.dstack([RGB, np.zeros_like(GRAY)]))
    assert np.asarray(saved(clear, "png")).min() == 255  # what is transparent is white
    solid = Image.fromarray(np.dstack([RGB, np.full_like(GRAY, 255)]))
    assert np.array_equal(np.asarray(saved(solid, "png")), RGB)
    ones = Image.fromarray(GRAY > 127)
    assert np.array_equal(np.asarray(saved(ones, "png")), (GRAY > 127) * 255)
    assert saved(Image.fromarray(RGB).convert("CMYK"), "tiff").mode == "RGB"
    palette = Image.fromarray(GRAY).convert("P")
    palette.info["transparency"] = 0
    assert saved(palette, "png").mode == "RGB"
    with pytest.raises(DataError, match="it has 32 bits a pixel: save it with 8 or 16"):
        saved(Image.fromarray(GRAY.astype(np.float32)), "tiff")
    with pytest.raises(DataError, match="values outside 0 to 65535"):
        saved(Image.fromarray(GRAY.astype(np.int32) - 200), "tiff")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1,
                max_size=12))
def test_images_of_any_size_become_one_array(sizes):
    images = [image(i, (width, height), colors)
              for i, (width, height, colors) in enumerate(sizes)]
    made, notes = stacked(images)
    assert len(made) == len(sizes)
    assert made.pixels.shape[1] == (3 if any(colors for *_, colors in sizes) else 1)
    same = sum((w, h) == tuple(made.pixels.shape[:1:-1]) for w, h, _ in sizes)
    assert bool(notes) == (same < len(sizes)) and same >= 1


@pytest.mark.parametrize("make", [
    lambda a: a, lambda a: torch.from_numpy(a), lambda a: torch.from_numpy(a).permute(0, 3, 1, 2),
    lambda a: Images(torch.from_numpy(a).permute(0, 3, 1, 2)),
    lambda a: [Image.fromarray(x) for x in a]])
def test_images_that_are_in_python_already(make):
    pixels = np.random.default_rng(1).integers(0, 256, (100, 7, 4, 3), dtype=np.uint8)
    pixels[50] = pixels[49]
    with pytest.warns(UserWarning, match="1 samples repeat"):
        task = make_task(make(pixels), ["left", "right"] * 50, sizes=SIZES)
    assert sum(whole(task).dropped["repeated, with another label"].values()) == 1
    assert task.train.inputs.pixels.shape == (40, 3, 7, 4)
    kept = {p.permute(1, 2, 0).numpy().tobytes() for p in task.train.inputs}
    assert kept <= {p.tobytes() for p in pixels}


def test_arrays_that_are_no_images():
    for array in (np.zeros((4, 5, 5)), np.zeros((4, 5, 5, 2), np.uint8), torch.zeros(4, 3, 5, 5)):
        with pytest.raises(DataError, match="images "):
            make_task(array, [0, 1, 0, 1])


# ------------------------------------------------------------------------- the hub

class Parts(dict):
    """What `load_dataset` returns."""


def offered(monkeypatch, parts, **features):
    from datasets import Dataset, Features

    made = Parts({part: Dataset.from_dict(columns, features=Features(**features))
                  for part, columns in parts.items()})
    asked = []

    def load_dataset(*given):
        asked.append(given)
        return made

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_configuration_and_the_names_of_classes(monkeypatch):
    from datasets import ClassLabel, Value

    samples = {"text": [f"sample {i}" for i in range(200)], "label": [0, 1] * 100}
    more = {"text": [f"new {i}" for i in range(60)], "label": [0, 1] * 30}
    asked = offered(monkeypatch, {"train": samples, "validation": more}, text=Value("string"),
                    label=ClassLabel(names=["no", "yes"]))
    task = load_task("hub:some/set:small", sizes={**SIZES, "clean": 60})
    assert asked == [("some/set", "small")] and task.train.label_names == ("no", "yes")
    assert {text.split()[0] for text in task.clean.inputs} == {"new"}
    with pytest.raises(DataError, match="no column 'review': it has .'text', 'label'"):
        load_task("hub:some/set", text="review")
    offered(monkeypatch, {"train": samples, "test": {**more, "label": [-1] * 60}},
            text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    with pytest.raises(DataError, match="60 of 260 samples are unlabeled"):
        load_task("hub:some/set")
    task = load_task("hub:some/set", sizes=SIZES, unlabeled="drop")
    assert any("no split 'test'" in note for note in whole(task).notes)


def test_images_of_the_hub(monkeypatch):
    import datasets

    samples = {"img": [image(seed) for seed in range(90)], "label": [0, 1, 2] * 30}
    offered(monkeypatch, {"train": samples}, img=datasets.Image(),
            label=datasets.ClassLabel(names=["a", "b", "c"]))
    task = load_task("hub:some/images", sizes=SIZES)
    assert task.train.label_names == ("a", "b", "c")
    assert task.train.inputs.pixels.shape == (40, 3, 5, 6)
    samples["img"][7] = None
    offered(monkeypatch, {"train": samples}, img=datasets.Image(), label=datasets.Value("int64"))
    with pytest.raises(DataError, match="some/images, train, sample 7 has no image: leave"):
        load_task("hub:some/images")


@pytest.mark.parametrize(("error", "message"), [
    (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"),
     r"pick one among \['a', 'b'\]: name a configuration, such as hub:some/set:CONFIG"),
    (OSError(28, "No space left on device"), "hub's folder .* full or read-only .*set HF_HOME"),
    (FileNotFoundError("Dataset 'some/set' doesn't exist"),
     "could not be loaded from the hub .*doesn't exist.*: check the network and the name, or"),
    (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported")])
def test_what_fails_at_the_hub(monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises((ValueError, ConnectionError, RuntimeError), match=message) as seen:
        load_task("hub:some/set")
    assert seen.value.__cause__ is error
    monkeypatch.setattr("datasets.load_dataset", lambda *_: 1 / 0)  # a mistake stays one
    with pytest.raises(ZeroDivisionError):
        hub.load("some/set")


def test_offline_is_named_where_it_is_the_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="unset HF_HUB_OFFLINE, .*save it as a file"):
        load_task("hub:some/set")
    with pytest.raises(ConnectionError, match="unset HF_HUB_OFFLINE, .* BDUTILS_SCALE=small"):
        known_texts("sst2")
