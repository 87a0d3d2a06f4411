"""Records from local files (JSON lines, JSON, CSV, parquet) or from a data set of the Hugging Face hub.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. JSON is an object a line, objects one after the other, an
array of them, or one object that holds such an array (`{"data": [...]}`). CSV has its names in the first line and
commas, semicolons or tabs between the cells: commas if the first line has any. Every mistake in a file is one line that
names the file, the place and what was expected.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from undertow.hub import asked_once
from undertow.tasks.base import Record

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".ndjson", ".tsv")  # in any case; all but parquet also with .gz
_ONE_A_LINE = "must be one JSON object a line, an array of them, or an object that holds one"
_ENCODINGS = "UTF-8, or UTF-16 or UTF-32 with a byte order mark"
_LARGEST_CELL = 2**31 - 1  # bytes; Python's own limit is 131,072
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read(path: str | Path, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one local file, in its order.

    Args:
        path: a file that ends in one of `SUFFIXES`.
        fields: what every record must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or the file is empty, torn, not in UTF-8, of an unknown kind, or a record lacks a field.
            One line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; must be a file ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = _kind(path)
    if kind not in SUFFIXES or (path.suffix.lower() == ".gz" and kind == ".parquet"):
        raise ValueError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    yield from checked(_READERS[kind](path, fields), str(path), fields)


def checked(records: Iterable[Record], where: str, fields: Sequence[str]) -> Iterator[Record]:
    """The records as they come, fields of UTF-8 bytes as text.

    Raises ValueError (one line): there are none, or one lacks a field (None and NaN are none).
    """
    count = 0
    for count, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{where}, record {count}: is {type(record).__name__}, not a mapping of fields")
        missing = [field for field in fields if record.get(field) is None or record[field] != record[field]]  # NaN
        if missing:
            raise ValueError(
                f"{where}, record {count}: lacks {', '.join(missing)}; has {', '.join(map(str, record)) or 'nothing'}"
            )
        yield record | _decoded(record, fields, f"{where}, record {count}")
    if count == 0:
        raise ValueError(f"{where}: holds no records")


def _decoded(record: Record, fields: Sequence[str], where: str) -> Record:
    """The fields that are bytes (as some writers of parquet keep text), as text."""
    found = {}
    for field in fields:
        if isinstance(record[field], bytes):
            try:
                found[field] = record[field].decode()
            except UnicodeDecodeError:
                raise ValueError(f"{where}: {field} is bytes that are not UTF-8; must be text") from None
    return found


def hub(name: str, split: str, config: str | None = None, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one split of a data set on the Hugging Face hub (downloaded once, then read from its cache).

    Raises:
        ValueError: it cannot be had, or a record lacks a field. One line that names the data set.
    """
    import datasets

    with _from_hub(name), asked_once():
        found = datasets.load_dataset(name, config, split=split)
    yield from checked(found, f"{name} ({split})", fields)


def hub_stream(name: str, split: str, config: str | None = None) -> IterableDataset:
    """A split of a data set on the hub as a stream, nothing of it kept. Raises as `hub` does."""
    import datasets

    with _from_hub(name), asked_once():
        return datasets.load_dataset(name, config, split=split, streaming=True)


def file_stream(paths: Sequence[str | Path]) -> IterableDataset:
    """Local parquet or JSON files as a stream, in the order given: the same kind of object as `hub_stream` gives.

    Raises:
        FileNotFoundError: no such file.
        ValueError: files of different or unknown kinds, or one that is empty. One line. What is found wrong further
            on, while records are read, is raised by `datasets`; `one_line` makes one line of it.
    """
    import datasets

    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
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
    return (path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def _bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file, unpacked if need be; what is wrong with its bytes is one line."""
    from undertow.data.encodings import marked

    try:
        with _bytes(path) as file:
            start = file.read(4096)
        codec = marked(start) or "utf-8"
        if codec.startswith("utf-8") and b"\0" in start:
            raise ValueError(f"{path}: not text: holds NUL bytes; must be in {_ENCODINGS}")
        with _bytes(path) as file:
            yield io.TextIOWrapper(file, encoding=codec, newline=newline)
    except UnicodeDecodeError as error:
        raise _bad_line(path, error) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def _bad_line(path: Path, error: UnicodeDecodeError) -> ValueError:
    """What is to be said of a file that cannot be decoded: of UTF-8, with the line."""
    if error.encoding == "utf-8":
        with _bytes(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as here:
                    return ValueError(_encoding(f"{path}, line {number}", here))
    return ValueError(_encoding(str(path), error))


def _encoding(where: str, error: UnicodeDecodeError) -> str:
    return f"{where}: not text in UTF-8 ({error.reason} at byte {error.start}); must be {_ENCODINGS}"


def _json_lines(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    with _opened(path) as file:  # every newline ends a line: none stands inside a JSON string
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        try:
            value = _parsed(first[1])
        except (ValueError, RecursionError):  # an object over several lines, or what is said better of the whole
            yield from _json(path, fields)
            return
        second = next(lines, None)
        if second is None:
            yield from _unwrapped(value, fields)
            return
        yield value
        for number, line in itertools.chain([second], lines):
            try:
                yield _parsed(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from None


def _json(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    with _opened(path) as file:
        text = file.read()
    at, values = _past_space(text, 0), []
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        try:
            if text[at] == ",":
                raise ValueError("a comma after a record")
            value, end = _DECODER.raw_decode(text, at)
            _check_text(text[at:end], value)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, error) from None
        except (ValueError, RecursionError) as error:
            raise _not_json(path, line, error) from None
        at = _past_space(text, end)
        values.append(value)
    whole = values[0] if len(values) == 1 else values
    yield from whole if isinstance(whole, list) else _unwrapped(whole, fields)


def _not_json(path: Path, line: int, error: Exception) -> ValueError:
    said = str(error)
    if isinstance(error, json.JSONDecodeError):
        said = f"{error.msg.removesuffix(' starting at')} at column {error.colno}"
    return ValueError(f"{path}, line {line}: not JSON ({said}); {_ONE_A_LINE}")


def _unwrapped(value: Any, fields: Sequence[str]) -> Iterable[Any]:
    """The records of a file's only value: those of an array, of the one array that an object holds, or itself."""
    if isinstance(value, list) and (not value or any(isinstance(one, dict) for one in value)):
        return value
    if isinstance(value, dict) and (not fields or any(field not in value for field in fields)):
        inside = [held for held in value.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
        if len(inside) == 1 and (fields or len(value) == 1):
            return inside[0]
    return (value,)


def _parsed(line: str) -> Any:
    value = json.loads(line)
    _check_text(line, value)
    return value


def _check_text(written: str, value: Any) -> None:
    """Raise ValueError where a string is not text: JSON can write half a character, which UTF-8 cannot hold."""
    if "\\ud" in written.lower():
        half = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
        if half is not None:
            raise ValueError(f"half a character, \\u{ord(half[0]):04x}")


def _past_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _csv(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    csv.field_size_limit(_LARGEST_CELL)  # of this process: the module has no other place for it
    with _opened(path, newline="") as file:
        lines = csv.reader(file, delimiter=_delimiter(path), strict=True)
        try:
            names = [name.strip() for name in next(lines, [])]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{path}, line 1: names the column {twice!r} twice")
            for cells in filter(None, lines):
                if len(cells) > len(names):
                    raise ValueError(f"{path}, line {lines.line_num}: more cells than the header names")
                yield dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))
        except csv.Error as error:
            hint = "a quote inside a quoted cell is written twice"
            raise ValueError(f"{path}, line {lines.line_num}: not CSV ({error}); {hint}") from None


def _delimiter(path: Path) -> str:
    """What stands between the names in the first line."""
    with _opened(path) as file:
        header = file.readline()
    return next((mark for mark in ",;\t" if mark in header), ",")


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not parquet ({' '.join(str(error).split())})") from None


_DECODER = json.JSONDecoder()
_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
