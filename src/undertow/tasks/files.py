"""Records from local files (JSON lines, a JSON array, CSV, parquet) or from a data set of the Hugging Face hub.

Every mistake in a file is one line that names the file, the place and what was expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from undertow.tasks.base import Record

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(path: str | Path, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one local file, in its order.

    Args:
        path: a file that ends in one of `SUFFIXES`.
        fields: what every record must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, torn, not UTF-8, of an unknown kind, or a record lacks a field. One line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    count = 0
    for count, record in enumerate(_READERS[path.suffix](path), start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {count}: is {type(record).__name__}, not a mapping of fields")
        missing = [field for field in fields if record.get(field) is None]
        if missing:
            raise ValueError(
                f"{path}, record {count}: lacks {', '.join(missing)}; has {', '.join(map(str, record)) or 'nothing'}"
            )
        yield record
    if count == 0:
        raise ValueError(f"{path}: holds no records")


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def _json(path: Path) -> Iterator[Record]:
    """An array of records, or lines of them under the wrong suffix."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        yield from json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.DictReader(file, strict=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
        except csv.Error as error:
            raise ValueError(f"{path}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not parquet ({' '.join(str(error).split())})") from None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
