"""The data sets that the book knows by name, from registries and the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..assets import AssetError, CacheError, asset, cache_dir, entry, sha256_of
from ..roles import Images, Task
from ..samples import DataError
from .deal import Settled, make_published, sample_key
from .hub import HubError, of_cell, read_hub
from .image import stacked
from .labels import Raw, classes
from .tables import read_table

TEXTS = {  # hub id, configuration, names of the classes; columns are `text` and `label`
    "sst2": ("SetFit/sst2", None, ("negative", "positive")),  # the 6,920/872/1,821 split
    "ag_news": ("fancyzhx/ag_news", None, ("world", "sports", "business", "sci/tech")),
    "olid": ("cardiffnlp/tweet_eval", "offensive", ("not offensive", "offensive")),
}
NEWSGROUPS = {
    "newsgroups": ("20 Newsgroups, four groups", ("comp", "rec", "sci", "talk")),
    # Ours: eight groups whose subjects are far apart.
    "newsgroups8": ("20 Newsgroups, eight single groups", (
        "comp.graphics", "rec.autos", "rec.sport.hockey", "sci.crypt", "sci.med", "sci.space",
        "soc.religion.christian", "talk.politics.mideast")),
}
MIN_RATING = 1.0  # mean of 20 raters on a scale from -4 to 4; ours: drop the undecided samples
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
IMAGES = {  # hub id, columns of image and label, names of the classes, pixels a side, mode
    "fashion": ("zalando-datasets/fashion_mnist", ("image", "label"), FASHION, 28, "L"),
    "cifar10": ("uoft-cs/cifar10", ("img", "label"), CIFAR10, 32, "RGB"),
    "gtsrb": ("tanganke/gtsrb", ("image", "label"), tuple(f"sign {k}" for k in range(43)), 32,
              "RGB"),
}
PARTS = ("train", "test")
# Of all labeled images, in any order; for a copy from elsewhere.
FASHION_SHA256 = {
    "train": "93071dfa20f584eeeb705e850e092f48bbd385813f9db74a038c5bef758ab84d",
    "test": "244f956bd7c1f23476f702e61da7933f0498a89ce3f2165d7395191f2e9eaadd",
}


def known_texts(name: str, folder: Path | None = None) -> tuple[Raw, str] | None:
    """Return a set of texts by the name that the book has for it, and where it came from.

    Args:
        name: `snippets`, `newsgroups`, `newsgroups8`, or one of `TEXTS`.
        folder: With NAME.parquet for one of `TEXTS`, instead of the hub.

    Returns:
        None for any other name.

    Raises:
        AssetError: Without a network.
        HubError: Without a network.
        FileNotFoundError: If the folder lacks the file.
    """
    if name in TEXTS:
        hub_id, config, names = TEXTS[name]
        if folder:
            raw = read_table(folder / f"{name}.parquet", ("text", "label")).raw("text", "label")
            return replace(raw, names=names), f"files: {folder.name}"
        return read_hub(hub_id, config, ("text", "label"), names,
                        "stay at BDUTILS_SCALE=small, which needs no hub"), f"hub: {hub_id}"
    if name == "snippets":
        return _snippets(), "VADER movie snippets"
    if name in NEWSGROUPS:
        origin, names = NEWSGROUPS[name]
        return _newsgroups(names), origin
    return None


def _snippets() -> Raw:
    """Return the VADER movie snippets whose raters are decided."""
    texts, labels = [], []
    path = asset("snippets") / "snippets.tsv"
    for line in path.read_text(encoding="utf8", errors="replace").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= MIN_RATING:
            texts.append(text.strip())
            labels.append(int(float(rating) > 0))
    return Raw(texts, labels, None, ("negative", "positive"))


def _newsgroups(names: tuple[str, ...]) -> Raw:
    """Return the posts of some newsgroups."""
    texts, labels, splits = [], [], []
    for part in PARTS:
        path = asset("newsgroups") / f"{part}.tab"
        for line in path.read_text(encoding="utf8").splitlines()[3:]:  # 3 header lines
            group, _, text = line.partition("\t")
            found = group if group in names else group.split(".")[0]
            if found in names and text.strip():
                # Posts are long and the encoder reads their first words only.
                texts.append(" ".join(text.split()[:60]))
                labels.append(names.index(found))
                splits.append(part)
    return Raw(texts, labels, splits, names)


def load_images(name: str, sizes: Mapping[str, int | None], seed: int = 0,
                folder: Path | None = None) -> Task:
    """Load a set of images and split it into the three roles.

    Args:
        name: One of `IMAGES`.
        sizes: Samples per role, None for all there are.
        seed: Of the split.
        folder: With NAME_train.parquet and NAME_test.parquet, instead of the hub.

    Returns:
        A task whose roles share no image; the test role is of the published test part.

    Raises:
        DataError: If the set is too small.
        FileNotFoundError: If the folder lacks the files.
        AssetError: Without a network.
        HubError: Without a network.
    """
    if folder:
        raw, origin = _from_files(name, folder), f"files: {folder.name}"
    elif name == "fashion":
        raw, origin = _fashion(), "Fashion-MNIST"
    else:
        raw, origin = _from_hub(name), f"hub: {IMAGES[name][0]}"
    labels, names = classes(raw.labels, raw.names, where=name)
    if None in labels:
        raise DataError(f"{name}: sample {labels.index(None)} has no label", "leave it out")
    settled = Settled(raw.inputs, labels, names, [str(part) for part in raw.splits or ()], name)
    return make_published(settled, name, sizes, seed, origin)


def _fashion() -> Raw:
    try:
        folder = asset("fashion_mnist")
    except CacheError:
        raise
    except AssetError as error:  # no apt-get here: the hub has the same images
        try:
            raw = _from_hub("fashion")
        except HubError as second:
            place = cache_dir() / "assets/fashion_mnist"
            raise HubError(f"{error}; and {second}, or copy the folder {place} from a machine "
                           "that has it. Chapters on texts do not need it") from second
        if any(_of_all(raw, part) != digest for part, digest in FASHION_SHA256.items()):
            raise AssetError("the hub's Fashion-MNIST is not the set that we know") from error
        return raw
    pixels, labels, splits = b"", b"", []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, numbers = (gzip.decompress((folder / f"{prefix}-{kind}.gz").read_bytes())
                           for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        # Both files start with a few whole numbers that say what we know already.
        pixels, labels = pixels + images[16:], labels + numbers[8:]
        splits += [part] * len(numbers[8:])
    array = np.frombuffer(bytearray(pixels), np.uint8).reshape(-1, 1, 28, 28)
    return Raw(Images(torch.from_numpy(array)), list(labels), splits, FASHION)


def _of_all(raw: Raw, part: str) -> str:
    """Return a checksum of a part's labeled images, in any order."""
    each = sorted(sample_key(image) + int(str(label)).to_bytes() for image, label, split in zip(
        raw.inputs, raw.labels, raw.splits or (), strict=True) if split == part)
    return hashlib.sha256(b"".join(each)).hexdigest()


def _from_hub(name: str) -> Raw:
    hub_id, columns, names, side, mode = IMAGES[name]
    remedy = ("" if name == "fashion" else
              "stay at BDUTILS_SCALE=small, whose images are others")
    return read_hub(hub_id, None, columns, names, remedy, size=side, mode=mode, parts=PARTS)


def _from_files(name: str, folder: Path) -> Raw:
    _, columns, names, side, mode = IMAGES[name]
    paths = {part: folder / f"{name}_{part}.parquet" for part in PARTS}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}: for images of your own, name "
                                f"their folder alone, as in load_task({str(folder)!r})")
    told = hashlib.sha256("".join(map(sha256_of, paths.values())).encode()).hexdigest()

    def decode(place: Path) -> None:
        images: list = []
        found: dict[str, list] = {"labels": [], "splits": []}
        for part, path in paths.items():
            raw = read_table(path, columns).raw(*columns)
            images += [of_cell(cell, f"{name}, {part}, sample {i}")
                       for i, cell in enumerate(raw.inputs)]
            found["labels"] += raw.labels
            found["splits"] += [part] * len(raw.labels)
        save_file({"pixels": stacked(images, side, mode)[0].pixels}, place / "images.safetensors")
        (place / "samples.json").write_text(json.dumps(found), encoding="utf8")

    # To decode takes many times as long as to read, and several processes want the same images.
    kept = entry(f"decoded/{name}-{told[:16]}", decode,
                 {"files": [path.name for path in paths.values()]})
    found = json.loads((kept / "samples.json").read_text(encoding="utf8"))
    return Raw(Images(load_file(kept / "images.safetensors")["pixels"]), found["labels"],
               found["splits"], names)
