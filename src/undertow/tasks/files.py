"""Records from local files (JSON lines, a JSON array, CSV, parquet) or from a data set of the Hugging Face hub.

Every mistake in a file is one line that names the file, the place and what was expected.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from undertow.tasks.base import Record

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # the first three also with .gz after them


def read(path: str | Path, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one local file, in its order.

    Args:
        path: a file that ends in one of `SUFFIXES`.
        fields: what every record must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or the file is empty, torn, not UTF-8, of an unknown kind, or a record lacks a field.
            One line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; must be a file ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = _kind(path)
    if kind not in SUFFIXES or (path.suffix == ".gz" and kind == ".parquet"):
        raise ValueError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    yield from checked(_READERS[kind](path), str(path), fields)


def checked(records: Iterable[Record], where: str, fields: Sequence[str]) -> Iterator[Record]:
    """The records as they come. Raises ValueError (one line): there are none, or one lacks a field."""
    count = 0
    for count, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{where}, record {count}: is {type(record).__name__}, not a mapping of fields")
        missing = [field for field in fields if record.get(field) is None]
        if missing:
            raise ValueError(
                f"{where}, record {count}: lacks {', '.join(missing)}; has {', '.join(map(str, record)) or 'nothing'}"
            )
        yield record
    if count == 0:
        raise ValueError(f"{where}: holds no records")


def hub(name: str, split: str, config: str | None = None, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one split of a data set on the Hugging Face hub (downloaded once, then read from its cache).

    Raises:
        ValueError: it cannot be had, or a record lacks a field. One line that names the data set.
    """
    import datasets

    with _from_hub(name):
        found = datasets.load_dataset(name, config, split=split)
    yield from checked(found, f"{name} ({split})", fields)


def hub_stream(name: str, split: str, config: str | None = None) -> IterableDataset:
    """A split of a data set on the hub as a stream, nothing of it kept. Raises as `hub` does."""
    import datasets

    with _from_hub(name):
        return datasets.load_dataset(name, config, split=split, streaming=True)


def file_stream(paths: Sequence[str | Path]) -> IterableDataset:
    """Local parquet or JSON files as a stream, in the order given: the same kind of object as `hub_stream` gives.

    Raises:
        FileNotFoundError: no such file.
        ValueError: files of different or unknown kinds, or one that is empty. One line. What is found wrong further
            on, while records are read, is raised by `datasets`; `one_line` makes one line of it.
    """
    import datasets

    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if _kind(path) not in kinds:
            raise ValueError(f"{path}: unknown kind of file; allowed: {', '.join(kinds)}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: holds no records")
    readers = {kinds[_kind(Path(path))] for path in paths}
    if len(readers) != 1:
        raise ValueError(f"{', '.join(map(str, paths)) or 'no files'}: must be files of one kind, parquet or JSON")
    # It logs an error that it then raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    with one_line(str(paths[0])):
        return datasets.load_dataset(
            readers.pop(), data_files=[str(path) for path in paths], split="train", streaming=True
        )


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """What `datasets` and pyarrow raise about a file becomes one line that begins with `where`. Raises ValueError."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except StopIteration:  # `datasets` on a file without a record
        raise ValueError(f"{where}: holds no records") from None
    except UnicodeDecodeError as error:
        raise ValueError(_encoding(where, error)) from None
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        said = " ".join(str(error).split())
        raise ValueError(said if said.startswith(where) else f"{where}: {said}") from None


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be had from the hub ({said}); give path=, a local copy") from None


def _kind(path: Path) -> str:
    """The suffix that says what is in the file."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _opened(path: Path, **how) -> Iterator[IO[str]]:
    """A text file, unpacked if need be; what is wrong with its bytes is one line."""
    try:
        with gzip.open(path, "rt", **how) if path.suffix == ".gz" else path.open(**how) as file:  # type: ignore[operator]
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(_encoding(str(path), error)) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def _encoding(where: str, error: UnicodeDecodeError) -> str:
    return f"{where}: not text in UTF-8 ({error.reason} at byte {error.start})"


def _json_lines(path: Path) -> Iterator[Record]:
    with _opened(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _json(path: Path) -> Iterator[Record]:
    """An array of records, or lines of them under the wrong suffix."""
    with _opened(path, encoding="utf-8") as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    yield from records


def _csv(path: Path) -> Iterator[Record]:
    with _opened(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file, strict=True)
        try:
            for record in lines:
                if None in record:
                    raise ValueError(f"{path}, line {lines.line_num}: more cells than the header names")
                yield record
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not parquet ({' '.join(str(error).split())})") from None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
