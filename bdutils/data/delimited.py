"""Texts with separators: CSV and its relatives, read whole or refused with the line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from ..samples import DataError

LONGEST = 2**31 - 1  # characters of a cell; the module `csv` stops at 131,072 unless told


def read_delimited(text: str, where: str, asked: tuple[str, str], separators: str
                   ) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Read by the separator under which the first line has the columns that are asked for.

    Args:
        text: Of the whole file.
        where: Name of the file.
        asked: Names of two columns, the second that of the labels.
        separators: Characters that may separate cells, the usual one first.

    Returns:
        The columns, all empty if none has a name that is asked for; and what should be known.

    Raises:
        DataError: With the line that is wrong.
    """
    limit = csv.field_size_limit(LONGEST)
    try:
        lines = list(io.StringIO(text, newline=""))
        if told := re.fullmatch(r'"?sep=(.)"?\s*', lines[0]):  # how Excel names the separator
            lines[0], separators = "\n", told[1]
        return _read(lines, where, asked, separators)
    finally:
        csv.field_size_limit(limit)


def _read(lines: list[str], where: str, asked: tuple[str, str], separators: str
          ) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    heads = {mark: _head(lines, mark, where) for mark in separators}
    fits = [mark for mark, head in heads.items() if {*asked} <= {*head}]
    mark = fits[0] if fits else max(separators, key=lambda mark: len(heads[mark]))
    head = heads[mark]
    if twice := [name for name in asked if head.count(name) > 1]:
        raise DataError(f"{where} has two columns {twice[0]!r}", "rename one")
    if not fits:
        return {name: [] for name in head}, ()
    notes = () if mark == separators[0] else (f"the separator is {mark!r}",)
    try:
        found = _whole(lines, mark, where, head.index(asked[1]))
    except DataError:
        if mark != "\t":
            raise
        # Files with tabs often know no quotes; then each line is one sample.
        found = _unquoted(lines, len(head))
        if found is None:
            raise
        notes = (*notes, "quotes stand for themselves")
    columns = list(zip(*found, strict=True)) or [()] * len(head)
    return {name: list(cells) for name, cells in zip(head, columns, strict=True)}, notes


def _head(lines: list[str], mark: str, where: str) -> list[str]:
    try:
        return next(_records(lines, mark, where))[2]
    except (StopIteration, DataError):  # quotes that go wrong under another separator
        return []


def _records(lines: list[str], mark: str, where: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first line, last line and cells of each record; lines are counted from 1."""
    rows, start = csv.reader(lines, delimiter=mark, strict=True), 1
    try:
        for cells in rows:
            if cells:
                yield start, rows.line_num, cells
            start = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{where}: a quote in line {start} goes wrong ({error})",
                        "write a quote inside a quoted text twice, and quote a text that begins "
                        "with one") from error


def _whole(lines: list[str], mark: str, where: str, label: int) -> list[list[str]]:
    """Return all records, and see that no quote has swallowed lines."""
    records = list(_records(lines, mark, where))
    width = len(records[0][2])
    for start, _, cells in records:
        if len(cells) != width:
            raise DataError(f"{where}: line {start} has {len(cells)} cells, the first line "
                            f"{width}", f"quote a text that holds {mark!r}, a quote or a line "
                            "end")
    known = {cells[label] for start, stop, cells in records[1:] if start == stop}
    for start, stop, _ in records[1:]:
        inside = lines[start - 1:stop] if start < stop else []
        if any(_like_a_sample(line, mark, width, label, known) for line in inside):
            raise DataError(f"{where}: a quote that opens in line {start} takes in what look "
                            f"like other samples, up to line {stop}",
                            "write a quote inside a quoted text twice, and quote a text that "
                            "begins with one")
    return [cells for _, _, cells in records[1:]]


def _like_a_sample(line: str, mark: str, width: int, label: int, known: set[str]) -> bool:
    """Tell whether a line alone has as many cells as a sample, and a known label among them."""
    line = line.rstrip("\r\n")
    ways = [line.split(mark)]
    for text in (line, line.replace('""', '"')):
        ways += csv.reader([text], delimiter=mark)
    return any(len(cells) == width and cells[label].strip().strip('"') in known for cells in ways)


def _unquoted(lines: list[str], width: int) -> list[list[str]] | None:
    found = [line.rstrip("\r\n").split("\t") for line in lines if line.strip("\r\n")][1:]
    return found if all(len(cells) == width for cells in found) else None
