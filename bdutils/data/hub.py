"""Data sets of the Hugging Face hub: configurations, names of classes, and what fails there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..assets import CacheError, disk_trouble
from ..samples import DataError
from .image import Size, opened, stacked
from .labels import Raw

COLUMNS = {"text": ("text", "image", "img")}  # what `text` means where it was not given


class HubError(ConnectionError):
    """The hub does not give a data set; the message ends with the remedy."""


def load(hub_id: str, config: str | None = None, remedy: str = "") -> Mapping[str, Any]:
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
    if trouble := disk_trouble(error):
        folder = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        return CacheError(f"the hub's folder {folder} {trouble}: set HF_HOME to a folder that "
                          "can be written and has room")
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
    first = (f"unset {' and '.join(offline)}, which keeps from the network" if offline
             else "check the network and the name")
    return HubError(f"the data set {hub_id} could not be loaded from the hub ({said}): {first}"
                    + (f", or {remedy}" if remedy else ""))


def read_hub(hub_id: str, config: str | None, columns: tuple[str, str],
             names: tuple[str, ...] | None = None, remedy: str = "", *, size: Size = None,
             mode: str | None = None, parts: Sequence[str] | None = None) -> Raw:
    """Return the samples of a data set, texts or images.

    Args:
        hub_id, config: As for `load`.
        columns: Of the texts or images, and of the labels. Where there is no column `text`, one
            called `image` or `img` is taken for it.
        names: Of the classes; those of the data set if None.
        remedy: As for `load`.
        size, mode: Of images, see `image.stacked`.
        parts: Splits to read, all if None.

    Raises:
        DataError: For a missing column, and as `load` does.
        CacheError: As `load` does.
        HubError: As `load` does.
    """
    samples, labels, splits = [], [], []
    are_images, own_names = False, None
    for part, table in load(hub_id, config, remedy).items():
        if parts and part not in parts:
            continue
        column, label = _found(table, columns, hub_id)
        own_names = getattr(table.features[label], "names", None)
        are_images = type(table.features[column]).__name__ == "Image"
        if are_images:
            cells = table.with_format("arrow")[:][column].to_pylist()
            samples += [of_cell(x, f"{hub_id}, {part}, sample {i}") for i, x in enumerate(cells)]
        else:
            samples += list(table[column])
        labels += list(table[label])
        splits += [part] * len(table)
    if len(set(splits)) == 1:  # one part, whatever its name, is no split
        splits = [""] * len(splits)
    names = names or (tuple(own_names) if own_names else None)
    inputs, notes = stacked(samples, size, mode) if are_images else (samples, ())
    return Raw(inputs, labels, splits, names, notes=notes)


def _found(table: Any, columns: tuple[str, str], hub_id: str) -> tuple[str, str]:
    there = table.column_names
    text = next((name for name in COLUMNS.get(columns[0], (columns[0],)) if name in there), "")
    for name, option, found in ((columns[0], "text", text), (columns[1], "label", columns[1])):
        if found not in there:
            raise DataError(f"{hub_id} has no column {name!r}: it has {there}",
                            "name yours with text=... and label=...", option)
    return text, columns[1]


def of_cell(cell: Any, where: str) -> Any:
    """Return the image in a cell of a table, which holds a file's bytes or its path."""
    cell = cell if isinstance(cell, dict) else {}
    data, path = cell.get("bytes"), cell.get("path")
    if data is None and path and os.path.isfile(path):
        data = Path(path).read_bytes()
    if not isinstance(data, bytes):
        raise DataError(f"{where} has no image", "leave the sample out, or write it as an object "
                        "whose field `bytes` is a file")
    return opened(data, where)
