"""Images: Fashion-MNIST from a package, others from files or the hub."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..assets import AssetError, CacheError, asset, cache_dir
from ..roles import Pictures, ReservedSet, Task, TestSet, TrainingSet, evenly
from ..samples import DataError, LoadReport
from .hub import HubError, load
from .normalize import classes
from .pixels import flattened, opened, stacked
from .tables import read_table

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
# Of all labeled pictures, in any order; for a copy from elsewhere.
FASHION_SHA256 = {
    "train": "93071dfa20f584eeeb705e850e092f48bbd385813f9db74a038c5bef758ab84d",
    "test": "244f956bd7c1f23476f702e61da7933f0498a89ce3f2165d7395191f2e9eaadd",
}
ROLES = (("test", TestSet, "test"), ("reserved", ReservedSet, "train"),
         ("train", TrainingSet, "train"))
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
        FileNotFoundError: If the folder lacks the files.
        AssetError: Without a network.
        ConnectionError: Without a network.
    """
    if name == "fashion" and not folder:
        parts, names, origin = _fashion(), FASHION, "Fashion-MNIST"
    else:
        parts, names = _columns(name, folder)
        origin = f"files: {folder.name}" if folder else f"hub: {HUB[name][0]}"
    digests = {part: [_digest(image) for image in pixels] for part, (pixels, _) in parts.items()}
    rng, used, made = random.Random(seed), set(), {}
    chosen: dict[str, list[int]] = {}
    # The test part goes first, since a published test set must keep its images.
    for role, kind, part in ROLES:
        pixels, labels = parts[part]
        rows = _fresh(digests[part], rng.sample(range(len(pixels)), len(pixels)), used)
        size = sizes[role]
        if size and len(rows) < size:
            raise DataError(f"{name} leaves only {len(rows)} pictures for the role {role!r}, but "
                            f"{size} are asked for", "give smaller sizes=...", "sizes")
        rows = evenly(rows, labels, size, len(names)) if size else rows
        used.update(digests[part][row] for row in rows)
        chosen[role] = rows
        made[role] = kind(Pictures(pixels[rows]), tuple(labels[row] for row in rows), names)
    report = _account(parts, names, chosen, (digests, used))
    return Task(name=name, source=origin, **made, report=report)


def _account(parts: dict[str, tuple[Tensor, list[int]]], names: tuple[str, ...],
             chosen: dict[str, list[int]], seen: tuple[dict, set]) -> LoadReport:
    """Count all images by class."""
    digests, used = seen

    def by_class(labels: Sequence[int]) -> dict[str, int]:
        found = Counter(labels)
        return {name: found[k] for k, name in enumerate(names)}

    kept = {role: by_class([parts[part][1][i] for i in chosen[role]]) for role, _, part in ROLES}
    dropped: dict[str, list[int]] = {"repeated": [], "not asked for": []}
    for part, (_, labels) in parts.items():
        taken = {i for role, _, where in ROLES if where == part for i in chosen[role]}
        for i, label in enumerate(labels):
            if i not in taken:
                again = digests[part][i] in used
                dropped["repeated" if again else "not asked for"].append(label)
    return LoadReport({part: by_class(labels) for part, (_, labels) in parts.items()}, kept,
                      {reason: by_class(labels) for reason, labels in dropped.items() if labels})


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()


def _of_all(pixels: Tensor, labels: list[int]) -> str:
    """Return a checksum of labeled pictures in any order."""
    each = sorted(_digest(picture) + bytes([y]) for picture, y in zip(pixels, labels, strict=True))
    return hashlib.sha256(b"".join(each)).hexdigest()


def _fresh(digests: list[bytes], rows: Sequence[int], used: set[bytes]) -> list[int]:
    """Leave out images that another role has, or that come twice."""
    seen, kept = set(used), []
    for row in rows:
        if digests[row] not in seen:
            seen.add(digests[row])
            kept.append(row)
    return kept


def _fashion() -> dict[str, tuple[Tensor, list[int]]]:
    try:
        folder, parts = asset("fashion_mnist"), {}
    except CacheError:
        raise
    except AssetError as error:  # no apt-get here: the hub has the same images
        try:
            parts = _columns("fashion", None)[0]
        except HubError as second:
            place = cache_dir() / "assets/fashion_mnist"
            raise HubError(f"{error}; and {second}, or copy the folder {place} from a machine "
                           "that has it. Chapters on texts do not need it") from second
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
    hub_id, column, label, names, side, mode = HUB[name]
    tables = _files(name, folder, (column, label)) if folder else _from_hub(name)
    parts = {}
    for part, (cells, found) in tables.items():
        where = f"{name}, {part}"
        images = []
        for i, cell in enumerate(cells):
            here = f"{where}, row {i}"
            images.append(flattened(opened(cell["bytes"], here), here))
        labels, _ = classes(found, names, where=where)
        if None in labels:
            raise DataError(f"{where}: row {labels.index(None)} has no label", "leave it out")
        parts[part] = stacked(images, mode, side)[0].pixels, labels
    return parts, names


def _from_hub(name: str) -> dict[str, tuple[list, list]]:
    hub_id, column, label = HUB[name][:3]
    tables = load(hub_id, remedy="" if name == "fashion" else
                  "stay at BDUTILS_SCALE=small, whose images are others")
    return {part: (tables[part].with_format("arrow")[:][column].to_pylist(),
                   list(tables[part][label])) for part in ("train", "test")}


def _files(name: str, folder: Path, columns: tuple[str, str]) -> dict[str, tuple[list, list]]:
    paths = {part: folder / f"{name}_{part}.parquet" for part in ("train", "test")}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}: for images of your own, name "
                                f"their folder alone, as in load_task({str(folder)!r})")
    tables = {part: read_table(path, columns) for part, path in paths.items()}
    return {part: (_cells(table.column(columns[0], "text"), table.where),
                   table.column(columns[1], "label")) for part, table in tables.items()}


def _cells(cells: list, where: str) -> list[dict]:
    for row, cell in enumerate(cells):
        if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
            raise DataError(f"{where}: row {row} holds no image",
                            "write each as an object whose field `bytes` is a file")
    return cells
