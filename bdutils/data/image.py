"""Images: Fashion-MNIST from a package, others from files or the hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..assets import AssetError, asset
from ..roles import Pictures, ReservedSet, Task, TestSet, TrainingSet, evenly

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
# Of all labeled pictures, in any order; for a copy from elsewhere.
FASHION_SHA256 = {
    "train": "93071dfa20f584eeeb705e850e092f48bbd385813f9db74a038c5bef758ab84d",
    "test": "244f956bd7c1f23476f702e61da7933f0498a89ce3f2165d7395191f2e9eaadd",
}
HUB = {  # hub id, columns of picture and label, names of the classes, pixels a side, mode
    "fashion": ("zalando-datasets/fashion_mnist", "image", "label", FASHION, 28, "L"),
    "cifar10": ("uoft-cs/cifar10", "img", "label", CIFAR10, 32, "RGB"),
    "gtsrb": ("tanganke/gtsrb", "image", "label", tuple(f"sign {k}" for k in range(43)), 32,
              "RGB"),
}


def load_pictures(name: str, sizes: dict[str, int | None], seed: int = 0,
                  folder: Path | None = None) -> Task:
    """Load a set of pictures and split it into the three roles.

    Args:
        name: `fashion`, `cifar10` or `gtsrb`.
        sizes: Rows per role, None for all there are.
        seed: Of the split.
        folder: With NAME_train.parquet and NAME_test.parquet, instead of the hub.

    Returns:
        A task whose roles share no picture; the test role is of the published test part.

    Raises:
        ValueError: If the set is too small.
        AssetError: Without a network.
        ConnectionError: Without a network.
    """
    if name == "fashion" and not folder:
        parts, names, origin = _fashion(), FASHION, "Fashion-MNIST"
    else:
        parts, names = _columns(name, folder)
        origin = f"files: {folder.name}" if folder else f"hub: {HUB[name][0]}"
    rng, used, made = random.Random(seed), set(), {}
    # The test part goes first, since a published test set must keep its rows.
    for role, kind, part in (("test", TestSet, "test"), ("reserved", ReservedSet, "train"),
                             ("train", TrainingSet, "train")):
        pixels, labels = parts[part]
        rows = _fresh(pixels, rng.sample(range(len(pixels)), len(pixels)), used)
        size = sizes[role]
        if size and len(rows) < size:
            raise ValueError(f"{name} leaves only {len(rows)} pictures for the role {role!r}, but "
                             f"{size} are asked for: give smaller sizes=...")
        rows = evenly(rows, labels, size, len(names)) if size else rows
        used.update(_digest(pixels[row]) for row in rows)
        made[role] = kind(Pictures(pixels[rows]), tuple(labels[row] for row in rows), names)
    return Task(name=name, source=origin, **made)


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()


def _of_all(pixels: Tensor, labels: list[int]) -> str:
    """Return a checksum of labeled pictures in any order."""
    each = sorted(_digest(picture) + bytes([y]) for picture, y in zip(pixels, labels, strict=True))
    return hashlib.sha256(b"".join(each)).hexdigest()


def _fresh(pixels: Tensor, rows: Sequence[int], used: set[bytes]) -> list[int]:
    """Leave out pictures that another role has, or that come twice."""
    seen, kept = set(used), []
    for row in rows:
        digest = _digest(pixels[row])
        if digest not in seen:
            seen.add(digest)
            kept.append(row)
    return kept


def _fashion() -> dict[str, tuple[Tensor, list[int]]]:
    try:
        folder, parts = asset("fashion_mnist"), {}
    except AssetError as error:  # no apt-get here: the hub has the same pictures
        try:
            parts = _columns("fashion", None)[0]
        except ConnectionError as second:
            raise second from error
        if any(_of_all(*parts[part]) != digest for part, digest in FASHION_SHA256.items()):
            raise AssetError("the hub's Fashion-MNIST is not the set that we know") from error
        return parts
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = (gzip.decompress((folder / f"{prefix}-{kind}.gz").read_bytes())
                          for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        # Both files start with a few whole numbers that say what we know already.
        array = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        parts[part] = torch.from_numpy(array.copy()), list(labels[8:])
    return parts


def _columns(name: str, folder: Path | None) -> tuple[dict, tuple[str, ...]]:
    from datasets import load_dataset
    from PIL import Image

    hub_id, column, label, names, side, mode = HUB[name]
    try:
        tables = load_dataset("parquet", data_files={
            part: str(folder / f"{name}_{part}.parquet") for part in ("train", "test")}
        ) if folder else load_dataset(hub_id)
    except Exception as error:  # the hub's clients raise many kinds
        raise ConnectionError(f"the pictures {hub_id} could not be loaded from the hub "
                              f"({type(error).__name__}): check the network, or stay at "
                              "BDUTILS_SCALE=small, which needs no hub") from error
    parts = {}
    for part in ("train", "test"):
        pictures = []
        for cell in tables[part].with_format("arrow")[:][column].to_pylist():
            picture = Image.open(io.BytesIO(cell["bytes"])).convert(mode)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(picture))
        array = torch.from_numpy(np.stack(pictures))
        pixels = (array[..., None] if array.dim() == 3 else array).permute(0, 3, 1, 2).contiguous()
        parts[part] = pixels, list(tables[part][label])
    return parts, names
