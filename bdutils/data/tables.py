"""Files of samples: CSV and its relatives, JSON, JSON lines, parquet; packed by `gzip` or not.

A file is read whole or refused with the line that is wrong: no line is skipped, no cell is taken
for missing because of what it says, and nothing is guessed that the file does not settle.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from ..samples import DataError, in_words
from .delimited import read_delimited
from .normalize import Raw

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}
JSON = (".json", ".jsonl", ".ndjson")
KNOWN = (*SEPARATORS, *JSON, ".parquet")
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Table:
    """Columns of a file."""

    where: str
    """Name of the file."""
    columns: dict[str, list]
    """Name -> (n,) cells."""
    typed: bool = True
    """Whether cells have types; in a CSV file all are texts."""
    classes: dict[str, tuple[str, ...]] | None = None
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
        splits = next((name for name in self.columns if is_split(name)), None)
        return Raw(self.column(text, "text"), self.column(label, "label"),
                   self.columns.get(splits), (self.classes or {}).get(str(label)), self.typed,
                   self.notes)

    def column(self, name: str, option: str) -> list:
        """Return the cells of a column.

        Args:
            name: Of the column.
            option: The argument that named it, for the message.

        Raises:
            DataError: If there is none of that name.
        """
        if str(name) not in self.columns:
            first = "" if self.typed else " (from its first line, which must hold the names)"
            there = in_words([repr(column[:40]) for column in self.columns], 12)
            raise DataError(f"{self.where} has no column {str(name)!r}: it has {there}{first}",
                            "name yours with text=... and label=...", option)
        return self.columns[str(name)]


def is_split(column: str) -> bool:
    """Tell whether a column says to which split a sample belongs."""
    return column.strip().lower() == "split"


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
    columns, notes = read_delimited(text, path.name, asked, separator or SEPARATORS[suffix])
    return Table(path.name, columns, typed=False, notes=notes)


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})",
                        "check that it is a file that you may read") from error
    if data[:2] != b"\x1f\x8b":  # by its content: some are packed and do not say so
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} cannot be unpacked ({error})",
                        "it may be cut short: get it again") from error


def _decoded(data: bytes, where: str, encoding: str | None) -> str:
    found = next((name for mark, name in BOMS if data.startswith(mark)), None)
    zeros = "such as encoding=\"utf-16-le\", since zero bytes are in it"
    windows = "such as encoding=\"cp1252\" for old files of Windows"
    hint = f"name its encoding, {zeros if bytes(1) in data[:1000] else windows}"
    try:
        text = data.decode(encoding or found or "utf-8")
    except LookupError:
        raise DataError(f"there is no encoding {encoding!r}",
                        "name one that Python knows, such as cp1252", "encoding") from None
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        line = data.count(b"\n", 0, at) + 1
        raise DataError(f"{where} is not {encoding or found or 'UTF-8'} (byte 0x{data[at]:02x} in "
                        f"line {line})", hint, "encoding") from error
    if "\0" in text[:1000]:
        raise DataError(f"{where} is not {encoding or found or 'UTF-8'}", hint, "encoding")
    return text.removeprefix("\ufeff")


def _json(text: str, where: str, suffix: str) -> Table:
    start = text.lstrip()[:1]
    if suffix == ".json" or start == "[":
        try:
            return _json_whole(json.loads(text), where)
        except (ValueError, RecursionError) as error:
            if start == "[" or not _is_json(text.lstrip().splitlines()[0]):
                raise DataError(f"{where} is no JSON ({error})",
                                "check that it is whole") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` splits inside texts too
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                said = getattr(error, "msg", error)
                raise DataError(f"{where}: line {number} is no JSON ({said})",
                                "write one object a line") from error
    if suffix == ".json" and len(rows) == 1:
        return _json_whole(rows[0], where)
    return _json_rows(rows, where)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_whole(found: object, where: str) -> Table:
    """Take a list of objects, an object of columns, or an object around one of the two."""
    if isinstance(found, list):
        return _json_rows(found, where)
    if isinstance(found, dict) and found:
        cells = [list(x.values()) if isinstance(x, dict) else x for x in found.values()]
        if all(isinstance(x, list) for x in cells) and len({len(x) for x in cells}) == 1 < len(
                found):
            return Table(where, dict(zip(found, cells, strict=True)))
        inside = [x for x in found.values() if isinstance(x, list) and x and all(
            isinstance(row, dict) for row in x)]
        if len(inside) == 1:
            return _json_rows(inside[0], where)
    raise DataError(f"{where} holds no samples in a form that is known",
                    "write a list of objects, or one object a line")


def _json_rows(rows: list, where: str) -> Table:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{where}: row {number} is a {type(row).__name__}",
                            "write an object with the fields of a sample")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(where, {name: [row.get(name) for row in rows] for name in names})


def _parquet(data: bytes, where: str, asked: tuple[str, str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{where} has two columns {twice[0]!r}", "rename one")
        wanted = [name for name in names if name in asked or is_split(name)]
        table = file.read(columns=wanted) if {*asked} <= {*names} else None
    except pa.ArrowException as error:
        raise DataError(f"{where} is no whole parquet file ({str(error).splitlines()[0]})",
                        "get it again") from error
    columns: dict[str, list] = {name: [] for name in names}
    if table is not None:
        columns |= {name: table.column(name).to_pylist() for name in wanted}
    return Table(where, columns, classes=class_names(file.schema_arrow.metadata))


def class_names(metadata: dict[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the names of classes that `datasets` writes into a parquet file, by column.

    Args:
        metadata: Of the file's schema.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: tuple(kind["names"]) for name, kind in features.items()
                if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # none, or of another form
        return {}


def refuse_suffix(path: Path) -> None:
    """Say what to do with a file whose suffix tells of no form that is known.

    Args:
        path: Of a file that exists.

    Raises:
        DataError: Always.
    """
    raise DataError(f"{path.name} is of a form that is not known",
                    f"save it as one of {in_words(KNOWN, 9)}, packed by gzip or not")
