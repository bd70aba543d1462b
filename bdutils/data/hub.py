"""Data sets of the Hugging Face hub: configurations, names of classes, and what fails there."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..assets import CacheError, disk_trouble
from ..samples import DataError
from .normalize import Raw
from .pixels import flattened, opened, stacked

COLUMNS = {"text": ("text", "image", "img")}  # what `text` means where it was not given


class HubError(ConnectionError):
    """The hub does not give a data set; the message ends with the remedy."""


def load(hub_id: str, config: str | None = None, remedy: str = "") -> Mapping[str, object]:
    """Return the tables of a data set, by split.

    Args:
        hub_id: Such as `ORG/NAME`, or a folder that `datasets` can read.
        config: Of its configurations, None for the only one.
        remedy: What else to do without the hub.

    Raises:
        DataError: For a configuration that is missing or unknown.
        CacheError: If the disk does not take it.
        HubError: If it is not to be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError

    try:
        return load_dataset(hub_id, config)
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        raise _translated(error, hub_id, remedy) from error


def _translated(error: Exception, hub_id: str, remedy: str) -> Exception:
    said = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if isinstance(error, ValueError) and "onfig" in str(error):
        choices = " ".join(str(error).split())
        return DataError(f"{hub_id}: {choices[:400]}",
                         f"name a configuration, such as hub:{hub_id}:CONFIG")
    trouble = disk_trouble(error)
    if trouble:
        folder = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        return CacheError(f"the hub's folder {folder} {trouble}: set HF_HOME to a folder that "
                          "can be written and has room")
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
    first = (f"unset {' and '.join(offline)}, which keeps from the network" if offline
             else "check the network and the name")
    return HubError(f"the data set {hub_id} could not be loaded from the hub ({said}): {first}"
                    + (f", or {remedy}" if remedy else ""))


def read_hub(hub_id: str, config: str | None, columns: tuple[str, str],
             names: tuple[str, ...] | None = None, remedy: str = "",
             size: int | tuple[int, int] | None = None) -> Raw:
    """Return the samples of a data set, texts or images.

    Args:
        hub_id, config: As for `load`.
        columns: Of the texts or images, and of the labels. Where there is no column `text`, one
            called `image` or `img` is taken for it.
        names: Of the classes; those of the data set if None.
        remedy: As for `load`.
        size: Of images, see `pixels.stacked`.

    Raises:
        DataError: For a missing column, and as `load` does.
        CacheError: As `load` does.
        HubError: As `load` does.
    """
    samples, labels, splits = [], [], []
    kind = None
    for part, table in load(hub_id, config, remedy).items():
        text, label = _found(table, columns, hub_id)
        kind = table.features[label]
        pictured = type(table.features[text]).__name__ == "Image"
        cells = table.with_format("arrow")[:][text].to_pylist() if pictured else table[text]
        samples += [_opened(cell, f"{hub_id}, {part}, row {i}") for i, cell in enumerate(cells)
                    ] if pictured else list(cells)
        labels += list(table[label])
        splits += [part] * len(table)
    names = names or (tuple(kind.names) if hasattr(kind, "names") else None)
    if samples and not isinstance(samples[0], str) and hasattr(samples[0], "mode"):
        pixels, notes = stacked(samples, None, size)
        return Raw(pixels, labels, _of_parts(splits), names, notes=notes)
    return Raw(samples, labels, _of_parts(splits), names)


def _of_parts(splits: list[str]) -> list[str]:
    """Take a data set of one part, whatever its name, as one that is not split."""
    return [""] * len(splits) if len(set(splits)) == 1 else splits


def _found(table: object, columns: tuple[str, str], hub_id: str) -> tuple[str, str]:
    there = table.column_names
    text = next((name for name in COLUMNS.get(columns[0], (columns[0],)) if name in there), None)
    for name, option, found in ((columns[0], "text", text), (columns[1], "label", columns[1])):
        if found not in there:
            raise DataError(f"{hub_id} has no column {name!r}: it has {there}",
                            "name yours with text=... and label=...", option)
    return text, columns[1]


def _opened(cell: dict | None, where: str) -> object:
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if data is None and path and os.path.isfile(path):
        with open(path, "rb") as file:
            data = file.read()
    if data is None:
        raise DataError(f"{where} has no image", "leave the row out")
    return flattened(opened(data, where), where)
