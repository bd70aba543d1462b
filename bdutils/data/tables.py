"""Files of samples: CSV and its relatives, JSON, JSON lines, parquet; packed by `gzip` or not.

A file is read whole or rejected with the line that is wrong: no line is skipped, no cell is taken
for missing because of what it says, and nothing is guessed that the file does not settle.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..samples import DataError, in_words
from .labels import Raw

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}
JSON = (".json", ".jsonl", ".ndjson")
KNOWN = (*SEPARATORS, *JSON, ".parquet")
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"))
LONGEST = 2**31 - 1  # characters of a cell; the module `csv` stops at 131,072 unless told
QUOTES = "write a quote inside a quoted text twice, and quote a text that begins with one"


@dataclass(frozen=True)
class Table:
    """Columns of a file."""

    where: str
    """Name of the file."""
    columns: dict[str, list]
    """Name -> (n,) cells."""
    typed: bool = True
    """Whether cells have types; in a CSV file all are texts."""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> names of its classes, if the file says so."""
    notes: tuple[str, ...] = ()
    """What should be known of how it was read."""

    def raw(self, text: str, label: str) -> Raw:
        """Return the samples in two of the columns; a column `split` says where each belongs.

        Args:
            text, label: Names of the columns.

        Raises:
            DataError: For a missing column.
        """
        for name, option in ((str(text), "text"), (str(label), "label")):
            if name not in self.columns:
                first = "" if self.typed else " (from its first line, which must hold the names)"
                there = in_words([repr(column[:40]) for column in self.columns], 12)
                raise DataError(f"{self.where} has no column {name!r}: it has {there}{first}",
                                "name yours with text=... and label=...", option)
        splits = next((cells for name, cells in self.columns.items() if _is_split(name)), None)
        return Raw(self.columns[str(text)], self.columns[str(label)], splits,
                   self.classes.get(str(label)), self.typed, self.notes)


def suffix_of(path: Path) -> str:
    """Return the suffix that tells how a file is read, such as `.csv` of `A.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        del suffixes[-1]
    return suffixes[-1] if suffixes else ""


def read_table(path: Path, asked: tuple[str, str], encoding: str | None = None,
               separator: str | None = None) -> Table:
    """Read a file.

    Args:
        path: Of the file, whose suffix is one of `KNOWN`, with or without `.gz`.
        asked: Names of two columns, by which the separator of a CSV file is found.
        encoding: Of the characters; `utf-8`, or what the file's first bytes say, if None.
        separator: Of the cells in a line, found if None.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it cannot be read, with the line.
    """
    data, suffix = _bytes(path), suffix_of(path)
    asked = (str(asked[0]), str(asked[1]))
    if suffix == ".parquet":
        return _parquet(data, path.name, asked)
    text = _decoded(data, path.name, encoding)
    if not text.strip():
        raise DataError(f"{path.name} is empty", "check the path")
    if suffix in JSON:
        return _json(text, path.name, suffix)
    return _delimited(text, path.name, asked, separator or SEPARATORS[suffix])


def _is_split(column: str) -> bool:
    return column.strip().lower() == "split"


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})",
                        "check that it is a file that you may read") from error
    try:  # by its content: some are packed and do not say so
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} cannot be unpacked ({error})",
                        "it may be cut short: get it again") from error


def _decoded(data: bytes, where: str, encoding: str | None) -> str:
    chosen = encoding or next((name for mark, name in BOMS if data.startswith(mark)), "UTF-8")
    zeros = "such as encoding=\"utf-16-le\", since zero bytes are in it"
    windows = "such as encoding=\"cp1252\" for old files of Windows"
    hint = f"name its encoding, {zeros if bytes(1) in data[:1000] else windows}"
    try:
        text = data.decode(chosen)
    except LookupError:
        raise DataError(f"there is no encoding {encoding!r}",
                        "name one that Python knows, such as cp1252", "encoding") from None
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        line = data.count(b"\n", 0, at) + 1
        raise DataError(f"{where} is not {chosen} (byte 0x{data[at]:02x} in line {line})", hint,
                        "encoding") from error
    if "\0" in text[:1000]:
        raise DataError(f"{where} is not {chosen}", hint, "encoding")
    return text.removeprefix("\ufeff")


# ------------------------------------------------------------- JSON and parquet

def _json(text: str, where: str, suffix: str) -> Table:
    start = text.lstrip()[:1]
    if suffix == ".json" or start == "[":
        try:
            return _json_whole(json.loads(text), where)
        except (ValueError, RecursionError) as error:
            if start == "[" or not _is_json(text.lstrip().splitlines()[0]):
                raise DataError(f"{where} is no JSON ({error})",
                                "check that it is whole") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` splits inside texts too
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", error)
                raise DataError(f"{where}: line {number} is no JSON ({said})",
                                "write one object a line") from error
    if suffix == ".json" and len(records) == 1:
        return _json_whole(records[0], where)
    return _json_records(records, where)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_whole(found: Any, where: str) -> Table:
    """Take a list of objects, an object of columns, or an object around one of the two."""
    if isinstance(found, list):
        return _json_records(found, where)
    if isinstance(found, dict) and found:
        cells = [list(x.values()) if isinstance(x, dict) else x for x in found.values()]
        if all(isinstance(x, list) for x in cells) and len({len(x) for x in cells}) == 1 < len(
                found):
            return Table(where, dict(zip(found, cells, strict=True)))
        inside = [x for x in found.values() if isinstance(x, list) and x and all(
            isinstance(record, dict) for record in x)]
        if len(inside) == 1:
            return _json_records(inside[0], where)
    raise DataError(f"{where} holds no samples in a form that is known",
                    "write a list of objects, or one object a line")


def _json_records(records: list, where: str) -> Table:
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{where}: sample {number} is a {type(record).__name__}",
                            "write an object with the fields of a sample")
    names = dict.fromkeys(name for record in records for name in record)
    return Table(where, {name: [record.get(name) for record in records] for name in names})


def _parquet(data: bytes, where: str, asked: tuple[str, str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{where} has two columns {twice[0]!r}", "rename one")
        wanted = [name for name in names if name in asked or _is_split(name)]
        table = file.read(columns=wanted) if {*asked} <= {*names} else None
    except pa.ArrowException as error:
        raise DataError(f"{where} is no whole parquet file ({str(error).splitlines()[0]})",
                        "get it again") from error
    columns: dict[str, list] = {name: [] for name in names}
    if table is not None:
        columns |= {name: table.column(name).to_pylist() for name in wanted}
    try:  # names of classes, as `datasets` writes them into a parquet file
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        classes = {name: tuple(kind["names"]) for name, kind in features.items()
                   if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # none, or of another form
        classes = {}
    return Table(where, columns, classes=classes)


# --------------------------------------------------------- texts with separators

def _delimited(text: str, where: str, asked: tuple[str, str], separators: str) -> Table:
    """Read by the separator under which the first line has the columns that are asked for."""
    limit = csv.field_size_limit(LONGEST)
    try:
        lines = list(io.StringIO(text, newline=""))
        if told := re.fullmatch(r'"?sep=(.)"?\s*', lines[0]):  # how Excel names the separator
            lines[0], separators = "\n", told[1]
        heads = {mark: _head(lines, mark, where) for mark in separators}
        fits = [mark for mark, head in heads.items() if {*asked} <= {*head}]
        mark = fits[0] if fits else max(separators, key=lambda mark: len(heads[mark]))
        head = heads[mark]
        if twice := [name for name in asked if head.count(name) > 1]:
            raise DataError(f"{where} has two columns {twice[0]!r}", "rename one")
        if not fits:
            return Table(where, {name: [] for name in head}, typed=False)
        notes = () if mark == separators[0] else (f"the separator is {mark!r}",)
        try:
            found = _whole(lines, mark, where, head.index(asked[1]))
        except DataError:
            # Files with tabs often know no quotes; then each line is one sample.
            found = [line.rstrip("\r\n").split("\t") for line in lines if line.strip("\r\n")][1:]
            if mark != "\t" or any(len(cells) != len(head) for cells in found):
                raise
            notes = (*notes, "quotes stand for themselves")
    finally:
        csv.field_size_limit(limit)
    columns = list(zip(*found, strict=True)) or [()] * len(head)
    return Table(where, {name: list(cells) for name, cells in zip(head, columns, strict=True)},
                 typed=False, notes=notes)


def _head(lines: list[str], mark: str, where: str) -> list[str]:
    try:
        return next(_records(lines, mark, where))[2]
    except (StopIteration, DataError):  # quotes that go wrong under another separator
        return []


def _records(lines: list[str], mark: str, where: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first line, last line and cells of each record; lines are counted from 1."""
    reader, start = csv.reader(lines, delimiter=mark, strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield start, reader.line_num, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{where}: a quote in line {start} goes wrong ({error})",
                        QUOTES) from error


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
                            f"like other samples, up to line {stop}", QUOTES)
    return [cells for _, _, cells in records[1:]]


def _like_a_sample(line: str, mark: str, width: int, label: int, known: set[str]) -> bool:
    """Tell whether a line alone has as many cells as a sample, and a known label among them."""
    line = line.rstrip("\r\n")
    ways = [line.split(mark)]
    for text in (line, line.replace('""', '"')):
        ways += csv.reader([text], delimiter=mark)
    return any(len(cells) == width and cells[label].strip().strip('"') in known for cells in ways)
