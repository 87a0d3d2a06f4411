"""FineWeb and FineWeb-Edu (arXiv 2406.17557): pages of the web, read as a stream."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from undertow.tasks import files
from undertow.tasks.base import SPLITS, Kind, Record, Task

if TYPE_CHECKING:
    from datasets import IterableDataset

_ENDS = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")  # in a folder; a .json there is about the others


@dataclass(frozen=True)
class FineWeb(Task):
    """Pages of the web as a stream: FineWeb-Edu or FineWeb.

    They come from the hub, or from local parquet or JSON files by the same code. The first documents are for
    validation; of the others, those with the same text as one of them are left out. There is no test split.

    Args:
        edu: FineWeb-Edu, the pages that teach something.
        subset: the configuration on the hub, e.g. `sample-10BT`, `sample-100BT`, `CC-MAIN-2024-10`.
        path: local files instead: a file, a folder or a glob of .parquet, .jsonl, .ndjson, .json (also .gz); one or
            several. Of a folder all but .json, which there describes the others.
        holdout: how many documents are for validation.
        limit: how many documents, at most, are for training. None: all.
    """

    edu: bool = True
    subset: str = "sample-10BT"
    path: str | tuple[str, ...] | None = None
    holdout: int = 1000
    limit: int | None = None

    kind: ClassVar[Kind] = "text"
    streams: ClassVar[bool] = True

    def __post_init__(self):
        for option, least in (("holdout", 1), ("limit", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"FineWeb {option}={value}: must be at least {least}")

    @property
    def name(self) -> str:
        """Where the documents come from, as errors name it."""
        if self.path is None:
            return "HuggingFaceFW/fineweb-edu" if self.edu else "HuggingFaceFW/fineweb"
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    def stream(self, split: str) -> IterableDataset:
        """The documents of `train` or `validation` as a stream of `datasets`: it can be resumed (`state_dict`)."""
        if split == "validation":
            return self._source().take(self.holdout).filter(partial(_kept, where=self.name, held=frozenset()))
        rest = self._source().skip(self.holdout).filter(partial(_kept, where=self.name, held=self._held))
        return rest if self.limit is None else rest.take(self.limit)

    def records(self, split: str) -> Iterator[Record]:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed: {', '.join(SPLITS)}")
        if split == "test":
            return
        found = False
        with files.one_line(self.name):
            for record in self.stream(split):
                found = True
                yield {"text": record["text"]}
        if not found:
            raise ValueError(f"FineWeb holdout={self.holdout}: {self.name} gives no document of {split}")

    def key(self, record: Record) -> bytes:
        return _digest(record["text"])

    @cached_property
    def _held(self) -> frozenset[bytes]:
        """Digests of the validation documents."""
        return frozenset(_digest(record["text"]) for record in self.records("validation"))

    def _source(self) -> IterableDataset:
        if self.path is None:
            found = files.hub_stream(self.name, "train", self.subset)
        else:
            found = files.file_stream(_files((self.path,) if isinstance(self.path, str) else self.path))
        if found.column_names is not None and "text" not in found.column_names:
            has = ", ".join(found.column_names)
            raise ValueError(f"{self.name}: lacks text; has {has}" if has else f"{self.name}: holds no records")
        return found


def _kept(record: Record, where: str, held: frozenset[bytes]) -> bool:
    """Whether a document is kept: it is not blank, nor one of those held out."""
    if not isinstance(record["text"], str):
        raise ValueError(f"{where}: a document's text is {record['text']!r}; must be a string")
    return bool(record["text"].strip()) and _digest(record["text"]) not in held


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _files(paths: tuple[str, ...]) -> list[Path]:
    """The files under the names, those of a folder or glob in the order of their names."""
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(_ENDS))
        elif glob.has_magic(name):
            inside = sorted(map(Path, glob.glob(str(path), recursive=True)))
        else:
            inside = [path]
        if not inside:
            raise FileNotFoundError(f"{name}: holds no .parquet or .jsonl file")
        found += inside
    return found
